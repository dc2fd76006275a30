"""An average of any length, made of the snapshots and checkpoints of a trained stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .power_average import QUANTITIES, Source, combine
from .snapshots import snapshots

MAX_ERROR = 0.1
"""Largest error of a reconstructed density, as a share of its norm: about that of a length that is wrong by 10 %."""


def average_of_length(path: Path, sigma_rel: float, say: Callable[[str], object]) -> tuple[dict[str, Tensor], str]:
    """The weights at a checkpoint averaged with length sigma_rel, by parameter name, fp32, and how they were made.

    say: gets a line for each damaged snapshot, which is left out. Raises ValueError if the length is out of range, or
    if what there is does not give it to MAX_ERROR.
    """
    shapes, target = checkpoint.read_shapes(path), Source(_updates(path), sigma_rel)
    if target.updates < 1:
        raise ValueError(f"{path}: all steps so far were skipped, so that there is no average of length {sigma_rel:g}")
    if sigma_rel in QUANTITIES:
        return checkpoint.read_average(path, QUANTITIES[sigma_rel]), f"length {sigma_rel:g}"
    places = _places(path, say)
    sources = [Source(updates, length) for updates in places for length in QUANTITIES]
    factors, error = combine(sources, target)
    if error > MAX_ERROR:
        raise ValueError(
            f"{path}: an average of length {sigma_rel:g} cannot be made of {len(places)} snapshots: its density would "
            f"be wrong by {error:.0%} of its norm, at most {MAX_ERROR:.0%} is accepted. Choose a length from "
            f"{_range(sources, target.updates)}; train with a smaller train.checkpoint_every for a wider range"
        )
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for source, factor in zip(sources, factors):
        for name, values in checkpoint.read_average(places[source.updates], QUANTITIES[source.sigma_rel]).items():
            sums[name].add_(values, alpha=factor)
    description = f"length {sigma_rel:g} of {len(places)} snapshots, density to {error:.1%}"
    return {name: values.float() for name, values in sums.items()}, description


def _places(path: Path, say: Callable[[str], object]) -> dict[int, Path]:
    """The intact snapshots and checkpoints up to `path`, by the number of updates."""
    places = {}
    for place in [*snapshots(path.parent), *checkpoint.checkpoints(path.parent)]:
        if place != path and (problem := checkpoint.damage(place)) is not None:
            say(f"{place} is damaged: {problem}; left out of the average")
            continue
        updates = _updates(place)
        if place == path or 0 < updates < _updates(path):
            places[updates] = place
    return places


def _updates(path: Path) -> int:
    """The optimizer steps that an average has seen: skipped ones do not count."""
    updates: int = checkpoint.read_state(path)["step"] - checkpoint.read_engine(path)["skipped_steps"]
    return updates


def _range(sources: list[Source], updates: int) -> str:
    """The lengths that can be made of the sources, such as "0.04 to 0.13"."""
    lengths = [length / 100 for length in range(1, 29)]
    possible = [length for length in lengths if combine(sources, Source(updates, length))[1] <= MAX_ERROR]
    return f"{possible[0]:g} to {possible[-1]:g}"
