"""The model directory on disk: model_index.json, a folder per stage, the text encoder, README.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..config import CascadeConfig, StageConfig
from ..config_file import validate
from ..files import atomic_folder, read_json_object, read_safetensors

FORMAT = "fastimagen.model.1"


def write_model(
    path: Path,
    cascade: CascadeConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    text_encoder: dict[str, Any] | None,
    encoder_folder: Path | None,
    card: str,
) -> Path:
    """Write a model directory from weights by stage and parameter name, complete or not at all.

    text_encoder: {"name", "revision", "max_length", "included"}; an included one is copied from encoder_folder.
    """
    from safetensors.torch import save_file

    with atomic_folder(path) as temporary:
        for stage in cascade.stages:
            config = stage.model_dump_json(indent=2)
            (temporary / stage.name).mkdir()
            (temporary / stage.name / "config.json").write_text(config + "\n")
            contiguous = {name: weight.detach().cpu().contiguous() for name, weight in weights[stage.name].items()}
            save_file(
                contiguous, temporary / stage.name / "model.safetensors", metadata={"format": "pt", "config": config}
            )
        if text_encoder and text_encoder.get("included"):
            assert encoder_folder is not None
            shutil.copytree(encoder_folder, temporary / text_encoder["name"])
        index = {
            "format": FORMAT,
            "version": __version__,
            "stages": [stage.name for stage in cascade.stages],
            "text_encoder": text_encoder,
        }
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return path


def read_model(path: str | Path) -> tuple[CascadeConfig, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(cascade, weights by stage and parameter name, content of model_index.json) of a model directory.

    Raises ValueError with one line if the folder is not a model directory, has another format or is damaged.
    """
    path = Path(path)
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"{path} is not a model directory: it has no model_index.json; "
            f"`fastimagen export` turns a run directory into a model directory"
        )
    index = read_json_object(path / "model_index.json")
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has format {index.get('format')!r}; this version reads {FORMAT!r}")
    stages = [
        validate(StageConfig, read_json_object(path / name / "config.json"), f"{path / name}/config.json")
        for name in index.get("stages", [])
    ]
    cascade = validate(CascadeConfig, {"stages": stages}, f"{path}/model_index.json")
    return cascade, {stage.name: read_safetensors(path / stage.name / "model.safetensors") for stage in stages}, index
