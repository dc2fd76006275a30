"""Checksums of large files, remembered for the user: a T5-XXL takes 25 seconds to read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..files import write_json

MAX_REMEMBERED = 200

MIN_REMEMBERED_BYTES = 64 << 20
"""Files that are smaller together take a fraction of a second to read. The weights of the built-in encoder are smaller:
copies of it in temporary folders would fill the memory."""


def sha256_of(files: Sequence[Path]) -> str:
    """sha256 of the content of files, one after the other. Reads them in full."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def remembered_sha256(files: Sequence[Path]) -> str:
    """As `sha256_of`, from memory if path, size and modification time of all files are those of an earlier call.

    Files of less than MIN_REMEMBERED_BYTES together are read every time. The memory is a file in $XDG_CACHE_HOME
    (~/.cache); where that cannot be written, all files are read every time.
    """
    stats = [(str(path.resolve()), path.stat()) for path in files]
    if sum(stat.st_size for _, stat in stats) < MIN_REMEMBERED_BYTES:
        return sha256_of(files)
    key = json.dumps([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])
    memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastimagen" / "checksums.json"
    known = _read(memory)
    if key not in known:
        known = {**known, key: sha256_of(files)}
        with suppress(OSError):
            write_json(memory, dict(list(known.items())[-MAX_REMEMBERED:]))
    return known[key]


def _read(memory: Path) -> dict[str, str]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
