"""Training processes for drills, forked from this one, which has imported all packages: they start in a second.

What they run, `fastimagen train`, is what launchers start. Call `prepare` before anything else.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path


def prepare() -> None:
    """Import what training needs. No thread may run afterwards, so that forking is safe."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import deepspeed
    import psutil
    import torch

    import fastimagen.train.trainer

    assert deepspeed and psutil and fastimagen.train.trainer
    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], log: Path, *, ranks: int = 1, command: str = "train") -> list[int]:
    """Fork `ranks` processes that run `fastimagen train`, or another command that trains, with these arguments. Returns
    their process ids."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _run([command, *arguments], log, rank, ranks, port)
        pids.append(pid)
    return pids


def finish(pids: list[int], timeout: float = 300) -> list[int]:
    """Wait for the processes. Returns their exit statuses, negative for signals. Raises TimeoutError."""
    deadline, statuses = time.monotonic() + timeout, dict.fromkeys(pids)
    while None in statuses.values():
        for pid in pids:
            if statuses[pid] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} have not ended: {statuses}")
        time.sleep(0.01)
    return [status for status in statuses.values() if status is not None]


def _run(arguments: list[str], log: Path, rank: int, ranks: int, port: int) -> None:
    """In the forked process: run the command, and end without the parent's clean-up."""
    status = 1
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from fastimagen.cli import main

        status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
