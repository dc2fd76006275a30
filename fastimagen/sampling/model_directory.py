"""The model directory on disk: what `fastimagen export` writes and the pipeline reads.

model_index.json              format, stages in order, reference to the text encoder, sizes of images
<stage>/config.json           the stage's configuration
<stage>/model.safetensors     EMA weights by parameter name, the configuration in the header
text_encoder/                 only if the encoder is included; otherwise the index names it
README.md, samples.png        the model card, with samples if there are any
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..config import CascadeConfig, StageConfig
from ..config_file import validate
from ..files import atomic_folder, first_line, read_json_object, read_safetensors
from ..sizes import ImageSize

FORMAT = "fastimagen.model.1"

CLASS_NAME = "ImagenPipeline"
"""Entry "_class_name" of model_index.json. Programs that take the file for that of a diffusers pipeline read it, and
then say that they do not know this class."""


def write_model(
    path: Path,
    cascade: CascadeConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    text_encoder: dict[str, Any] | None,
    encoder_folder: Path | None,
    card: str,
    grid: Path | None = None,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, Sequence[ImageSize]] | None = None,
) -> Path:
    """Write a model directory from weights by stage and parameter name, complete or not at all.

    text_encoder: {"name", "revision", "max_length", "encoding", "included"}; an included one is copied from
    encoder_folder. grid: image of samples for the card, copied as samples.png. dtype: of the weights; None keeps
    theirs. sizes: of the images that each stage was trained on, the one to sample by default first; None for its
    squares. Raises ValueError if the folder is not empty.
    """
    with atomic_folder(path) as temporary:
        for stage in cascade.stages:
            folder = temporary / stage.name
            folder.mkdir()
            config = stage.model_dump_json(indent=2)
            (folder / "config.json").write_text(config + "\n")
            stored = {
                name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights[stage.name].items()
            }
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt", "config": config})
        if text_encoder and text_encoder.get("included"):
            assert encoder_folder is not None
            shutil.copytree(encoder_folder, temporary / text_encoder["name"])
        index = {
            "_class_name": CLASS_NAME,
            "format": FORMAT,
            "version": __version__,
            "stages": [stage.name for stage in cascade.stages],
            "text_encoder": text_encoder,
        }
        squares = {stage.name: [ImageSize.of(stage.size)] for stage in cascade.stages}
        if sizes is not None and sizes != squares:
            index["sizes"] = {name: [str(size) for size in sizes[name]] for name in squares}
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if grid is not None:
            shutil.copyfile(grid, temporary / "samples.png")
    return path


def read_model(path: str | Path) -> tuple[CascadeConfig, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(cascade, weights by stage and parameter name, content of model_index.json) of a model directory.

    Raises ValueError as `read_cascade` does, or if weights cannot be read. Whether they fit their configuration is
    checked by `load_weights`.
    """
    cascade, index = read_cascade(path)
    weights = {stage.name: read_safetensors(Path(path) / stage.name / "model.safetensors") for stage in cascade.stages}
    return cascade, weights, index


def read_cascade(path: str | Path) -> tuple[CascadeConfig, dict[str, Any]]:
    """(cascade, content of model_index.json) of a model directory, without its weights.

    Raises ValueError with one line if the folder is not a model directory, has another format or is damaged.
    """
    path = Path(path)
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is not a model directory: it has no model_index.json; "
            f"`fastimagen export` converts a run directory into a model directory"
        )
    index = read_json_object(path / "model_index.json")
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has format {index.get('format')!r}; this version reads {FORMAT!r}")
    stages = [
        validate(StageConfig, read_json_object(path / name / "config.json"), f"{path / name}/config.json")
        for name in index.get("stages", [])
    ]
    return validate(CascadeConfig, {"stages": stages}, f"{path}/model_index.json"), index


def read_sizes(index: Mapping[str, Any]) -> dict[str, list[ImageSize]]:
    """By stage: the sizes of images that model_index.json names; {} if the stages were trained on squares."""
    return {stage: [ImageSize.parse(text) for text in texts] for stage, texts in index.get("sizes", {}).items()}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Load weights by parameter name. assign: make them the parameters, instead of copying into those that exist.

    Raises ValueError that starts with `source` and names the first parameters that do not match.
    """
    check_shapes(module, {name: tuple(weight.shape) for name, weight in weights.items()}, source)
    module.load_state_dict(weights, assign=assign)


def check_shapes(module: nn.Module, found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise ValueError as `load_weights` does, for the shapes of weights by parameter name."""
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"missing {name}")
        elif name not in expected:
            problems.append(f"unexpected {name}")
        elif found[name] != expected[name]:
            problems.append(f"{name} has shape {found[name]}, expected {expected[name]}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source}: weights and configuration do not match: {'; '.join(problems[:3])}{more}")


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a safetensors file, by parameter name, from its header.

    Raises ValueError that names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read weights {path}: {first_line(error)}") from None
