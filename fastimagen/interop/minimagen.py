"""MinImagen's training directories, converted to model directories."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..cascade import Stage
from ..config import CascadeConfig, StageConfig
from ..config_file import validate
from ..files import read_json_object, read_pth, require_empty
from ..network_config import UNetConfig
from ..presets import MINIMAGEN, minimagen_stage
from ..sampling.model_directory import write_model
from ..text.t5 import T5_NAMES
from .minimagen_unet import unet_from_minimagen

logger = logging.getLogger(__name__)

# Defaults of MinImagen's class Imagen. Its arguments image_sizes and text_encoder_name have none.
_IMAGEN_DEFAULTS: dict[str, Any] = {
    "text_embed_dim": None,
    "channels": 3,
    "timesteps": 1000,
    "cond_drop_prob": 0.1,
    "loss_type": "l2",
    "lowres_sample_noise_level": 0.2,
    "auto_normalize_img": True,
    "dynamic_thresholding_percentile": 0.9,
    "only_train_unet_number": None,
}
CARD = """---
library_name: fastimagen
pipeline_tag: text-to-image
tags: [imagen, diffusion, text-to-image]
license: unknown
---

# {name}

A text-to-image cascade trained with MinImagen, converted from `{source}` by fastimagen {version}.

| stage | size | parameters | weights |
| --- | --- | --- | --- |
{stages}

Text encoder: {encoder}

The default sampling settings are those of MinImagen: ancestral sampling with all {timesteps} timesteps, guidance 3.
Super-resolution outputs differ from those of MinImagen. In sampling, MinImagen adds the augmentation noise before it
scales the low-resolution image to [-1, 1]; in training it adds the noise afterwards. fastimagen always adds it
afterwards, as the paper does.

The licence of the weights is not stated: set `license` at the top of this file before you share the model.

## Sample

In the folder of this file:

```bash
fastimagen sample --model . {inputs}
```
"""


def import_minimagen(source: str | Path, out: str | Path) -> Path:
    """Convert a MinImagen training directory to a model directory for `fastimagen sample`; returns `out`.

    Reads parameters/*.json, parameters/training_parameters*.txt if it exists, and for every U-Net its best weights
    (state_dicts/) or else its latest weights (tmp/). Corrections are logged as warnings. Raises ValueError, and writes
    nothing, for missing, ambiguous or contradictory files, unknown arguments, weights that do not fit, and an `out`
    that is not empty.
    """
    source, out = Path(source), Path(out)
    require_empty(out)
    files = _unet_files(source)
    imagen, imagen_path = read_imagen(source / "parameters")
    sizes = imagen["image_sizes"]
    if not isinstance(sizes, list) or len(sizes) != len(files):
        message = f"image_sizes must be a list of {len(files)} sizes, one per U-Net, got {sizes!r}"
        raise ValueError(f"{imagen_path}: {message}")
    stages: list[StageConfig] = []
    weights: dict[str, dict[str, Tensor]] = {}
    rows = []
    for index, ((parameters, checkpoint), size) in enumerate(zip(files, sizes)):
        try:
            arguments = read_json_object(parameters)
            unet = unet_from_minimagen(read_pth(checkpoint), arguments, label=f"unet_{index}")
        except ValueError as error:
            raise ValueError(f"unet_{index} ({parameters.name}, {checkpoint.name}): {error}") from None
        stage = stage_of(unet.config, size, imagen)
        stages.append(stage)
        weights[stage.name] = unet.state_dict()
        millions = sum(weight.numel() for weight in weights[stage.name].values()) / 1e6
        rows.append(f"| {stage.name} | {size}x{size} | {millions:.2f} M | {checkpoint.relative_to(source)} |")
    cascade = validate(CascadeConfig, {"stages": stages}, str(imagen_path))
    text_dim = stages[0].unet.text_dim
    assert text_dim is not None  # MinImagen's U-Nets always have a text path
    encoder = _text_encoder(imagen["text_encoder_name"], text_dim, imagen_path)
    card = CARD.format(
        name=out.name,
        source=source.name,
        version=__version__,
        stages="\n".join(rows),
        encoder=encoder["name"] if encoder else "none; sample with text embeddings",
        timesteps=imagen["timesteps"],
        inputs="--captions 'a happy dog'" if encoder else "--embeddings captions.safetensors",
    )
    return write_model(out, cascade, weights, text_encoder=encoder, encoder_folder=None, card=card)


def stage_of(unet: UNetConfig, size: Any, imagen: dict[str, Any]) -> StageConfig:
    """The stage for a U-Net and the arguments of MinImagen's Imagen. Raises ValueError for invalid arguments."""
    stage = minimagen_stage(
        f"sr{size}" if unet.lowres else f"base{size}",
        size,
        unet,
        timesteps=imagen["timesteps"],
        caption_dropout=imagen["cond_drop_prob"],
        loss=imagen["loss_type"],
        percentile=imagen["dynamic_thresholding_percentile"],
        sample_level=imagen["lowres_sample_noise_level"],
    )
    Stage(stage)  # raises ValueError for a schedule that cannot be sampled: with 20 timesteps it ends in pure noise
    return stage


def _unet_files(source: Path) -> list[tuple[Path, Path]]:
    """(parameters, weights) of every U-Net, in order."""
    if not (source / "parameters").is_dir():
        raise ValueError(
            f"{source} is not a MinImagen training directory: it has no folder parameters. "
            "A folder parameters alone becomes a configuration: give --out NAME.json"
        )
    with_parameters = unet_numbers(source / "parameters", ".json")
    with_weights = unet_numbers(source / "state_dicts", ".pth") | unet_numbers(source / "tmp", ".pth")
    count = len(with_parameters)
    if not count or with_parameters != set(range(count)):
        found = ", ".join(f"unet_{number}" for number in sorted(with_parameters)) or "none"
        raise ValueError(
            f"{source / 'parameters'} must hold unet_0_params_*.json, unet_1_params_*.json, ..., found {found}; "
            f"MinImagen does not save them for a restarted run: copy them from the first run"
        )
    extra = with_weights - with_parameters
    if extra:
        number = min(extra)
        raise ValueError(f"{source} holds weights of unet_{number}, but no parameters/unet_{number}_params_*.json")
    files = []
    for index in range(count):
        parameters = only_file(source / "parameters", f"unet_{index}_*.json")
        assert parameters is not None  # found above
        checkpoint = only_file(source / "state_dicts", f"unet_{index}_*.pth")
        if checkpoint is None:
            checkpoint = only_file(source / "tmp", f"unet_{index}_*.pth")
            if checkpoint is None:
                raise ValueError(
                    f"{source} holds no weights of unet_{index}, neither in state_dicts nor in tmp; to train such a "
                    f"cascade, write its configuration: fastimagen import-minimagen {source} --out mine.json"
                )
            logger.warning("unet_%d has no best weights in state_dicts: using the latest, %s", index, checkpoint)
        files.append((parameters, checkpoint))
    return files


def unet_numbers(folder: Path, suffix: str) -> set[int]:
    """The numbers N of the files unet_N_* in a folder; empty if there is no such folder."""
    matches = (re.match(r"unet_(\d+)_", path.name) for path in folder.glob(f"unet_*{suffix}"))
    return {int(match[1]) for match in matches if match}


def read_imagen(parameters: Path) -> tuple[dict[str, Any], Path]:
    """The arguments of MinImagen's Imagen with its defaults, and the path of their file."""
    path = only_file(parameters, "imagen_*.json")
    if path is None:
        raise ValueError(
            f"{parameters} holds no imagen_params_*.json; MinImagen does not save it for a restarted run: "
            f"copy it from the first run"
        )
    arguments = read_json_object(path)
    command = read_command(parameters)
    if "T5_NAME" in command:
        arguments.setdefault("text_encoder_name", command["T5_NAME"])
    required = {"image_sizes", "text_encoder_name"}
    wrong = [f"unknown {key}" for key in sorted(arguments.keys() - required - _IMAGEN_DEFAULTS.keys())]
    wrong += [f"missing {key}" for key in sorted(required - arguments.keys())]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    imagen = _IMAGEN_DEFAULTS | arguments
    _compare_with_command(imagen, path, command)
    if imagen["only_train_unet_number"] is not None:
        message = "only_train_unet_number is %s: the other U-Nets may be untrained"
        logger.warning(message, imagen["only_train_unet_number"])
    return imagen, path


def _compare_with_command(imagen: dict[str, Any], path: Path, command: dict[str, str]) -> None:
    """Raise ValueError if the command line of the training names another text encoder than `imagen`; log a warning if
    it has other sizes or timesteps, which training did not use."""
    encoder = imagen["text_encoder_name"]
    if command.get("T5_NAME", encoder) != encoder:
        raise ValueError(
            f"{path} names text encoder {encoder}, training_parameters {command['T5_NAME']}: set both to the one that "
            f"encoded the captions; MinImagen takes the latter in training, the former in sampling"
        )
    sizes = imagen["image_sizes"]
    last_size = sizes[-1] if isinstance(sizes, list) and sizes else sizes
    message = "%s is %s in %s but %s is %s in training_parameters: using the former, as training did"
    for key, value, argument in (
        ("timesteps", imagen["timesteps"], "TIMESTEPS"),
        ("the last of image_sizes", last_size, "IMG_SIDE_LEN"),
    ):
        if command.get(argument, str(value)) != str(value):
            logger.warning(message, key, value, path.name, argument, command[argument])


def read_command(parameters: Path) -> dict[str, str]:
    """The --KEY=VALUE lines of training_parameters*.txt; empty if there is no such file."""
    path = only_file(parameters, "training_*.txt")
    if path is None:
        return {}
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.startswith("--"):
            raise ValueError(f"{path}: lines must be --KEY=VALUE, got {line!r}")
        values[key.removeprefix("--")] = value.strip()
    return values


def _text_encoder(name: str | None, text_dim: int, path: Path) -> dict[str, Any] | None:
    """The reference to the text encoder for model_index.json; None if its embeddings do not have width text_dim."""
    if name not in T5_NAMES:
        raise ValueError(f"{path}: text_encoder_name must be one of {', '.join(T5_NAMES)}, got {name!r}")
    width = T5_NAMES[name][1]
    if width != text_dim:
        message = (
            "the U-Nets take embeddings of width %d, but those of %s have width %d: the model names no text encoder; "
            "sample with --embeddings"
        )
        logger.warning(message, text_dim, name, width)
        return None
    return {"name": name, "revision": None, "max_length": MINIMAGEN["max_text_length"], "included": False}


def only_file(folder: Path, pattern: str) -> Path | None:
    """The file in `folder` that matches; None if there is none. Raises ValueError if there are several."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several files for {pattern}: {names}; keep one of them")
    return found[0] if found else None
