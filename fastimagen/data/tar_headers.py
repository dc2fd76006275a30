"""The files inside a tar: names, offsets and sizes, from the headers alone.

Read are POSIX.1-1988 (ustar), pax and GNU long names, without compression: the formats that webdataset writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

BLOCK = 512  # bytes of a header; contents are padded to multiples of it


class OpenFile:
    """A file descriptor that stays open while something refers to this object."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size = stat.st_size
        self.stamp = _stamp(stat)
        """Changes when the file is replaced or written to."""

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # absent if os.open failed
            os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; threads may call it at the same time."""
        return os.pread(self.fd, size, offset)


def stamp_of(path: str) -> str | None:
    """OpenFile.stamp of a file without opening it; None if there is none."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} bytes of {stat.st_mtime_ns} ns"


def decode_name(name: bytes) -> str:
    """A name in a tar as a string; bytes that are not UTF-8 survive a round trip."""
    return name.decode("utf-8", "surrogateescape")


def tar_members(file: OpenFile) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file of a tar, in its order.

    Raises ValueError, one line, if the tar is empty, truncated, damaged, compressed, sparse or not a tar.
    """
    if not file.size:
        raise ValueError(f"shard {file.path} is empty: 0 bytes")
    offset = 0
    extended: dict[str, str] = {}  # what pax and GNU headers say about the next file
    while True:
        header = file.read(offset, BLOCK)
        if len(header) < BLOCK:
            raise ValueError(f"shard {file.path} is truncated: it stops at byte {file.size} without a tar's end mark")
        if not any(header):
            break
        size, kind = _checked_size(header, offset, file.path), header[156:157]
        offset += BLOCK
        if kind in b"123456":  # links, devices and directories have no content
            size, extended = 0, {}
        elif kind == b"x":
            extended |= _pax_records(file.read(offset, size), file.path)
        elif kind == b"L":
            extended["path"] = decode_name(file.read(offset, size).rstrip(b"\0"))
        elif kind not in b"gK":
            size = int(extended.get("size", size))
            if offset + size > file.size:
                raise ValueError(f"shard {file.path} is truncated: a file ends at byte {offset + size} of {file.size}")
            if kind in b"07\0":
                yield extended.get("path") or _short_name(header), offset, size
            extended = {}
        offset += -(-size // BLOCK) * BLOCK
    if not offset:
        raise ValueError(f"shard {file.path} is empty: a tar without files")
    if any(file.read(offset, 1 << 16)):
        raise ValueError(f"shard {file.path} has data after the tar's end mark: is it several tars in one file?")


def _checked_size(header: bytes, offset: int, path: str) -> int:
    """The size of a file according to its header. Raises ValueError if the header's checksum is wrong."""
    try:
        expected = int(header[148:156].strip(b"\0 "), 8)
        if header[124] == 0x80:  # GNU: binary, since 11 octal digits end at 8 GiB
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        expected = size = -1
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")  # its own field counts as spaces
    if expected != checksum:
        problem = f"damaged at byte {offset}" if offset else "not a tar"
        if header.startswith(b"\x1f\x8b"):
            problem += ": it is compressed, so samples cannot be read at random"
        raise ValueError(f"shard {path} is {problem}")
    return size


def _short_name(header: bytes) -> str:
    """The name in the header itself: 100 bytes, and 155 bytes of folders in ustar."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return decode_name(prefix + b"/" + name if prefix else name)


def _pax_records(content: bytes, path: str) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header."""
    records = {}
    while content.strip(b"\0"):
        length = content.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise ValueError(f"shard {path} is damaged: it has an invalid pax header")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[decode_name(key)] = decode_name(value)
        content = content[int(length) :]
    if any(key.startswith("GNU.sparse.") for key in records):
        raise ValueError(f"shard {path} contains sparse files: write it without --sparse")
    return records
