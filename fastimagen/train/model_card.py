"""The model card: README.md of an exported model, with the front matter that the Hugging Face hub reads.

It names nothing that does not exist, whatever the cascade, and shows captions of the model's own data.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..config import CascadeConfig, FastimagenConfig
from ..data.shard import Reading
from ..data.shard_index import index_shard
from ..data.shards import list_shards
from ..data_config import DataConfig
from ..sizes import ImageSize
from ..text.t5 import T5_NAMES, is_random_encoder

NUM_EXAMPLES = 4
"""Captions that the card shows."""

CARD = """---
library_name: fastimagen
pipeline_tag: {task}
tags: [{tags}]
license: unknown
{widget}---

# {name}

{purpose} {made} with fastimagen {version}.
{grid}
| stage | size | parameters | steps | average of the weights |
| --- | --- | --- | --- | --- |
{stages}
{sampling}
Training data: {data}.

Text encoder: {encoder}.

The licence of the weights is not stated: set `license` at the top of this file before you share the model.

## Sample

In the folder of this file:

```bash
fastimagen sample --model . {inputs}
```
{examples}"""
RANDOM_FEATURES = (
    "the small built-in T5, included in full. Its weights are random: its embeddings distinguish words and their "
    "positions, which is enough for the captioned shapes and nothing else"
)


PURPOSES = {  # by the hub's names of tasks
    "text-to-image": "A text-to-image cascade",
    "unconditional-image-generation": "A cascade for images without captions,",
    "image-to-image": "A super-resolution cascade",
}


@dataclass(frozen=True)
class StageFacts:
    """What the card says about a stage."""

    name: str
    sizes: Sequence[ImageSize]
    parameters: int
    steps: int
    average: str
    """Of the weights over the steps: "decay 0.9999" (exponential) or "length 0.07" (power function)."""


def model_card(
    name: str,
    config: FastimagenConfig,
    cascade: CascadeConfig,
    stages: Sequence[StageFacts],
    *,
    includes_encoder: bool,
    has_grid: bool,
) -> str:
    """The text of README.md. includes_encoder: whether the model directory contains its text encoder."""
    from .. import __version__

    conditional = any(stage.unet.text_dim is not None for stage in cascade.stages)
    distill = config.train.distill
    enlarges = cascade.stages[0].unet.lowres
    captions = example_captions(config.data) if conditional else []
    task = "image-to-image" if enlarges else "text-to-image" if conditional else "unconditional-image-generation"
    inputs = ["--lowres", "small.png"] if enlarges else [] if conditional else ["--count", "4"]
    if conditional:
        inputs += ["--captions", *(captions[:1] or ["a photo"])]
    tags = ["imagen", "diffusion", task, *(["super-resolution"] if enlarges else [])]
    return CARD.format(
        task=task,
        tags=", ".join(tags),
        widget=_widget(captions) if has_grid else "",
        purpose=PURPOSES[task] if distill is None else f"A few-step student of `{Path(distill.model).name}`,",
        made="trained" if distill is None else "distilled",
        sampling="" if distill is None else _few_steps(cascade),
        name=name,
        version=__version__,
        grid="\n![sampled during training](samples.png)\n" if has_grid else "",
        stages="\n".join(
            f"| {stage.name} | {', '.join(map(str, stage.sizes))} | {stage.parameters / 1e6:.2f} M | {stage.steps} "
            f"| {stage.average} |"
            for stage in stages
        ),
        data=f"{'captioned images' if conditional else 'images'} from {_sources(config.data)}",
        encoder=_encoder(config.text.encoder, includes_encoder) if conditional else "none, it reads no captions",
        inputs=shlex.join(inputs),
        examples="".join(
            ["\nCaptions of its data:\n\n", *(f"* {caption}\n" for caption in captions)] if captions else []
        ),
    )


def _few_steps(cascade: CascadeConfig) -> str:
    """How a student samples: as it was trained, and not otherwise."""
    steps = ", ".join(f"{stage.name} in {stage.sampling.steps} steps of `ddim`" for stage in cascade.stages)
    return (
        f"\nIt samples {steps}, without guidance: its teacher's guidance and thresholding are part of what it learned. "
        f"These are its defaults; other samplers and guidance weights do not suit it.\n"
    )


def _widget(captions: Sequence[str]) -> str:
    """The grid of samples for the hub's page, which wants a text beside it; a JSON string is valid YAML."""
    text = json.dumps(captions[0] if captions else "samples", ensure_ascii=False)
    return f"widget:\n- text: {text}\n  output:\n    url: samples.png\n"


def _sources(data: DataConfig) -> str:
    """Where the training data came from, without what only the trainer's machine knows: paths, commands, passwords."""
    listed = [source.shards for source in data.training]
    sources = [path for shards in listed for path in ([shards] if isinstance(shards, str) else shards)]
    names = ", ".join(f"`{_public_name(path)}`" for path in sources)
    return f"{names} (the built-in captioned shapes)" if data.shapes else names


def _public_name(source: str) -> str:
    if source.startswith("pipe:"):
        return "a command"
    url = urlsplit(source)
    return f"{url.scheme}://{url.hostname}{url.path}" if url.hostname else Path(url.path).name


def _encoder(encoder: str, included: bool) -> str:
    if not included:
        return f"`{T5_NAMES.get(encoder, (encoder,))[0]}` from the Hugging Face hub, downloaded at first use"
    return RANDOM_FEATURES if is_random_encoder(encoder) else f"`{Path(encoder).name}`, included in full"


def example_captions(data: DataConfig) -> list[str]:
    """Up to NUM_EXAMPLES different captions of the validation data, else of the training data; [] if both are gone."""
    for source in reversed(data.data_sets):
        try:
            shard = index_shard(list_shards(source.shards)[0], Reading(source.caption_key))
            lines = (" ".join(shard.caption(row).split()) for row in range(min(len(shard), 100 * NUM_EXAMPLES)))
            return list(dict.fromkeys(lines))[:NUM_EXAMPLES]
        except (ValueError, OSError, IndexError):
            continue
    return []
