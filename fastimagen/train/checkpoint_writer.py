"""Saves checkpoints while training continues: a save takes as long as the copy to host memory.

A thread of each rank writes that copy and reports by file. The thread of rank 0 waits for the reports of all ranks;
only then does the checkpoint get its final name. No collective operation takes part in a save. One save is written at a
time: the next one waits for it.

A save that fails on any rank is given up and training continues: rank 0 has one line about it, and counts it. Only the
last save of a stage must succeed (`finish`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..files import first_line
from . import checkpoint, snapshots
from .ema import EMA
from .engine_state import Quantity, counters, take
from .flat_weights import FlatWeights
from .fragments import named_fragments

PATIENCE = 60.0
"""Seconds in which no file of a checkpoint grows, after which rank 0 gives up waiting for the other ranks. Network file
systems show the files of other hosts up to 60 s late only where nothing else changes in their folder."""
LAST_PATIENCE = 10.0
"""The same after an error, when other ranks may have died."""


class CheckpointWriter:
    """Writes the checkpoints of one stage into `folder`.

    token: the same on all ranks, another one after each start. failures: saves that have failed so far; only rank 0
    knows.
    """

    def __init__(self, folder: Path, token: str, *, keep: int, keep_every: int | None) -> None:
        self.folder, self.token, self.keep, self.keep_every = folder, token, keep, keep_every
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hosts: list[str] = [""] * self.world_size
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._buffers: dict[int, Tensor] = {}
        self._problem: str | None = None  # of the last save
        self._unsaid: str | None = None
        self._bug: BaseException | None = None
        self._patience = PATIENCE

    def save(self, engine: Any, weights: FlatWeights, ema: EMA, state: dict[str, Any]) -> None:
        """Start to save the checkpoint of step state["step"]. All ranks call it; `state` matters on rank 0 only."""
        self._join()
        copies = self._copy_to_host(take(engine, weights, ema))
        shapes = {name: list(shape) for name, shape in weights.shapes.items()}
        about = {"parameters": shapes, **counters(engine)}
        self._thread = threading.Thread(target=self._write, args=(copies, about, state), daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """One line about a save that has failed, once."""
        line, self._unsaid = self._unsaid, None
        return line

    def finish(self) -> None:
        """Wait until the last save is complete. Raises OSError on all ranks if it failed. All ranks call it."""
        self._join()
        problem = [self._problem]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise OSError(f"{problem[0]}; rerun the command to resume from the checkpoint before it")

    def close(self) -> None:
        """Wait for the save in flight, also if training has failed; other ranks may have died."""
        self._patience = LAST_PATIENCE
        if self._thread is not None:
            self._thread.join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    @torch.no_grad()
    def _copy_to_host(self, quantities: list[Quantity]) -> list[Quantity]:
        """The same with copies of the values, in buffers that the next save uses again. On a GPU the copies run one
        after the other without the host, which waits once."""
        copies = []
        for number, (name, values, fragments) in enumerate(quantities):
            buffer = self._buffers.get(number)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
                self._buffers[number] = buffer
            buffer.copy_(values, non_blocking=True)
            copies.append(Quantity(name, buffer, fragments))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    # ---- in the thread

    def _write(self, copies: list[Quantity], about: dict[str, Any], state: dict[str, Any]) -> None:
        incomplete = self.folder / checkpoint.incomplete_name(state["step"], self.token)
        self._problem = None
        try:
            problem = None
            tensors: dict[str, Tensor] = {}
            for name, values, fragments in copies:
                tensors |= named_fragments(name, values, fragments)
            try:
                checkpoint.write_rank(incomplete, self.rank, tensors)
            except OSError as error:
                problem = first_line(error).replace(f"{incomplete}/", "")
                _report_failure(incomplete, self.rank, problem)
                problem = self._of_rank(problem, self.rank)
            if self.rank == 0:
                self._complete(incomplete, problem, about, state)
        except BaseException as error:  # a mistake of ours: the next call of the loop raises it
            self._bug = error

    def _complete(self, incomplete: Path, problem: str | None, about: dict[str, Any], state: dict[str, Any]) -> None:
        """On rank 0: wait for all ranks, make it a checkpoint, remove those that are not kept. problem: its own."""
        try:
            self._wait_for_ranks(incomplete, problem)
            checkpoint.complete(incomplete, self.world_size, about, state)
        except (OSError, ValueError) as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            self.failures += 1
            line = f"cannot write the checkpoint of step {state['step']} in {self.folder}"
            self._problem = f"{line}: {first_line(error)}"
            self._unsaid = f"{self._problem}; training continues, and earlier checkpoints are intact"
            return
        try:
            if damaged := snapshots.rotate(self.folder, self.keep, self.keep_every):
                self._unsaid = "; ".join(damaged)
        except OSError as error:
            self._unsaid = f"cannot remove old checkpoints in {self.folder}: {first_line(error)}"

    def _wait_for_ranks(self, incomplete: Path, problem: str | None) -> None:
        """Return when all ranks have reported. Raises OSError if one failed, or if nothing happens any more."""
        everyone = set(range(self.world_size)) if problem is None else set(range(1, self.world_size))
        seen: dict[str, int] = {}
        since, pause = time.monotonic(), 0.002
        while True:
            failed = sorted(incomplete.glob("rank-*.failed"))
            missing = (
                everyone - checkpoint.reported(incomplete, self.world_size) - {int(path.stem[5:]) for path in failed}
            )
            if not missing:
                break
            sizes = {entry.name: _size(entry) for entry in os.scandir(incomplete)} if incomplete.exists() else {}
            if sizes != seen:
                seen, since = sizes, time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise OSError(problem or f"no report of ranks {sorted(missing)[:8]} within {self._patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if problem is None and failed:
            problem = self._of_rank(_read_report(failed[0]), int(failed[0].stem[5:]))
        if problem is not None:
            raise OSError(problem)

    def _of_rank(self, problem: str, rank: int) -> str:
        return f"{problem} (rank {rank}, {self.hosts[rank]})"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # renamed since it was listed
        return -1


def _report_failure(incomplete: Path, rank: int, reason: str) -> None:
    """Tell rank 0 by file. If not even an empty file can be made, rank 0 notices that nothing happens any more.

    A full disk may take an empty file, or the beginning of the reason, which ends in a line break where it is whole.
    """
    path = incomplete / f"rank-{rank:05d}.failed"
    with contextlib.suppress(OSError):
        incomplete.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.write_text(f"{reason}\n")


def _read_report(path: Path) -> str:
    """The reason that a rank has written, as far as its disk took it."""
    text = path.read_text(errors="replace")
    if not text:
        return "cannot write, not even the reason"
    return text.strip() if text.endswith("\n") else f"{text}..."
