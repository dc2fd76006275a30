"""`fastimagen supervise`: runs a launcher, passes on requests to stop, restarts a lost run.

torchrun turns every exit status of its processes into 1, and restarts them even after a signal; `deepspeed` has no
restarts. Around either of them, or plain python, this command returns 0 for finished, 75 for interrupted by a signal,
69 for lost more often than allowed, and the launcher's own status for a mistake that a restart does not cure.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from ..train.exit_status import EXIT_INTERRUPTED, EXIT_LOST, STARTED, STATUS_FILE, STOP_FILE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PAUSE = 3.0  # seconds before a restart: other hosts notice the end of the run too
POLL = 0.2
KILL_SECONDS = 5.0  # between SIGTERM and SIGKILL


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of supervising."""
    parser.add_argument(
        "--restarts", type=int, default=0, help="restarts from the last checkpoint at most (default: %(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after a signal, before what still runs is killed (default: %(default)s)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="the launcher's command")


def supervise(options: argparse.Namespace) -> int:
    """Run the command until it has finished, was told to stop, or was lost too often. Returns the exit status."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise ValueError("supervise needs a command, as in: fastimagen supervise -- deepspeed launch/train.py ...")
    if options.restarts < 0:
        raise ValueError(f"--restarts must not be negative, got {options.restarts}")
    command = _for_torchrun(command)
    with tempfile.TemporaryDirectory(prefix="fastimagen-") as folder:
        supervisor = Supervisor(command, Path(folder), options.patience)
        for restarts in range(options.restarts + 1):
            if restarts:
                print(f"supervise: restart {restarts} of {options.restarts}", flush=True)
                time.sleep(PAUSE)
            status = supervisor.run()
            if status != EXIT_LOST or supervisor.told_to_stop:
                break
    return status


class Supervisor:
    """Runs a launcher once or more. Signals of this process become a file that all training processes look for."""

    def __init__(self, command: list[str], folder: Path, patience: float) -> None:
        self.command, self.patience = command, patience
        self.stop_file, self.status_file = folder / "stop", folder / "status"
        self.environment = os.environ | {STATUS_FILE: str(self.status_file), STOP_FILE: str(self.stop_file)}
        self.told_to_stop = 0.0
        """time.monotonic() of the signal; 0 without one."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_file.touch()
        self.told_to_stop = self.told_to_stop or time.monotonic()

    def run(self) -> int:
        """Run the launcher once. Returns the status that counts."""
        self.status_file.write_text("")
        if self.told_to_stop:
            return EXIT_INTERRUPTED
        # A session of its own: an interrupt from the keyboard reaches this process alone, which asks the others.
        process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        while process.poll() is None:
            if self.told_to_stop and time.monotonic() > self.told_to_stop + self.patience:
                print(f"supervise: still running {self.patience:.0f} s after the signal; ending it", file=sys.stderr)
                process.terminate()
                self._end_orphans(KILL_SECONDS)
                process.kill()
            time.sleep(POLL)
        # The launcher may have been killed; its training processes notice, save and leave.
        self._end_orphans(self.patience)
        return self._status(process.returncode)

    def _end_orphans(self, seconds: float) -> None:
        """Wait until all training processes have ended; kill those that have not after `seconds`."""
        until = time.monotonic() + seconds
        while orphans := self._training_processes():
            if time.monotonic() > until:
                for process in orphans:
                    print(f"supervise: killing process {process.pid}", file=sys.stderr, flush=True)
                    process.kill()
                until = float("inf")
            time.sleep(POLL)

    def _training_processes(self) -> list:
        """The processes of this user that carry this supervisor's file in their environment."""
        import psutil

        found = []
        for process in psutil.process_iter():
            try:
                own = process.environ().get(STATUS_FILE) == str(self.status_file)
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # of another user, or ended meanwhile
                continue
        return found

    def _status(self, returned: int) -> int:
        """The status that counts, from the launcher's and from those that the training processes recorded."""
        recorded = self.status_file.read_text().split()
        statuses = {int(line) for line in recorded if line != STARTED}
        if returned == 0:
            return 0
        silent = 2 * recorded.count(STARTED) - len(recorded)  # processes that recorded no status: they were killed
        if self.told_to_stop:
            return EXIT_INTERRUPTED
        for status in (EXIT_LOST, EXIT_INTERRUPTED):
            if status in statuses | {returned}:
                return status
        if silent > 0:
            return EXIT_LOST
        return returned if 0 < returned < 128 else 1


def _for_torchrun(command: list[str]) -> list[str]:
    """torchrun takes an option --run of the training script for an abbreviation of its own."""
    if not any(Path(word).name.startswith("torchrun") or word == "torch.distributed.run" for word in command[:4]):
        return command
    return ["--run-dir" if word == "--run" else word.replace("--run=", "--run-dir=", 1) for word in command]
