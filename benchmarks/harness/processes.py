"""Modules of this checkout in processes of their own, which can be stopped with everything that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from .checkout import ROOT


def start(
    module: str, *arguments: str, out: IO[bytes] | int | None = None, threads: int | None = None
) -> subprocess.Popen:
    """Start `python -m module`; out: where standard output and errors go; threads: of PyTorch and of libraries."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    if threads:  # many processes share the cores, so their own pools stay small too
        environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=out,
        stderr=None if out is None else subprocess.STDOUT,
        start_new_session=True,  # a group of its own, for `stop`
    )


def stop(process: subprocess.Popen) -> None:
    """Kill the process, unless it has ended, and what is left of its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(path: Path, count: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").strip().splitlines()[-count:])
