"""What the tables of bad input share: rows, the lines that are said, and the files that are made."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastimagen.data_config import RemoteConfig
from tests.faulty_server import Server

REPLACED, EXCLUDED = "the next sample takes its place, `bad`", "left out, `excluded`"
LEFT_OUT, LOST = "the shard is left out, `excluded`", "the next samples take the places of its own, `lost`"
STOPS, SKIPPED = "stops", "left out, counted in `report.json`"
PATIENCE = RemoteConfig(timeout=0.5, tries=2, pause=0.01, longest_pause=0.05)


class Row(NamedTuple):
    """A kind of bad input, what happens, and the line said."""

    kind: str
    happens: str
    line: str


@contextmanager
def lines_logged() -> Iterator[list[str]]:
    """The messages that fastimagen logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fastimagen")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def problem(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action ends in."""
    try:
        action()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


def pair(key: str, extension: str, content: bytes) -> dict[str, bytes]:
    return {f"{key}.{extension}": content, f"{key}.txt": b"1 a caption"}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


@contextmanager
def server_of(folder: Path) -> Iterator[Server]:
    folder.mkdir()
    server = Server(folder)
    server.stall = 1.0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
