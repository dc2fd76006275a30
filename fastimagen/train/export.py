"""Export: the newest EMA weights of every stage of a run, as a model directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..config import CascadeConfig, Config, StageConfig
from ..config_file import load_config, validate
from ..data.shards import index_shard, list_shards
from ..data.source import shard_sources, uses_text
from ..files import read_safetensors
from ..presets import resolve
from ..sampling.model_directory import write_model
from ..text.t5 import is_random_encoder
from .checkpoint import newest, read_state

CARD = """---
library_name: fastimagen
pipeline_tag: {task}
tags: [imagen, diffusion, {task}]
license: unknown
---

# {name}

{purpose} trained with fastimagen {version}.
{grid}
| stage | size | parameters | steps |
| --- | --- | --- | --- |
{stages}

Training data: {data}

Text encoder: {encoder}

```
fastimagen sample --model . {inputs} --out samples
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
    cascade = CascadeConfig(stages=tuple(stages))
    encoder, folder = _text_encoder(config) if uses_text(config.fastimagen) else (None, None)
    grid = _newest_grid(run / "samples" / stages[-1].name)
    return write_model(
        Path(out),
        cascade,
        weights,
        text_encoder=encoder,
        encoder_folder=folder,
        card=_card(run.name, config, rows, encoder, has_grid=grid is not None),
        grid=grid,
    )


def _card(name: str, config: Config, rows: list[str], encoder: dict[str, Any] | None, *, has_grid: bool) -> str:
    """The model card. It names nothing that does not exist, and gives an example caption from the model's own data."""
    from .. import __version__

    data = config.fastimagen.data
    shards = data.shards if isinstance(data.shards, str) else ", ".join(data.shards)
    if encoder is None:
        described, inputs = "none, the cascade reads no captions", "--count 4"
    else:
        included = "included in full" if encoder["included"] else "not included"
        described = f"{config.fastimagen.text.encoder}, {included}"
        if encoder["included"] and is_random_encoder(config.fastimagen.text.encoder):
            described = RANDOM_FEATURES
        inputs = f"--captions {shlex.quote(_example_caption(config))}"
    return CARD.format(
        task="unconditional-image-generation" if encoder is None else "text-to-image",
        purpose="A cascade for images without captions," if encoder is None else "A text-to-image cascade",
        name=name,
        version=__version__,
        grid="\n![sampled during training](samples.png)\n" if has_grid else "",
        stages="\n".join(rows),
        data=f"{shards} (the built-in captioned shapes)" if data.shapes else shards,
        encoder=described,
        inputs=inputs,
    )


def _example_caption(config: Config) -> str:
    """The first caption of the validation data, or of the training data; "a photo" if neither is here any more."""
    for source in reversed(shard_sources(config.fastimagen.data)):
        try:
            return " ".join(index_shard(list_shards(source)[0]).caption(0).split())
        except (ValueError, OSError, IndexError):
            continue
    return "a photo"


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
