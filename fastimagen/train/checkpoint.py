"""Checkpoints of a stage, written to a temporary folder and renamed: a checkpoint with its final name is complete.

``checkpoints/<stage>/step-00000500/`` contains DeepSpeed's sharded files (``deepspeed/``), the EMA weights by parameter
name (``ema.safetensors``, fp32) and ``state.json``. Folders with another name are incomplete checkpoints.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..files import first_line, read_json_object, sync

STEP_NAME = re.compile(r"step-(\d{8})")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name))


def newest(folder: Path) -> Path | None:
    """The checkpoint to resume from; None at the start."""
    found = checkpoints(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, stage configuration, world size, averages since the last record."""
    return read_json_object(checkpoint / "state.json")


def save(folder: Path, engine: Any, average: dict[str, Tensor] | None, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of step state["step"], then remove all but the last `keep`. All ranks call it.

    average: the EMA weights by parameter name, fp32, on the CPU; needed on rank 0 only.
    Raises OSError on all ranks if one of them cannot write, for example because the disk is full; older checkpoints are
    then kept.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{state['step']:08d}"
    temporary = folder / f".{final.name}.partial"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    problem = None
    try:
        engine.save_checkpoint(str(temporary), tag="deepspeed", save_latest=False)
        if average is not None:
            save_file(average, temporary / "ema.safetensors", metadata={"format": "pt"})
            (temporary / "state.json").write_text(json.dumps(state, indent=2))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        problem = error
    _fail_together(problem, temporary)
    if rank == 0:
        _sync_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, engine: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the engine from a checkpoint; returns state.json and the EMA weights by name. All ranks call it.

    Raises ValueError if another number of processes wrote it.
    """
    from safetensors.torch import load_file

    state = read_state(checkpoint)
    if state["world_size"] != dist.get_world_size():
        raise ValueError(
            f"{checkpoint} was written by {state['world_size']} processes, this run has "
            f"{dist.get_world_size()}: start the same number, or start a new run from exported weights "
            f"(train.stages.NAME.init_from)"
        )
    path, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed")
    if path is None:
        raise ValueError(f"{checkpoint} contains no DeepSpeed state")
    return state, load_file(checkpoint / "ema.safetensors")


def remove_incomplete(folder: Path) -> None:
    """Remove the incomplete checkpoints that interrupted saves left."""
    for incomplete in folder.glob(".step-*.partial"):
        shutil.rmtree(incomplete)


def _fail_together(problem: Exception | None, temporary: Path) -> None:
    """Raise OSError on all ranks if one of them has a problem, so that none waits in a barrier."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, None if problem is None else first_line(problem))
    first = next((text for text in problems if text), None)
    if first is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {temporary.parent}: {first}; older checkpoints are untouched"
        ) from problem


def _sync_tree(folder: Path) -> None:
    """fsync everything in a folder: the content must be on the disk before the rename is."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
