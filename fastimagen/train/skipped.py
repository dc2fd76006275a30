"""Why a step was skipped, and which samples caused it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..data.batch import Origin
from ..data.loader import Loader

MAX_NAMED = 8
"""Samples that a report names."""

BAD_TEXT, BAD_LOSS, BAD_GRADIENT = "non-finite text embeddings", "non-finite loss", "non-finite gradient"
SCALE_SEARCH = "fp16 gradients overflow"


class Skipped(NamedTuple):
    """The reason, the samples that caused it on all ranks, as '"KEY" of SHARD', and the fp16 loss scale."""

    reason: str
    samples: list[str]
    loss_scale: float | None

    @property
    def diverges(self) -> bool:
        """Whether it counts for train.max_nonfinite. A dynamic loss scale is halved by overflows until it fits."""
        return self.reason != SCALE_SEARCH

    def advice(self) -> str:
        """What to do if this does not end."""
        if self.reason == BAD_TEXT:
            return "delete the embedding caches of these shards and run fastimagen embed again"
        return "lower the learning rate, or check the data"

    def values(self) -> dict[str, Any]:
        """For the record of the step."""
        values: dict[str, Any] = {"skipped": self.reason, "samples": self.samples[:MAX_NAMED]}
        values |= {"samples_total": len(self.samples)} if len(self.samples) > MAX_NAMED else {}
        return values if self.loss_scale is None else {**values, "loss_scale": self.loss_scale}

    def __str__(self) -> str:
        line = self.reason
        if self.loss_scale is not None:
            line += f", the loss scale is now {self.loss_scale:g}"
        if self.samples:
            more = f" and {len(self.samples) - MAX_NAMED} more" if len(self.samples) > MAX_NAMED else ""
            line += f": {', '.join(self.samples[:MAX_NAMED])}{more}"
        return line


def explain_skipped(batches: Sequence[tuple[Sequence[Origin], Tensor]], loader: Loader, engine: Any) -> Skipped:
    """Why a step was skipped, from the samples and losses (B,) of its micro-batches on this rank. All ranks call it.

    The images are bytes, so that only embeddings and the network can be the cause of a loss that is not finite.
    """
    found: tuple[list[str], list[str]] = ([], [])  # samples with bad embeddings, other samples with a bad loss
    for origins, losses in batches:
        for index in (~losses.isfinite()).nonzero().flatten().tolist():
            origin = origins[index]
            found[loader.has_finite_text(origin)].append(loader.describe(origin))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    bad_text, bad_loss = ([sample for part in everywhere for sample in part[kind]] for kind in (0, 1))
    if bad_text:
        return Skipped(BAD_TEXT, bad_text, None)
    if bad_loss:
        return Skipped(BAD_LOSS, bad_loss, None)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        return Skipped(SCALE_SEARCH, [], float(engine._get_optimizer_loss_scale()))
    return Skipped(BAD_GRADIENT, [], None)
