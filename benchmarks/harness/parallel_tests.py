"""Runs tests in several processes, each test with a limit of its own; nothing that one test does hides another.

A test that takes too long is stopped with its process and counts as timed out; a test that ends its process counts as
crashed. A new process runs the tests that are left.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .checkout import ROOT
from .processes import last_lines, start, stop

POLL = 0.1  # seconds
NO_TESTS = 5  # status of pytest, here of a shard into which no test falls


class Outcome(NamedTuple):
    """Of one test: "passed", "failed", "skipped", "timed out", "crashed" or "not run", and why."""

    state: str
    message: str = ""


@dataclass
class _Shard:
    """One process after another for the tests of a shard, and what their progress file says."""

    shard: str
    tests: Path
    folder: Path
    process: subprocess.Popen | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: str | None = None
    since: float = 0.0  # when the running test started
    started: int = 0
    _read: int = 0  # bytes of the progress file

    def __post_init__(self) -> None:
        self.progress, self.log = (self.folder / f"{self.shard.replace('/', '-')}.{end}" for end in ("jsonl", "log"))
        self.restart()

    def restart(self) -> None:
        self._started_before = self.started
        with self.log.open("ab") as log:
            self.process = start(
                "pytest",
                "-q",
                *("-o", "addopts=", "-p", "no:cacheprovider"),
                *("-p", "benchmarks.harness.checkout", "-p", "benchmarks.harness.shard_plugin"),
                f"--confcutdir={self.tests}",
                f"--rootdir={self.tests}",
                f"--shard={self.shard}",
                f"--progress={self.progress}",
                str(self.tests),
                out=log,
                threads=1,
            )

    def look(self, limit: float) -> None:
        """Read what is new, stop a test beyond its limit, and start another process where tests are left."""
        self._read_progress()
        if self.process is None:
            return
        if self.running and time.monotonic() - self.since > limit:
            stop(self.process)
            self._end(Outcome("timed out", f"stopped after {limit:.0f} s"))
            self.restart()
        elif self.process.poll() is not None:
            self._read_progress()
            if self.running:
                self._end(Outcome("crashed", f"the process ended with status {self.process.returncode}"))
            left = [test for test, outcome in self.outcomes.items() if outcome.state == "not run"]
            if left and self.started > self._started_before:
                self.restart()
                return
            if self.process.returncode != NO_TESTS and not self.outcomes:
                self.outcomes[f"shard {self.shard}"] = Outcome("crashed", f"no test started:\n{last_lines(self.log)}")
            self.process = None

    def _read_progress(self) -> None:
        if not self.progress.exists():
            return
        with self.progress.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in map(json.loads, complete.splitlines()):
            test, state = line["test"], line["state"]
            if state == "found":
                self.outcomes[test] = Outcome("not run")
            elif state == "started":
                self.running, self.since, self.started = test, time.monotonic(), self.started + 1
            elif self.outcomes[test].state != "failed":  # an error after the test does not pass it
                self.outcomes[test] = Outcome(state, line["message"])
                self.running = None

    def interrupt(self) -> None:
        """Its process was stopped because there is no time for more tests."""
        self._read_progress()
        if self.running:
            self._end(Outcome("timed out", "stopped when the time for all tests was over"))

    def _end(self, outcome: Outcome) -> None:
        assert self.running is not None
        self.outcomes[self.running], self.running = outcome, None


class ParallelTests:
    """The tests of a folder, in `processes` processes; `limit`: seconds of a test."""

    def __init__(self, tests: Path, *, processes: int, limit: float) -> None:
        self.limit = limit
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._shards = [_Shard(f"{index}/{processes}", tests, folder) for index in range(processes)]

    def wait(self, seconds: float) -> dict[str, Outcome]:
        """Outcomes by test, after all of them or after `seconds`."""
        until = time.monotonic() + seconds
        try:
            while any(shard.process for shard in self._shards) and time.monotonic() < until:
                time.sleep(POLL)
                for shard in self._shards:
                    shard.look(self.limit)
        finally:
            for shard in self._shards:
                if shard.process:
                    stop(shard.process)
                    shard.interrupt()
            self._folder.cleanup()
        return {test: outcome for shard in self._shards for test, outcome in sorted(shard.outcomes.items())}


def group_of(test: str) -> str:
    """The part of the product that a test is about, by its file: test_attention_cuda.py::test_... -> attention."""
    file = test.partition("::")[0].rpartition("/")[2]
    return file.removeprefix("test_").removesuffix(".py").removesuffix("_cuda")


def summary(outcomes: dict[str, Outcome]) -> str:
    """Counts by group, then all that went wrong, with the message of the first failure of each group in full."""
    counts: dict[str, Counter[str]] = {}
    for test, outcome in outcomes.items():
        counts.setdefault(group_of(test), Counter())[outcome.state] += 1
    lines = [
        f"{group:<14} {', '.join(f'{n} {state}' for state, n in sorted(c.items()))}" for group, c in counts.items()
    ]
    shown: set[str] = set()
    for test, outcome in outcomes.items():
        if outcome.state in ("passed", "skipped", "not run"):
            continue
        message = outcome.message if group_of(test) not in shown else _last_error(outcome.message)
        shown.add(group_of(test))
        lines.append(f"{outcome.state}: {test}\n{_indented(message)}")
    return "\n".join(lines)


def _last_error(message: str) -> str:
    """The line of a traceback that says what is wrong."""
    errors = [line for line in message.splitlines() if line.startswith("E ")]
    return (errors or message.splitlines() or [""])[0]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def wrong_groups(outcomes: dict[str, Outcome]) -> set[str]:
    """Groups with wrong results or crashes. A test that timed out, or was not run, says nothing about results."""
    return _groups(outcomes, ("failed", "crashed"))


def unknown_groups(outcomes: dict[str, Outcome]) -> set[str]:
    """Groups of which some tests were stopped or never started."""
    return _groups(outcomes, ("timed out", "not run"))


def _groups(outcomes: dict[str, Outcome], states: Iterable[str]) -> set[str]:
    return {group_of(test) for test, outcome in outcomes.items() if outcome.state in states}


GPU_TESTS = ROOT / "tests/gpu"
