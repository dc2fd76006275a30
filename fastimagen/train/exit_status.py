"""How a training process ends, and how `fastimagen supervise` and its training processes understand each other."""

from __future__ import annotations

import os

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: interrupted by a signal; rerun the command to resume
EXIT_LOST = 69  # EX_UNAVAILABLE: a process is lost or hangs; rerun the command to resume

STATUS_FILE = "FASTIMAGEN_STATUS_FILE"
"""Environment variable with the file to which every training process of a host appends STARTED and then its exit
status. torchrun itself exits with 1 whatever they were."""
STARTED = "started"
STOP_FILE = "FASTIMAGEN_STOP_FILE"
"""Environment variable with the path of a file whose existence is a request to stop. Not all launchers pass on all
signals."""


def record(status: int) -> int:
    """Append the exit status for the supervisor, if there is one. Returns it."""
    _append(str(status))
    return status


def record_start() -> None:
    """Append STARTED for the supervisor, if there is one: a process that is killed records nothing else."""
    _append(STARTED)


def _append(line: str) -> None:
    if path := os.environ.get(STATUS_FILE):
        with open(path, "a") as file:
            file.write(f"{line}\n")


def stop_file_exists() -> bool:
    """Whether the supervisor asks to stop."""
    path = os.environ.get(STOP_FILE)
    return path is not None and os.path.exists(path)
