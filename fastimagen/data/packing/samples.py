"""One image with its captions: as a source lists it, and as the files of a sample in a shard."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...images import IMAGE_EXTENSIONS, file_extension, open_rgb

JPEG_QUALITY = 95
"""Of images that --max-side makes smaller."""

LOSSY = ("jpg", "webp", "avif", "jp2")
"""Formats that are written as JPEG when an image is made smaller; others are written as PNG."""


class Unusable(ValueError):
    """A sample cannot be packed. reason: what the report counts; detail: more about this sample, or empty."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Item:
    """One sample as a source lists it.

    name: for reports; image: a file, a URL or the file's content; captions: without blank ones; metadata: JSON values.
    """

    name: str
    image: Path | str | bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """The files of a sample, by extension, and whether its image was made smaller."""

    files: dict[str, bytes]
    resized: bool


Read = Callable[[Item], bytes]


def clean_captions(values: Iterable[Any]) -> tuple[str, ...]:
    """Texts and lists of texts as captions: stripped, without blank and repeated ones.

    Raises Unusable for a value that is not text, and for text that is not UTF-8.
    """
    captions: list[str] = []
    for value in values:
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            captions += clean_captions(value)
        elif not isinstance(value, str):
            raise Unusable("caption is not text", f"{value!r:.40}")
        elif not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Unusable("caption not in UTF-8")
        else:
            captions.append(value.strip())
    return tuple(dict.fromkeys(caption for caption in captions if caption))


def json_values(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row that JSON can hold; others, such as dates, as text. Bytes are left out."""
    kept: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, (bytes, bytearray)) or (isinstance(value, dict) and "bytes" in value):
            continue
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            kept[key] = str(value)
    return kept


def read_local(item: Item) -> bytes:
    """The image file of an item that is not a URL. Raises Unusable."""
    if isinstance(item.image, bytes):
        return item.image
    try:
        return Path(item.image).read_bytes()
    except FileNotFoundError:
        raise Unusable("image not found") from None
    except OSError as error:
        raise Unusable("unreadable file", str(error.strerror)) from None


def read_usable(item: Item, read: Read, *, captions: bool) -> tuple[bytes, Image.Image]:
    """The image file of an item that can be packed, and the image. captions: whether it needs one. Raises Unusable."""
    if captions and not item.captions:
        raise Unusable("image without caption")
    data = read(item)
    try:
        return data, open_rgb(data)  # decodes all of it, so that damage is found now
    except ValueError as error:
        raise Unusable("unreadable image", str(error).removeprefix("unreadable image: ")) from None


def pack_item(item: Item, read: Read, *, max_side: int | None, captions: bool) -> Packed:
    """Read an item and make it a sample. The image is stored as it is, unless its longer side exceeds `max_side`.

    captions: whether the sample has them; otherwise only the image is packed. Raises Unusable.
    """
    data, image = read_usable(item, read, captions=captions)
    extension = file_extension(data)
    metadata = {**item.metadata, "width": image.width, "height": image.height}
    resized = max_side is not None and max(image.size) > max_side
    if resized:
        assert max_side is not None
        metadata |= {"original_width": image.width, "original_height": image.height}
        scale = max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        metadata |= {"width": image.width, "height": image.height}
        extension = "jpg" if extension in LOSSY else "png"
        buffer = io.BytesIO()
        if extension == "jpg":
            image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        else:
            image.save(buffer, "PNG")
        data = buffer.getvalue()
    elif isinstance(item.image, Path) and item.image.suffix[1:].lower() in IMAGE_EXTENSIONS:
        extension = item.image.suffix[1:].lower()
    files = {extension: data}
    if captions:
        files["txt"] = item.captions[0].encode()
        if len(item.captions) > 1:
            metadata["captions"] = list(item.captions)
    files["json"] = json.dumps(metadata).encode()
    return Packed(files, resized)
