"""`fastimagen` in processes of their own that start in a second.

A server that has imported all packages forks them; a new Python would spend five seconds on the imports. Everything
else is as for `python -m fastimagen`: a process with its own signals, output and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fastimagen.train.trainer", "fastimagen.train.plan", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers"]
)


class ForkedProcess:
    """A process that runs a command of fastimagen, with the methods of subprocess.Popen.

    `before` is called in it before anything else.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._log = Path(tempfile.mkstemp(prefix="fastimagen-test-", suffix=".log")[1])
        self._process = CONTEXT.Process(target=_run, args=(arguments, self._log, environment or {}, before))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 240) -> int:
        """Its exit status, negative for a signal. Raises TimeoutError, and ends the process, if it runs longer."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"after {timeout:g} s:\n{self._log.read_text()}")
        return self._process.exitcode

    def communicate(self, timeout: float = 240) -> tuple[str, None]:
        """Wait for the end: its output and errors together, and None."""
        self.wait(timeout)
        output = self._log.read_text()
        self._log.unlink()
        return output, None


def _run(arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.chdir(ROOT)
    if before:
        before()
    from fastimagen.cli import main

    sys.exit(main(arguments))
