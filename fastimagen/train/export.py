"""Export: the newest EMA weights of every stage of a run, as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ..config import CascadeConfig, Config, StageConfig
from ..config_file import load_config, validate
from ..data.source import uses_text
from ..presets import resolve
from ..sampling.model_directory import write_model
from .checkpoint import newest, read_average, read_state
from .model_card import StageFacts, model_card


def export(run: str | Path, out: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> Path:
    """Write the model directory of a run, with weights of `dtype`.

    Raises ValueError if a stage has no checkpoint or `out` is not empty.
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is not a run directory: it has no config.json")
    config = load_config(run / "config.json")
    stages, weights, facts = [], {}, []
    for name in [stage.name for stage in resolve(config.fastimagen.cascade).stages]:
        checkpoint = newest(run / "checkpoints" / name)
        if checkpoint is None:
            raise ValueError(f"{run}: stage {name} has no checkpoint yet; train it first")
        state = read_state(checkpoint)
        stages.append(validate(StageConfig, state["stage"], f"stage {name}"))
        weights[name] = read_average(checkpoint)
        parameters = sum(weight.numel() for weight in weights[name].values())
        facts.append(StageFacts(name, stages[-1].size, parameters, state["step"]))
    cascade = CascadeConfig(stages=tuple(stages))
    encoder, folder = _text_encoder(config) if uses_text(config.fastimagen) else (None, None)
    grid = _newest_grid(run / "samples" / stages[-1].name)
    return write_model(
        Path(out),
        cascade,
        weights,
        text_encoder=encoder,
        encoder_folder=folder,
        card=model_card(
            run.name,
            config.fastimagen,
            cascade,
            facts,
            includes_encoder=folder is not None,
            has_grid=grid is not None,
        ),
        grid=grid,
        dtype=getattr(torch, dtype),
    )


def _newest_grid(folder: Path) -> Path | None:
    """The last grid of images that training sampled; None if there is none."""
    grids = sorted(folder.glob("step-*.png"))
    return grids[-1] if grids else None


def _text_encoder(config: Config) -> tuple[dict[str, Any], Path | None]:
    """The entry of model_index.json, and the folder to copy: a local encoder is included, so that the model works on
    another machine; one from the hub is named."""
    text = config.fastimagen.text
    folder = Path(text.encoder)
    included = folder.is_dir()
    reference = {
        "name": "text_encoder" if included else text.encoder,
        "revision": text.revision,
        "max_length": text.max_length,
        "included": included,
    }
    return reference, folder if included else None
