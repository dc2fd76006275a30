"""The part of parallel_tests.py inside pytest:  pytest -p benchmarks.harness.shard_plugin --shard=I/N --progress=FILE

Runs the tests whose names fall into shard I of N, without those that the progress file says were started before. A
line of JSON is written when a test is found, when it starts and when it ends.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

CONTEXT_LOST = 77  # exit status
MAX_MESSAGE = 4000  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1")
    parser.addoption("--progress", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Shard(config.getoption("--shard"), config.getoption("--progress")))


class Shard:
    """Selects tests and writes their progress."""

    def __init__(self, shard: str, path: Path) -> None:
        self.index, self.count = map(int, shard.split("/"))
        self.started = set()
        if path.exists():
            self.started = {line["test"] for line in map(json.loads, path.open()) if line["state"] == "started"}
        self.file = path.open("a")

    def _write(self, test: str, state: str, message: str = "") -> None:
        self.file.write(json.dumps({"test": test, "state": state, "message": message[-MAX_MESSAGE:]}) + "\n")
        self.file.flush()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Names decide, not positions: neighbours in a file, which often share kernels' sizes, spread evenly."""
        items[:] = [
            item
            for item in items
            if zlib.crc32(item.nodeid.encode()) % self.count == self.index and item.nodeid not in self.started
        ]
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # slow ones first: others fill the gaps
        for item in items:
            self._write(item.nodeid, "found")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "started")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", report.longreprtext)
            _leave_if_the_context_is_lost()
        elif report.skipped:
            self._write(report.nodeid, "skipped")
        elif report.when == "call":
            self._write(report.nodeid, "passed")


def _leave_if_the_context_is_lost() -> None:
    """After an illegal access every later call of CUDA fails: the other tests need another process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.stdout.flush()
        os._exit(CONTEXT_LOST)  # an orderly end would call CUDA again
