"""Which checkpoints of a stage are kept, and the snapshots that remain of the others.

A snapshot, ``checkpoints/STAGE/snapshot-00000500/``, is a checkpoint without everything but its power-function averages
(power_average.py): 8 bytes for each weight. It has the format of a checkpoint and its index; nothing resumes from it.
At most MAX_SNAPSHOTS are kept, spread evenly over the training so far.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..files import sync
from . import checkpoint
from .checkpoint import AVERAGES, ENGINE, INDEX, STATE

MAX_SNAPSHOTS = 8
"""More would be more accurate: 8 give a length between the two tracked ones to 1 %, 12 to 0.6 % (docs/notes.md)."""
SNAPSHOT_NAME = re.compile(r"snapshot-(\d{8})")


def snapshots(folder: Path) -> list[Path]:
    """The snapshots of a stage, oldest first."""
    return sorted(path for path in folder.glob("snapshot-*") if SNAPSHOT_NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint or a snapshot, by its name."""
    return int(path.name[-8:])


def rotate(folder: Path, keep: int, keep_every: int | None) -> list[str]:
    """Keep the last `keep` checkpoints, those of multiples of `keep_every` steps and the best; make the others
    snapshots.

    Returns a line for each damaged one, which is put aside. Raises OSError if something cannot be written or removed.
    """
    found, damaged = checkpoint.checkpoints(folder), []
    kept = {*found[-keep:], checkpoint.best(folder)}
    for path in found:
        if path in kept or (keep_every and step_of(path) % keep_every == 0):
            continue
        try:
            averages = [name for name in checkpoint.read_index(path) if name.endswith(AVERAGES)]
        except ValueError as error:
            damaged.append(f"{error}; renamed to {checkpoint.set_aside(path).name}, delete it when you like")
            continue
        assert averages, f"{path} has no power-function averages"
        reduced = path.with_name(f".{path.name}.reduced")
        path.rename(reduced)
        _finish(reduced)
    _thin(folder)
    return damaged


def clean(folder: Path) -> None:
    """Complete the snapshots that a kill interrupted, and remove incomplete checkpoints.

    Raises OSError if that cannot be done, ValueError if an interrupted snapshot is damaged.
    """
    for reduced in folder.glob(".step-*.reduced"):
        _finish(reduced)
    checkpoint.remove_incomplete(folder)


def _finish(reduced: Path) -> None:
    """Make a snapshot of a renamed checkpoint. At a kill in the middle, the next start calls it again."""
    step = step_of(reduced.with_suffix(""))
    files = {
        name: entry
        for name, entry in checkpoint.read_index(reduced).items()
        if name.endswith(AVERAGES) or name in (ENGINE, STATE)
    }
    for path in reduced.iterdir():
        if path.name not in files and path.name != INDEX:
            path.unlink()
    checkpoint.write_index(reduced, files)
    final = reduced.with_name(f"snapshot-{step:08d}")
    if final.exists():
        shutil.rmtree(final)
    reduced.rename(final)
    sync(final.parent)


def remove_later(folder: Path, step: int) -> None:
    """Remove the snapshots after `step`, from which a run resumes: their weights are not those of the run any more."""
    for path in snapshots(folder):
        if step_of(path) > step:
            _remove(path)


def _thin(folder: Path) -> None:
    """Remove the snapshots that leave the smallest gaps between the others, checkpoints, and the start."""
    found = snapshots(folder)
    while len(found) > MAX_SNAPSHOTS:
        steps = sorted({0, *map(step_of, found), *map(step_of, checkpoint.checkpoints(folder))})

        def gap(path: Path, steps: list[int] = steps) -> int:
            index = steps.index(step_of(path))
            return steps[index + 1] - steps[index - 1]

        narrowest = min(found, key=gap)
        found.remove(narrowest)
        _remove(narrowest)


def _remove(snapshot: Path) -> None:
    """Remove a snapshot. At a kill in the middle, what is left is removed like an incomplete checkpoint."""
    going = snapshot.with_name(f".step-{snapshot.name[-8:]}.snapshot.partial")
    shutil.rmtree(going, ignore_errors=True)
    snapshot.rename(going)
    shutil.rmtree(going)
