"""What a run will see: counts, sizes, captions, and a contact sheet. `fastimagen info --data` prints and draws it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config import FastimagenConfig, StageConfig
from ..files import first_line
from ..images import grid
from ..seeds import mix_seed
from ..sizes import ImageSize
from ..text.t5 import load_tokens
from ..words import counted
from .buckets import BucketOrder, bucket_numbers, bucket_sizes
from .image_header import image_size
from .listed import ListedShard
from .source import Split, uses_text
from .survey import MAX_HEADERS, spread_samples

MAX_CAPTIONS = 10_000
"""Captions that are looked at, evenly spread over all."""

SHEET_IMAGES = 16
"""Images of a contact sheet: those of the first positions of training."""

SHEET_SIZE = 256
"""Side of the images of a contact sheet of shards without a configuration."""

ASPECTS = ((1, 3), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (3, 1))
"""Width and height in proportion; an image counts for the nearest."""


def describe_data(
    train: Split, validation: Split | None, config: FastimagenConfig, stages: Sequence[StageConfig]
) -> list[str]:
    """The lines about training data, one for each data set of a mixture, and validation data.

    Sizes are those of MAX_HEADERS images, lengths those of MAX_CAPTIONS captions. stages: none for shards alone, whose
    text encoder is not known.
    """
    lines, shards = [], iter(train.shards)
    for part, heading in zip(train.mixture, train.describe_mixture()):
        lines += [heading, *_describe(list(islice(shards, part.shards)), config, stages)]
    if not train.mixture:
        lines += ["training", *_describe(train.shards, config, stages)]
    if train.held_out:
        lines.append(f"validation: {train.held_out} of these samples, held out")
    elif validation is not None:
        lines += ["validation", *_describe(validation.shards, config, stages)]
    else:
        lines.append("validation: none")
    return lines


def contact_sheet(train: Split, config: FastimagenConfig, stage: StageConfig | None) -> Image.Image:
    """The images of the first positions of a stage's training as the network gets them, with their captions; with
    buckets the first of each.

    stage: None shows the central squares. Raises ValueError as Loader does.
    """
    size, crop = (SHEET_SIZE, None) if stage is None else (stage.size, stage.crop)
    buckets = bucket_sizes(config, stage) if stage else []
    count, seed = max(1, min(SHEET_IMAGES // max(1, len(buckets)), len(train))), config.train.seed
    loader = train.loader(
        config,
        size=size,
        buckets=buckets,
        crop=crop,
        global_batch=count,
        micro_batch=count,
        rank=0,
        world_size=1,
        seed=seed,
        crop_seed=mix_seed(seed, stage.name if stage else "", "crops"),
    )
    starts = [0] if not isinstance(loader.order, BucketOrder) else loader.order.first_batches()
    shown, captions = [], []
    for start in starts:
        batches = loader.batches(start)
        batch = next(batches)
        batches.close()
        shown += list(batch.images_for(torch.device("cpu")))
        captions += loader.captions(batch)
    return grid(_on_one_size(shown), captions)


def _on_one_size(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (C, H, W) of several sizes in the middle of white ones of the largest sides: (B, C, H, W)."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = torch.ones(len(images), images[0].shape[0], height, width)
    for whole, image in zip(padded, images):
        top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        whole[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return padded


def _describe(shards: Sequence[ListedShard], config: FastimagenConfig, stages: Sequence[StageConfig]) -> list[str]:
    """The lines about one data set."""
    excluded: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    for shard in shards:
        excluded.update(shard.excluded)
        filtered.update(shard.filtered)
    rows = [("samples", f"{sum(map(len, shards))} in {counted(len(shards), 'shard')}")]
    rows += [("excluded", _counts(excluded))] if excluded else []
    rows += [("filtered", _counts(filtered))] if filtered else []
    looked_at = spread_samples(shards, MAX_HEADERS)
    sizes = [size for shard, index in looked_at if (size := image_size(partial(shard.image, index)))]
    if len(sizes) < len(looked_at):
        rows.append(("not an image", f"{len(looked_at) - len(sizes)} of {len(looked_at)} looked at"))
    if sizes:
        rows += _describe_sizes(np.array(sizes, dtype=np.float64), config, stages)
    if config.data.buckets and stages:
        rows.append(("buckets", _describe_buckets(shards, bucket_sizes(config, stages[0]))))
    chosen = spread_samples(shards, MAX_CAPTIONS)
    captions = [caption for shard, index in chosen for caption in shard.captions_of(index)]
    rows += _describe_captions(captions)
    rows += _describe_tokens(captions, config) if stages else []
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _describe_sizes(
    sizes: np.ndarray, config: FastimagenConfig, stages: Sequence[StageConfig]
) -> list[tuple[str, str]]:
    """Rows about images of these sizes, (n, 2): width, height."""
    shorter, aspect = sizes.min(axis=1), sizes[:, 0] / sizes[:, 1]  # (n,), (n,)
    rows = [("shorter side", f"{_quantiles(shorter)} pixels")]
    for stage in stages:
        buckets = bucket_sizes(config, stage)
        fitted = buckets or [ImageSize.of(stage.size)]
        wanted = np.array([(size.width, size.height) for size in fitted])[bucket_numbers(sizes, fitted)]  # (n, 2)
        if share := float((sizes < wanted).any(axis=1).mean()):
            than = "the size of their bucket" if buckets else f"its {stage.size} pixels"
            rows.append((f"  {stage.name}", f"{share:.1%} are smaller than {than} and enlarged"))
    logarithms = np.log([width / height for width, height in ASPECTS])
    nearest = np.abs(np.log(aspect)[:, None] - logarithms).argmin(axis=1)  # (n,)
    shares = np.bincount(nearest, minlength=len(ASPECTS)) / len(aspect)
    parts = [f"{width}:{height} {share:.1%}" for (width, height), share in zip(ASPECTS, shares) if share]
    rows.append(("width to height", f"about {', '.join(parts)}"))
    kept = float((shorter / sizes.max(axis=1)).mean())
    rows.append(("central square", f"{'would keep' if config.data.buckets else 'keeps'} {kept:.1%} of the area"))
    return rows


def _describe_buckets(shards: Sequence[ListedShard], buckets: Sequence[ImageSize]) -> str:
    """The samples of each bucket, of all, and what the buckets keep of the images."""
    counts, kept, images = np.zeros(len(buckets), dtype=np.int64), 0.0, 0
    shapes = np.array([size.width / size.height for size in buckets])  # (buckets,)
    for shard in shards:
        sizes = shard.image_sizes  # (S, 2)
        numbers = bucket_numbers(sizes, buckets)
        counts += np.bincount(numbers, minlength=len(buckets))
        known = sizes.all(axis=1)
        ratio = sizes[known, 0] / sizes[known, 1] / shapes[numbers[known]]
        kept, images = kept + float(np.minimum(ratio, 1 / ratio).sum()), images + int(known.sum())
    listed = ", ".join(f"{size} {count / max(1, counts.sum()):.1%}" for size, count in zip(buckets, counts.tolist()))
    return f"{listed}; they keep {kept / max(1, images):.1%} of the area"


def _describe_captions(captions: Sequence[str]) -> list[tuple[str, str]]:
    if not captions:
        return []
    empty, distinct = sum(not caption.strip() for caption in captions), len({*captions})
    characters = f"{_quantiles([len(caption) for caption in captions])} characters"
    return [("captions", f"{characters}; {empty} empty, {len(captions) - distinct} repeated, of {len(captions)}")]


def _describe_tokens(captions: Sequence[str], config: FastimagenConfig) -> list[tuple[str, str]]:
    """What the tokenizer of the text encoder makes of captions."""
    text = config.text
    if not captions or not uses_text(config):
        return [("tokens", "none: no stage is conditioned on text")]
    try:
        tokens = load_tokens(text.encoder, revision=text.revision, max_length=text.max_length, encoding=text.encoding)
    except (ValueError, ImportError) as error:
        return [("tokens", f"not counted: {first_line(error)}")]
    lengths = np.array(tokens.lengths(captions))
    unreadable = tokens.unreadable(captions)
    cut = int((lengths > text.max_length).sum())
    shown = f", such as {unreadable[0]!r:.60}" if unreadable else ""
    return [
        ("tokens", f"{_quantiles(lengths)}, on average {lengths.mean():.1f}; {cut} cut to {text.max_length}"),
        ("unknown tokens", f"in {len(unreadable)}{shown}"),
    ]


def _quantiles(values: Iterable[float]) -> str:
    """The range of values, with their middle."""
    low, tenth, middle, ninety, high = np.quantile(np.array(list(values)), [0, 0.1, 0.5, 0.9, 1]).tolist()
    if low == high:
        return f"{low:g}"
    return f"{low:g} to {high:g}, median {middle:g}, 80% between {tenth:g} and {ninety:g}"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def sheet_path(out: Path, stage: StageConfig | None) -> Path:
    """The file of a stage's contact sheet: data.png becomes data-base.png."""
    return out if stage is None else out.with_name(f"{out.stem}-{stage.name}{out.suffix}")
