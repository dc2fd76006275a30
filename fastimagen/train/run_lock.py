"""Locks of a run directory. Each stage has one writer, so that stages can train side by side.

What they share, such as config.json, is written by one process at a time. The kernel
releases a lock with its process. The files stay.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..files import atomic_file, read_json_object
from .resume import differences, flatten


@contextmanager
def stage_lock(run_dir: Path, stages: Sequence[str]) -> Iterator[None]:
    """Hold the locks of these stages. Raises ValueError that names the stage and the process that trains it."""
    with ExitStack() as held:
        for stage in stages:
            handle = held.enter_context(open(run_dir / f".lock-stage-{stage}", "a+"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"stage {stage} of {run_dir} is in use by {holder(run_dir, stage)}: wait until it ends, train "
                    f"another stage (--stage), or choose another --run-dir"
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        yield


def holder(run_dir: Path, stage: str) -> str | None:
    """The process that trains a stage of the run directory, or None."""
    path = run_dir / f".lock-stage-{stage}"
    if not path.exists():
        return None
    with open(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return handle.read().strip() or "another process"
    return None


@contextmanager
def shared_lock(run_dir: Path, name: str) -> Iterator[None]:
    """Wait for and hold the lock of something that all stages write: "data", "config" or "metrics"."""
    with open(run_dir / f".lock-{name}", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_config(run_dir: Path, content: str, others: Sequence[str]) -> None:
    """Write config.json. others: the stages that this process does not train.

    Raises ValueError if another process trains one of them with another configuration.
    """
    path = run_dir / "config.json"
    with shared_lock(run_dir, "config"):
        busy = [(stage, process) for stage in others if (process := holder(run_dir, stage))]
        if busy and path.exists() and path.read_text() != content:
            stage, process = busy[0]
            changed = differences(flatten(read_json_object(path)), flatten(json.loads(content)))
            listed = "; ".join(f"{key} {text}" for key, text in changed.items())
            raise ValueError(
                f"{process} trains stage {stage} of {run_dir} with another configuration ({listed}): use the same one, "
                f"wait until that stage ends, or choose another --run-dir"
            )
        with atomic_file(path) as temporary:
            temporary.write_text(content)
