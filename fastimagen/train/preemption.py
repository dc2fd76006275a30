"""Preemption: signals and the death of the launcher stop all ranks after the same step. Also the run directory's
lock."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed")


class StopRequest:
    """Records SIGTERM, SIGINT, SIGUSR1 and the death of the launcher; `should_stop` is the same on all ranks.

    A second SIGINT interrupts immediately. As a context manager it restores the old signal handlers at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.reason: str | None = None
        self.launchers = _launchers()
        # A gloo group beside NCCL: a collective on the CPU needs no host synchronisation.
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __enter__(self) -> StopRequest:
        self.previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def should_stop(self) -> str | None:
        """The reason to stop if any rank has one, otherwise None. All ranks must call it, once per step."""
        if self.reason is None and any(_gone(process) for process in self.launchers):
            self.reason = "the launcher has died"
        if self.group is None:
            return self.reason
        flag = torch.tensor([int(self.reason is not None)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return (self.reason or "another rank was told to stop") if flag.item() else None


def _gone(process) -> bool:
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _launchers() -> list:
    """The chain of launcher processes above this one; empty under plain python."""
    import psutil

    chain = []
    for process in psutil.Process().parents():
        try:
            command = " ".join(process.cmdline()[:4])
        except psutil.Error:
            break
        if not any(name in command for name in LAUNCHERS):
            break
        chain.append(process)
    return chain


def lock_run(run_dir: Path) -> IO[str]:
    """Lock the run directory against other writers until the returned file is closed or the process ends.

    Raises ValueError that names the holder. The file .lock stays; the kernel releases the lock with the process.
    """
    handle = open(run_dir / ".lock", "a+")  # noqa: SIM115 - held open: closing it releases the lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise ValueError(
            f"{run_dir} is in use by {handle.read().strip() or 'another process'}: "
            f"wait until it ends, or choose another --run-dir"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle
