"""The watchdog: a run that hangs, or has lost a process, ends on every rank of every host, with the reason.

Two threads stand beside the training loop. The one exchanges signs of life with the other processes and may be held up
by the network. The other only looks at the clock, and ends the process when it has to: a collective that hangs cannot
be interrupted from Python. Should even that thread not run, because some call never returns Python's lock, the timer of
faulthandler, which needs no lock, ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from types import TracebackType

from ..config import TimeoutConfig
from ..files import first_line
from .exit_status import EXIT_INTERRUPTED, EXIT_LOST, record
from .peers import Failure, Peers, Status
from .phases import Current, Phases
from .preemption import BEFORE_TRAINING, StopRequest, TrainingInterrupted

TICK = 0.25  # seconds between two looks at the clock
BEAT = 1.0  # seconds between two signs of life, or a fifth of a shorter time-out
REARM = 5.0  # seconds between two settings of faulthandler's timer
LEAVE_SECONDS = 10.0  # for leaving before training has begun, and for the last lines of a process that ends
MAX_LOCKED = 30.0  # seconds beyond the heartbeat time-out that a call may keep Python's lock


class Watchdog:
    """Watches this process and its peers as long as the context lasts.

    peers: None for a single process. phases: what the training loop does.
    """

    def __init__(self, peers: Peers | None, phases: Phases, timeouts: TimeoutConfig, stop: StopRequest) -> None:
        self.peers, self.phases, self.timeouts, self.stop = peers, phases, timeouts, stop
        self._beat = min(BEAT, timeouts.heartbeat / 5)
        self._done = threading.Event()
        self._beat_now = threading.Event()
        self._failure: Failure | None = None
        self._main_waits = False  # for the reason of a failed collective: its stack says nothing
        self._current, self._seconds = phases.current, 0.0
        self._told = False  # that the run stops
        self._silence = 0.0  # seconds since the last exchange with the store
        self._first_did = "start"  # what rank 0 did at the last exchange
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._start("watchdog", self._watch)
        if self.peers:
            self._start("heartbeat", self._exchange)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others why this process ends. Raises ConnectionError or TrainingInterrupted in place of an error
        that is only the consequence of what happened elsewhere."""
        try:
            if self.peers and error is not None and not isinstance(error, TrainingInterrupted):
                self._account_for(error)
        finally:
            self._finish(failed=error is not None)

    def _start(self, name: str, work) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    # ---- in the main thread, at the end

    def _account_for(self, error: BaseException) -> None:
        assert self.peers is not None
        if not is_of_collectives(error):
            status = EXIT_LOST if isinstance(error, (ConnectionError, RuntimeError, MemoryError)) else 1
            name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            text = f"{self.peers.me}: {name}{first_line(error).removeprefix(f'{self.peers.me}: ')}"
            self._try(lambda peers: peers.fail(Failure(text, (peers.rank,), status)))
            return
        # A process elsewhere has ended, or closed its connections. Who, the heartbeats tell soon; the thread then ends
        # this process.
        self._main_waits = True
        for waited in range(int(self.timeouts.heartbeat / self._beat) + 3):
            self._beat_now.set()
            time.sleep(self._beat)
            if self.stop.reason and waited >= 2:
                raise TrainingInterrupted(f"{self.stop.reason}: {self._here()} stopped") from None
        raise ConnectionError(f"{self._here()}: communication failed: {first_line(error)}") from None

    def _finish(self, *, failed: bool) -> None:
        """Say goodbye, so that nobody misses this process, and end the threads."""
        self._done.set()
        self._beat_now.set()
        for thread in self._threads:
            thread.join(timeout=self._beat)
        faulthandler.cancel_dump_traceback_later()
        if self.peers is None:
            return
        self._try(lambda peers: peers.publish(self._status(done=True)))
        if self.peers.rank == 0:  # the store ends with this process
            self._wait_for_others(2.5 * self._beat if failed else self.timeouts.heartbeat)
        if failed:  # the shutdown of a process group whose other processes are gone may hang
            faulthandler.dump_traceback_later(self.timeouts.heartbeat + MAX_LOCKED, exit=True)

    def _wait_for_others(self, seconds: float) -> None:
        """Wait until the others have finished too, or have had time to read why this process fails."""
        ranks = list(range(len(self.peers.members))) if self.peers else []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            statuses: list[Status] = []
            self._try(lambda peers: statuses.extend(peers.look(ranks)[0]))  # noqa: B023 - called in this iteration
            if statuses and all(status.done for status in statuses):
                return
            time.sleep(self._beat / 10)

    def _try(self, tell) -> None:
        """Tell the others something, in a thread, since the store may be out of reach."""
        thread = threading.Thread(target=_ignore_lost_store, args=(tell, self.peers), daemon=True)
        thread.start()
        thread.join(timeout=2 * self._beat)

    # ---- the thread that looks at the clock

    def _watch(self) -> None:
        before, armed = time.monotonic(), float("-inf")
        while not self._done.is_set():
            self.stop.watch(TICK)
            now = time.monotonic()
            passed = min(now - before, 4 * TICK)  # a process that was stopped for a while has not watched meanwhile
            before = now
            self._silence += passed
            self._seconds = self._seconds + passed if self.phases.current is self._current else 0.0
            self._current = self.phases.current
            if self.peers and now > armed + REARM:
                armed = now
                faulthandler.dump_traceback_later(self.timeouts.heartbeat + MAX_LOCKED, exit=True)
            if not self._done.is_set():
                self._check(now)

    def _check(self, now: float) -> None:
        """End this process if there is a reason."""
        if self._failure:
            self._end(self._failure)
        if self.peers is None and self._seconds > self._limit(self._current):
            self._end(Failure(self._overdue("this process", self._status()), (0,), EXIT_LOST))
        if self.peers and self._silence > self.timeouts.heartbeat:
            first = self.peers.members[0]
            text = f"no contact with {first} at {self.peers.address} for {self._silence:.0f} s"
            self._end(Failure(text, (0,), EXIT_LOST))
        if self.stop.reason:
            early = self._current.phase in BEFORE_TRAINING
            if not (early or self._told) and (self.peers is None or self.peers.rank == 0):
                print(f"{self.stop.reason}: stopping; now in {self._current}", flush=True)
            self._told = True
            patience = min(LEAVE_SECONDS, self.timeouts.stop) if early else self.timeouts.stop
            if now - self.stop.since > patience and self._current.phase != "checkpoint":
                self._leave(patience)

    def _leave(self, patience: float) -> None:
        """End this process after a request to stop that training has not followed."""
        self._last_words()
        print(
            f"{self.stop.reason}: {self._here()} did not stop by itself within {patience:.0f} s "
            f"(fastimagen.train.timeouts.stop); it ends without another checkpoint. Rerun the command to resume from "
            f"the newest one",
            file=sys.stderr,
            flush=True,
        )
        os._exit(record(EXIT_INTERRUPTED))

    def _end(self, failure: Failure) -> None:
        """Print the first failure of the run, where this process was, and its stack; end it."""
        self._last_words()
        lines = [f"error: {failure.text}", f"{self._here()} ends. Rerun the command to resume from the last checkpoint"]
        rank = self.peers.rank if self.peers else 0
        if self.peers:
            lines += self._kill_silent_neighbours(failure)
        sys.stderr.write("\n".join(lines) + "\n")
        if rank in failure.ranks:
            faulthandler.dump_traceback(all_threads=True)
        elif not self._main_waits:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            sys.stderr.write("stack of the main thread:\n" + "".join(traceback.format_stack(frame)))
        sys.stderr.flush()
        os._exit(record(failure.status))

    def _last_words(self) -> None:
        """From here on the process ends, even if standard output is blocked."""
        faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True)
        sys.stdout.flush()

    def _kill_silent_neighbours(self, failure: Failure) -> list[str]:
        """Kill lost processes of this host: SIGTERM, which launchers send, does not end a stopped process."""
        assert self.peers is not None
        lines = []
        for member in self.peers.neighbours():
            if member.rank in failure.ranks and failure.text.startswith(SILENT) and not member.is_gone():
                os.kill(member.pid, signal.SIGKILL)
                lines.append(f"killed {member}, which no longer answered")
        return lines

    def _here(self) -> str:
        who = str(self.peers.me) if self.peers else "this process"
        return f"{who}, {self._seconds:.0f} s in {self._current},"

    def _limit(self, current: Current) -> float:
        return getattr(self.timeouts, current.phase) + (self.timeouts.first if current.first else 0.0)

    def _status(self, beat: int = 0, done: bool = False) -> Status:
        current = self._current
        return Status(beat, current.entered, current.phase, str(current), self._seconds, self._limit(current), done)

    def _overdue(self, who: str, status: Status) -> str:
        return (
            f"{who}: {status.doing} has lasted {status.seconds:.0f} s, longer than "
            f"fastimagen.train.timeouts.{status.phase} allows ({status.limit:.0f} s)"
        )

    # ---- the thread that exchanges signs of life

    def _exchange(self) -> None:
        assert self.peers is not None
        peers, beat, told = self.peers, 0, False
        first = peers.rank == 0
        watched = list(range(len(peers.members))) if first else [0]
        seen = {rank: (-1, 0.0) for rank in watched}  # beat, seconds since it changed
        before = time.monotonic()
        while not self._done.is_set():
            try:
                beat += 1
                peers.publish(self._status(beat))
                if self.stop.reason and not told:
                    told = True
                    peers.request_stop(f"{self.stop.reason} ({peers.me})")
                gone = [member.rank for member in peers.neighbours() if member.is_gone()]
                statuses, stop, failure = peers.look(sorted({*watched, *gone}))
                by_rank = dict(zip(sorted({*watched, *gone}), statuses))
                self._first_did = by_rank[0].doing
                passed, before = time.monotonic() - before, time.monotonic()
                for rank in watched:
                    last, age = seen[rank]
                    changed = by_rank[rank].beat != last
                    seen[rank] = (by_rank[rank].beat, 0.0 if changed else age + min(passed, 4 * self._beat))
                self._silence = 0.0
                if stop:
                    self.stop.from_other_rank(stop)
                found = failure or self._judge(by_rank, gone, {rank: age for rank, (_, age) in seen.items()})
                if found:
                    self._failure = peers.fail(found)
            except RuntimeError:  # torch's DistError: rank 0's process has ended, or the network is down
                self._first_is_gone()
            self._beat_now.wait(self._beat)
            self._beat_now.clear()

    def _judge(self, statuses: dict[int, Status], gone: list[int], ages: dict[int, float]) -> Failure | None:
        """What is wrong with the run, seen from this process: rank 0 sees all ranks."""
        assert self.peers is not None
        ended = [rank for rank in gone if not statuses[rank].done]
        if ended:
            doing = statuses[ended[0]].doing
            return Failure(f"{self.peers.name(ended)} {ENDED}, in {doing}", tuple(ended), EXIT_LOST)
        silent = [rank for rank, age in ages.items() if age > self.timeouts.heartbeat and not statuses[rank].done]
        if silent:
            age, doing = ages[silent[0]], statuses[silent[0]].doing
            text = f"{SILENT} {self.peers.name(silent)} for {age:.0f} s, last in {doing}"
            return Failure(text, tuple(silent), EXIT_LOST)
        if self.peers.rank > 0:
            return None
        running = {rank: status for rank, status in statuses.items() if not status.done}
        hindmost = min((status.entered for status in running.values()), default=0)
        late = [rank for rank, s in running.items() if s.entered == hindmost and s.seconds > s.limit]
        if late:  # the others are in later phases and wait for these
            return Failure(self._overdue(self.peers.name(late), statuses[late[0]]), tuple(late), EXIT_LOST)
        return None

    def _first_is_gone(self) -> None:
        """The store fails at once where rank 0's process has ended; a silent network is a matter of time."""
        assert self.peers is not None
        first = self.peers.members[0]
        if first in self.peers.neighbours() and first.is_gone() and not self._done.is_set():
            self._failure = Failure(f"{first} {ENDED}, in {self._first_did}", (0,), EXIT_LOST)


SILENT = "no sign of life from"
ENDED = "has ended without a word (killed: if for lack of memory, dmesg on its host says so)"


def is_of_collectives(error: BaseException) -> bool:
    """Whether an error comes from communication: torch's DistError, or gloo's errors, which are RuntimeErrors."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def _ignore_lost_store(tell, peers: Peers) -> None:
    """Say it if the store can be reached; the others notice the end of this process in any case."""
    try:
        tell(peers)
    except RuntimeError:
        return
