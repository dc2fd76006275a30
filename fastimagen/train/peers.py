"""The processes of a run: who takes part, signs of life, the first failure, requests to stop.

All of it stands in a store that every process reaches (torch's TCPStore), beside the process groups: a collective that
hangs does not hold it up. Per beat, a process writes one key and reads three; only rank 0 reads those of all.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

MESSAGE_POLL = 0.002  # seconds between two looks for a message that is normally there already
KEPT_MESSAGES = 64  # far more than a host can issue work ahead of the slowest rank


class Member(NamedTuple):
    """One process of the run."""

    rank: int
    host: str
    pid: int
    started: float
    """When the process started, which tells it from a later one with the same number."""
    machine: str
    """Where the process number means something: the boot of the kernel and the namespace of process numbers."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """Whether the process, which must be a neighbour, has ended."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    @classmethod
    def this(cls, rank: int) -> Member:
        """The calling process."""
        import psutil

        namespace = os.stat("/proc/self/ns/pid").st_ino
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time(), machine)


class Status(NamedTuple):
    """A sign of life: what a process does."""

    beat: int = 0
    """Counts the signs of life of the process."""
    entered: int = 0
    """How many phases have begun: the process with the smallest number is the one that the others wait for."""
    phase: str = "start"
    doing: str = "start"
    """The phase with stage and step."""
    seconds: float = 0.0
    """How long the phase has lasted."""
    limit: float = float("inf")
    """How long it may last."""
    done: bool = False
    """Whether the process has finished its work, and may end at any time."""


class Failure(NamedTuple):
    """Why the run ends."""

    text: str
    ranks: tuple[int, ...]
    """The ranks at fault, as far as known."""
    status: int
    """Exit status for the other processes."""


class Peers:
    """What this process tells the others and learns from them. May be used by several threads.

    Every method raises RuntimeError (torch's DistError) if the store cannot be reached, or blocks if it does not
    answer.
    """

    def __init__(self, store: Any, rank: int, members: list[Member], address: str) -> None:
        self.store, self.rank, self.members, self.address = store, rank, members, address
        self.me = members[rank]
        if rank == 0:
            for number in range(len(members)):
                store.set(f"status/{number}", json.dumps(Status()))
            store.set("stop", "")
            store.set("failure", "")
        store.wait(["failure"])

    def publish(self, status: Status) -> None:
        """Give a sign of life."""
        self.store.set(f"status/{self.rank}", json.dumps(status))

    def look(self, ranks: list[int]) -> tuple[list[Status], str | None, Failure | None]:
        """The last signs of life of `ranks`, the reason to stop and the first failure of the run."""
        *statuses, stop, failure = self.store.multi_get([f"status/{rank}" for rank in ranks] + ["stop", "failure"])
        return [Status(*json.loads(status)) for status in statuses], stop.decode() or None, _failure(failure)

    def fail(self, failure: Failure) -> Failure:
        """Record why the run ends. Returns the failure that counts, which is the first one."""
        first = self.store.compare_set("failure", "", json.dumps(failure))
        return _failure(first) or failure

    def request_stop(self, reason: str) -> None:
        """Ask all processes to stop after a common step."""
        self.store.compare_set("stop", "", reason)

    def send(self, index: int, message: str) -> None:
        """Rank 0: send message number `index` to all ranks."""
        self.store.set(f"message/{index}", message)
        if index >= KEPT_MESSAGES:
            self.store.delete_key(f"message/{index - KEPT_MESSAGES}")

    def receive(self, index: int) -> str:
        """Message number `index`. Waits for it without holding up other threads that use the store."""
        key = f"message/{index}"
        while not self.store.check([key]):
            time.sleep(MESSAGE_POLL)
        return self.store.get(key).decode()

    def neighbours(self) -> list[Member]:
        """The other processes on this host, whose numbers this process can look up."""
        return [member for member in self.members if member.machine == self.me.machine and member.rank != self.rank]

    def name(self, ranks: list[int]) -> str:
        """The ranks in words: each with its process and host, or a count where there are many."""
        if len(ranks) == len(self.members):
            return f"all {len(ranks)} ranks"
        named = ", ".join(str(self.members[rank]) for rank in ranks[:4])
        return named if len(ranks) <= 4 else f"{named} and {len(ranks) - 4} more"


def _failure(text: bytes) -> Failure | None:
    if not text:
        return None
    reason, ranks, status = json.loads(text)
    return Failure(reason, tuple(ranks), status)
