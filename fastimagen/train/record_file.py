"""metrics.jsonl: appended record by record, by several stages at once, and on a disk that may be full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import atomic_file, first_line
from ..words import counted
from .run_lock import shared_lock


class RecordFile:
    """Appends JSON records, one per line, each complete or not at all.

    Records that cannot be written, as on a full disk, are kept in memory and written with the next one; `warn` gets one
    line when that begins and one when it ends.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self._waiting: list[str] = []

    def append(self, record: dict[str, Any]) -> None:
        """Write the records that wait, then this one."""
        failing = bool(self._waiting)
        self._waiting.append(json.dumps(record) + "\n")
        try:
            _append(self.path, "".join(self._waiting).encode())
        except OSError as error:
            if not failing:
                self.warn(f"cannot write {self.path} ({first_line(error)}): its records wait until it can be written")
            return
        if failing:
            self.warn(f"{self.path}: written again, with {counted(len(self._waiting), 'record')} that waited")
        self._waiting = []

    def close(self) -> None:
        """Say how many records are lost, if some still wait."""
        if self._waiting:
            self.warn(f"{self.path}: could not be written, and lost {counted(len(self._waiting), 'record')}")

    def drop_after(self, stage: str, step: int, *, keep_validation: bool = True) -> None:
        """Remove the records of `stage` that are later than `step`, and an incomplete last line.

        keep_validation: of `step` itself. Raises OSError if that is impossible.
        """
        if not self.path.exists():
            return
        with shared_lock(self.path.parent, "metrics"), open(self.path, "r+b") as file:
            lines = file.read().splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, stage, step, keep_validation)]
            if kept == lines[: len(kept)]:  # only the end is removed, for which a full disk has room
                file.truncate(sum(map(len, kept)))
                return
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))


def _is_kept(line: bytes, stage: str, step: int, keep_validation: bool) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # a kill interrupted its write, so its step is later than the checkpoint
    if not line.endswith(b"\n"):
        return False
    if record["stage"] != stage or record["step"] < step:
        return True
    return record["step"] == step and (keep_validation or "val_loss" not in record)


def _append(path: Path, data: bytes) -> None:
    """Append `data`, or nothing if that fails."""
    with shared_lock(path.parent, "metrics"), open(path, "ab", buffering=0) as file:  # another stage may replace it
        size = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise
