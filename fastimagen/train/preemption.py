"""Preemption: signals and the death of the launcher stop all ranks after the same step."""

from __future__ import annotations

import _thread
import os
import select
import signal
import time
from types import FrameType

from .agreement import first_of_ranks
from .exit_status import stop_file_exists
from .peers import Peers
from .phases import Phases

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed", "supervise")
BEFORE_TRAINING = ("start", "engine")  # phases in which there is nothing to save
AGREEMENT_SECONDS = 0.5  # the ranks look for a request to stop about this often
MAX_AGREEMENT_STEPS = 1000


class TrainingInterrupted(Exception):
    """A signal stopped the run; what could be saved is saved."""


class StopRequest:
    """Records requests to stop: SIGTERM, SIGINT, SIGUSR1, the death of the launcher, the supervisor's file, another
    rank's request. `should_stop` is the same on all ranks.

    Before training starts, a request raises TrainingInterrupted in the main thread. A second SIGINT interrupts
    immediately. As a context manager it restores the old signal handlers at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, peers: Peers | None, phases: Phases) -> None:
        self.reason: str | None = None
        self.since = 0.0
        """time.monotonic() of the request."""
        self.peers, self.phases = peers, phases
        self.launchers = _launchers()
        self._interrupted = False  # by a SIGINT
        self._steps, self._next_agreement, self._agreements = 0, 1, 0
        self._last = (0, time.monotonic())  # of the last agreement
        if peers and peers.rank == 0:
            peers.send(0, "1")

    def __enter__(self) -> StopRequest:
        self.wake_up, self._written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        self.previous_fd = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self.previous_fd)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Python runs it in the main thread, and not before a call into C, such as a collective, returns.

        The watchdog's thread may have recorded the same signal before.
        """
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.request(signal.Signals(number).name)
        if self.phases.current.phase in BEFORE_TRAINING:
            where = f"{self.phases.current}, before a step"
            raise TrainingInterrupted(f"{self.reason}: stopped in {where}; rerun the command")

    def request(self, reason: str) -> None:
        """Record a reason to stop; the first one counts."""
        if self.reason is None:
            self.reason, self.since = reason, time.monotonic()

    def watch(self, seconds: float) -> None:
        """For the watchdog's thread: wait for `seconds` or until a signal arrives, and look for other requests.

        A signal's number arrives here at once, whatever the main thread does.
        """
        ready, _, _ = select.select([self.wake_up], [], [], seconds)
        for number in os.read(self.wake_up, 64) if ready else b"":
            if number in self.SIGNALS:
                self.request(signal.Signals(number).name)
        if self.reason is None and any(_gone(process) for process in self.launchers):
            self.request("the launcher has died")
        if self.reason is None and stop_file_exists():
            self.request("the supervisor was told to stop")

    def from_other_rank(self, reason: str) -> None:
        """For the watchdog's thread: record another rank's request, as if it were a signal of this one."""
        if self.reason is None:
            self.request(reason)
            if self.phases.current.phase in BEFORE_TRAINING:
                _thread.interrupt_main(signal.SIGTERM)

    def should_stop(self) -> str | None:
        """The reason to stop after this step, or None. All ranks must call it, once per step, and get the same answer.

        The ranks agree every few steps. Rank 0 announces at one agreement what the next one will be, so that the
        message is there when the others ask for it, and nobody waits.
        """
        if self.peers is None:
            return self.reason
        self._steps += 1
        if self._steps < self._next_agreement:
            return None
        if self.peers.rank == 0:
            self.peers.send(self._agreements + 1, self.reason or str(self._interval()))
        message = self.peers.receive(self._agreements)
        if not message.isdecimal():
            return message
        self._agreements += 1
        self._next_agreement = self._steps + int(message)
        return None

    def should_stop_now(self) -> str | None:
        """The reason to stop in the middle of a step, or None: for validation and preview grids, which last long.

        All ranks must call it at the same point and wait for each other.
        """
        return self.reason if self.peers is None else first_of_ranks(self.reason)

    def _interval(self) -> int:
        """Steps until the agreement after the next one, from the speed of the steps since the last one."""
        now = time.monotonic()
        steps, seconds = self._steps - self._last[0], now - self._last[1]
        self._last = (self._steps, now)
        wanted = int(AGREEMENT_SECONDS * steps / max(seconds, 1e-6))
        return max(1, min(wanted, 2 * steps, MAX_AGREEMENT_STEPS))


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
