"""Export: the newest EMA weights of every stage of a run, as a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import CascadeConfig, Config, StageConfig
from ..config_file import load_config, validate
from ..files import read_safetensors
from ..presets import resolve
from ..sampling.model_directory import write_model
from .checkpoint import newest, read_state

CARD = """# {name}

A text-to-image cascade trained with fastimagen {version}.

| stage | size | parameters | steps |
| --- | --- | --- | --- |
{stages}

Text encoder: {encoder}

```
fastimagen sample --model . --captions "{caption}" --out samples
```
"""
RANDOM_FEATURES = (
    "the small built-in T5, included in full. Its weights are random: its embeddings distinguish words and their "
    "positions, which is enough for the captioned shapes and nothing else."
)


def export(run: str | Path, out: str | Path) -> Path:
    """Write the model directory of a run. Raises ValueError if a stage has no checkpoint or `out` is not empty."""
    run = Path(run)
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is not a run directory: it has no config.json")
    config = load_config(run / "config.json")
    stages, weights, rows = [], {}, []
    for name in [stage.name for stage in resolve(config.fastimagen.cascade).stages]:
        checkpoint = newest(run / "checkpoints" / name)
        if checkpoint is None:
            raise ValueError(f"{run}: stage {name} has no checkpoint yet; train it first")
        state = read_state(checkpoint)
        stages.append(validate(StageConfig, state["stage"], f"stage {name}"))
        weights[name] = read_safetensors(checkpoint / "ema.safetensors")
        millions = sum(weight.numel() for weight in weights[name].values()) / 1e6
        rows.append(f"| {name} | {stages[-1].size}x{stages[-1].size} | {millions:.2f} M | {state['step']} |")
    encoder, folder = _text_encoder(config)
    from .. import __version__

    card = CARD.format(
        name=run.name,
        version=__version__,
        stages="\n".join(rows),
        encoder=RANDOM_FEATURES if encoder["included"] else encoder["name"],
        caption="a large red circle in the center of a white background",
    )
    return write_model(
        Path(out), CascadeConfig(stages=tuple(stages)), weights, text_encoder=encoder, encoder_folder=folder, card=card
    )


def _text_encoder(config: Config) -> tuple[dict[str, Any], Path | None]:
    """The entry of model_index.json, and the folder to copy: the built-in encoder is included, others are
    referenced."""
    text = config.fastimagen.text
    folder = Path(text.encoder)
    included = config.fastimagen.data.shapes is not None and folder.is_dir()
    reference = {
        "name": "text_encoder" if included else text.encoder,
        "revision": text.revision,
        "max_length": text.max_length,
        "included": included,
    }
    return reference, folder if included else None
