"""Locks of a run directory. Each stage has one writer, so that stages can train side by side.

What they share, such as config.json, is written by one process at a time. The kernel releases a lock with its process.
The files stay. That of a stage says which process holds it, and with which configuration.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .resume import differences, flatten


@contextmanager
def stage_lock(run_dir: Path, stages: Sequence[str], config: str = "{}") -> Iterator[None]:
    """Hold the locks of these stages, to train them with this configuration, in JSON.

    Raises ValueError that names the stage and the process that trains it.
    """
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
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n{config}")
            handle.flush()
        yield


def holder(run_dir: Path, stage: str) -> str | None:
    """The process that trains a stage of the run directory, or None."""
    content = _content_if_held(run_dir, stage)
    return None if content is None else content.partition("\n")[0] or "another process"


def check_side_by_side(run_dir: Path, others: Sequence[str], config: str) -> None:
    """Raise ValueError if another process trains one of `others` with another configuration, in JSON."""
    for stage in others:
        process, _, theirs = (_content_if_held(run_dir, stage) or "").partition("\n")
        if theirs and theirs != config:
            changed = differences(flatten(json.loads(theirs)), flatten(json.loads(config)))
            listed = "; ".join(f"{key} {text}" for key, text in changed.items())
            raise ValueError(
                f"{process} trains stage {stage} of {run_dir} with another configuration ({listed}): use the same one, "
                f"wait until that stage ends, or choose another --run-dir"
            )


def _content_if_held(run_dir: Path, stage: str) -> str | None:
    """The content of a stage's lock file; None if no process holds the lock."""
    path = run_dir / f".lock-stage-{stage}"
    if not path.exists():
        return None
    with open(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return handle.read()
    return None


@contextmanager
def shared_lock(run_dir: Path, name: str) -> Iterator[None]:
    """Wait for and hold the lock of something that all stages write: "data", "config" or "metrics"."""
    with open(run_dir / f".lock-{name}", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
