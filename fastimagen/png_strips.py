"""Large PNG files, decoded in strips that are shrunk at once: a whole one takes 4 bytes a pixel in Pillow.

A strip is made a PNG file of its own, which Pillow decodes: rows as the file has them, filtered, below the decoded last
row of the strip before, which the filters of the first one refer to (PNG specification, section 9).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type -> bytes of a pixel of 8 bits."""

MIN_PIXELS = 1 << 24
"""Smaller images are decoded whole, in up to 64 MiB: strips take an eighth more time."""

STRIP_PIXELS = 1 << 20
INPUT = 1 << 16
"""Bytes of the file that are decompressed at a time."""


def shrink_png(
    data: bytes, at_least: int, to_rgb: Callable[[Image.Image], Image.Image], turned: Callable[[Image.Image], bool]
) -> Image.Image | None:
    """A PNG file as RGB, its areas averaged by the largest whole number that leaves `at_least` pixels of its shorter
    side: what Image.reduce makes of the whole image without the pixels at the edges that are left over.

    to_rgb: converts a strip; turned: whether an image has an orientation. None for what needs the whole image at once:
    small ones, those that are not shrunk, interlaced, animated, turned, or not of 8 bits. Raises OSError or zlib.error
    for damaged files.
    """
    width, height, depth, color, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    factor = min(width, height) // at_least
    if width * height < MIN_PIXELS or factor < 2 or depth != 8 or interlace:
        return None
    chunks = list(_chunks(data))
    kinds = {kind for kind, _, _ in chunks}
    others = [data[start - 8 : end + 4] for kind, start, end in chunks if kind not in (b"IHDR", b"IDAT", b"IEND")]
    row = bytes(1 + CHANNELS[color] * width)
    if b"acTL" in kinds or turned(_strip(width, [row], others, data[24:29])):
        return None
    palette = [data[start - 8 : end + 4] for kind, start, end in chunks if kind in (b"PLTE", b"tRNS")]
    columns, rows = width // factor, height // factor
    left, top = (width - columns * factor) // 2, (height - rows * factor) // 2
    pixels = _Pixels(memoryview(data), [(start, end) for kind, start, end in chunks if kind == b"IDAT"])
    shrunk, above = Image.new("RGB", (columns, rows)), [pixels.read(top * len(row))]
    if top:
        above = [_last_row(_strip(width, above, palette, data[24:29]))]
    step = max(1, STRIP_PIXELS // width // factor)  # rows of the result
    for done in range(0, rows, step):
        count = min(step, rows - done)
        strip = _strip(width, [*above, pixels.read(count * factor * len(row))], palette, data[24:29])
        above, first = [_last_row(strip)], strip.height - count * factor
        box = (left, first, left + columns * factor, strip.height)
        shrunk.paste(to_rgb(strip).reduce(factor, box), (0, done))
    pixels.read((height - top - rows * factor) * len(row))
    return shrunk


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each chunk; the last one may be cut off."""
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        yield kind, position + 8, min(position + 8 + length, len(data))
        position += 12 + length


class _Pixels:
    """The decompressed content of the IDAT chunks at (start, end)."""

    def __init__(self, data: memoryview, places: list[tuple[int, int]]) -> None:
        self._input = (data[at : min(at + INPUT, end)] for start, end in places for at in range(start, end, INPUT))
        self._decompressor = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        """The next `size` bytes. Raises OSError if there are fewer."""
        parts: list[bytes] = []
        while size:
            rest = self._decompressor.unconsumed_tail or next(self._input, b"")
            part = self._decompressor.decompress(rest, size)
            if not part and not len(rest):
                raise OSError("image file is truncated")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _strip(width: int, rows: list[bytes], chunks: list[bytes], kind: bytes) -> Image.Image:
    """Filtered rows, one or several in each part, as an image. kind: the last five bytes of the header chunk."""
    content = b"".join(rows)
    height = len(content) // (1 + CHANNELS[kind[1]] * width)
    header = _chunk(b"IHDR", struct.pack(">II", width, height) + kind)
    parts = [SIGNATURE, header, *chunks, _chunk(b"IDAT", zlib.compress(content, 0)), _chunk(b"IEND", b"")]
    return Image.open(io.BytesIO(b"".join(parts)), formats=("PNG",))


def _last_row(strip: Image.Image) -> bytes:
    """As the file would have it without a filter."""
    return b"\0" + strip.crop((0, strip.height - 1, strip.width, strip.height)).tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
