"""Checkpoints of a stage: written aside, then renamed, so that one that has its name is complete.

``checkpoints/<stage>/step-00000500/`` holds DeepSpeed's own sharded files (``deepspeed/``), the EMA weights by
parameter name (``ema.safetensors``, fp32) and ``state.json``. Whatever lacks the name is a remnant and is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .ema import EMA
from .engine import gather_fp32, scatter_fp32

STEP_NAME = re.compile(r"step-(\d{8})")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name))


def newest(folder: Path) -> Path | None:
    """The checkpoint to resume from; None at the start."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, stage configuration, world size, running sums."""
    return json.loads((checkpoint / "state.json").read_text())


def save(folder: Path, engine: Any, ema: EMA, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of step state["step"], then drop all but the last `keep`. Every process calls it.

    Raises OSError on all processes when one of them cannot write (a full disk, say); nothing older is touched then.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".{final.name}.partial"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    problem = None
    with ema.swapped():
        average = gather_fp32(engine)
    try:
        engine.save_checkpoint(str(aside), tag="deepspeed", save_latest=False)
        if rank == 0:
            save_file(average, aside / "ema.safetensors", metadata={"format": "pt"})
            (aside / "state.json").write_text(json.dumps(state, indent=2))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        problem = error
    _fail_together(problem, aside)
    if rank == 0:
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync_folder(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, engine: Any, ema: EMA) -> dict[str, Any]:
    """Bring engine and EMA to the state of a checkpoint; returns its state. Every process calls it.

    Raises ValueError when it was written by another number of processes.
    """
    from safetensors.torch import load_file

    state = read_state(checkpoint)
    if state["world_size"] != dist.get_world_size():
        raise ValueError(
            f"{checkpoint} was written by {state['world_size']} processes, this run has "
            f"{dist.get_world_size()}: start as many, or start a new run from exported weights"
        )
    with ema.swapped():  # the shards stand for the average while its values come in by name
        scatter_fp32(engine, load_file(checkpoint / "ema.safetensors"))
    path, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
    if path is None:
        raise ValueError(f"{checkpoint} holds no DeepSpeed state")
    return state


def remove_incomplete(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for remnant in folder.glob(".step-*.partial"):
        shutil.rmtree(remnant)


def _fail_together(problem: Exception | None, aside: Path) -> None:
    """Raise on every process if one of them has a problem: nobody waits in a barrier for one that has gone."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, None if problem is None else str(problem).splitlines()[0])
    first = next((text for text in problems if text), None)
    if first is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {aside.parent}: {first}; older checkpoints are untouched") from problem


def _sync(folder: Path) -> None:
    """fsync every file below, so that the rename never becomes durable before the content."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
