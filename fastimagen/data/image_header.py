"""The size of an image from the header of its file, without decoding it."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from ..images import DECODE_ERRORS, FORMATS, ORIENTATION_TAG

MAX_SIDE = 0xFFFF
"""Longer sides count as this; of an image of at most 8192 x 8192 pixels the other one is then short."""

FIRST_READS = (1 << 12, 1 << 16)
"""Bytes that are read first: most headers are in them. If they are not enough, the whole file is read."""

TURNED = range(5, 9)
"""EXIF orientations that swap width and height."""


def image_size(read: Callable[[], bytes]) -> tuple[int, int] | None:
    """Width and height of an image, upright, from its header; None if it is not an image.

    An EXIF orientation that a PNG has behind its pixels does not count.
    """
    try:
        with Image.open(io.BytesIO(read()), formats=FORMATS) as image:
            width, height = image.size
            late = image.format == "PNG" and "exif" not in image.info  # to look for it, Pillow would decode the image
            turned = not late and image.getexif().get(ORIENTATION_TAG) in TURNED
            return (height, width) if turned else (width, height)
    except DECODE_ERRORS:
        return None


def stored_size(read: Callable[[int], bytes], length: int) -> tuple[int, int]:
    """Width and height of an image of `length` bytes, of which `read` returns the first; (0, 0) if it is none."""
    for first in (*(size for size in FIRST_READS if size < length), length):
        if (size := image_size(lambda first=first: read(first))) is not None:  # type: ignore[misc]
            return min(size[0], MAX_SIDE), min(size[1], MAX_SIDE)
    return 0, 0
