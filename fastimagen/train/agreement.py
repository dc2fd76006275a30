"""Agreement of the ranks before the first step: one run directory that all see, one intact checkpoint to resume from.

Every error here is raised on all ranks, so that none waits for the others.
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from ..files import first_line
from . import checkpoint

T = TypeVar("T")

VISIBLE_AFTER = 5.0
"""Seconds until a file that rank 0 made must be visible on every host. NFS caches for 3 s that a file is missing."""


def on_first_rank(work: Callable[[], T]) -> T | None:
    """What `work` returns on rank 0; None on the others. Its ValueError or OSError is raised on all ranks."""
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as raised:
            error = raised
    problem = [None if error is None else (isinstance(error, OSError), str(error))]
    dist.broadcast_object_list(problem, src=0)
    if error is not None:
        raise error
    if problem[0] is not None:
        is_os_error, line = problem[0]
        raise (OSError if is_os_error else ValueError)(line)
    return result


def decide_on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on all ranks. Raises as `on_first_rank`."""
    result = [on_first_rank(work)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]  # rank 0's


def agree_on_samples(samples: str) -> None:
    """Raise ValueError on all ranks if they do not have the same samples. samples: describes those of this rank.

    A host that cannot read a shard would otherwise train in another order.
    """
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, samples)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"the data differ between the processes: process 0 has {found[0]}, process {rank} has {other}; check "
                f"that every host reads the same shards, and rerun to resume"
            )


def agree_on_run_directory(run_dir: Path) -> str:
    """Check that all ranks see, and can write to, the folder that rank 0 calls `run_dir`. Returns a token: random, the
    same on all ranks. The folder must exist on rank 0.

    Raises ValueError on all ranks if it is not shared.
    """
    first = [uuid.uuid4().hex[:12], socket.gethostname()]
    dist.broadcast_object_list(first, src=0)
    token, first_host = first
    probe = run_dir / f".shared-{token}"
    on_first_rank(lambda: probe.write_text(token))
    problem = None
    try:
        if not _appears(probe, token):
            problem = (
                f"the run directory {run_dir} is not shared: rank {dist.get_rank()} on {socket.gethostname()} does not "
                f"see what rank 0 on {first_host} wrote; put --run-dir on a file system that all hosts mount"
            )
        elif dist.get_rank():
            own = run_dir / f"{probe.name}-{dist.get_rank()}"
            own.touch()
            own.unlink()
    except OSError as error:
        problem = f"rank {dist.get_rank()} on {socket.gethostname()} cannot use the run directory: {error}"
    try:
        raise_together(problem)
    finally:
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # it is empty but for the token
                probe.unlink()
    return token


def agree_on_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a stage, and a line for each newer one that is damaged and was set aside.

    Every rank checks a share of the files of each candidate. Raises ValueError on all ranks if all checkpoints are
    damaged, which then keep their names, or if one is of an earlier format.
    """
    names = [[path.name for path in reversed(checkpoint.checkpoints(folder))]]
    dist.broadcast_object_list(names, src=0)
    damaged: dict[str, str] = {}
    for name in names[0]:
        problem = _damage(folder / name)
        if problem is not None:
            damaged[name] = problem
            continue
        on_first_rank(lambda: [checkpoint.set_aside(folder / name) for name in damaged])
        return folder / name, [
            f"{name} is damaged: {problem}; it is kept as {folder}/damaged-{name}, delete it when you are done with it"
            for name, problem in damaged.items()
        ]
    if damaged:
        raise checkpoint.none_intact(folder, damaged)
    return None, []


def raise_together(problem: str | None) -> None:
    """Raise ValueError on all ranks if any has a problem: the first one by rank."""
    first = first_of_ranks(problem)
    if first is not None:
        raise ValueError(first)


def _damage(candidate: Path) -> str | None:
    """What is wrong with a checkpoint, the same answer on all ranks. Raises ValueError on all as `damage` does."""
    refusal, problem = None, None
    try:
        problem = checkpoint.damage(candidate, dist.get_rank(), dist.get_world_size())
    except ValueError as error:
        refusal = first_line(error)
    raise_together(refusal)
    return first_of_ranks(problem)


def first_of_ranks(line: str | None) -> str | None:
    """The first line that any rank has, by rank. All ranks call it."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, line)
    return next((text for text in found if text is not None), None)


def _appears(path: Path, content: str) -> bool:
    """Whether a file has the content, or gets it soon."""
    until = time.monotonic() + VISIBLE_AFTER
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
