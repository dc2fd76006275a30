"""What a collection of images and captions looks like: counts, sizes, colours, captions. `fastimagen init` reads it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..images import FORMATS, open_rgb
from .image_header import image_size
from .packing.folder import CaptionOptions, folder_items
from .packing.report import PackReport
from .packing.rows import is_table, read_table
from .packing.samples import Item, Unusable, read_local
from .packing.table import table_items
from .packing.writer import PackOptions
from .remote.transfer import URL
from .shards import list_shards, open_shards

T = TypeVar("T")
Shard = TypeVar("Shard", bound=Sized)
Read = Callable[[], bytes]

MAX_HEADERS = 2000
"""Images whose size is read, evenly spread over all."""

MAX_DECODED = 64
"""Images that are decoded to see whether they are grey."""

GREY_TOLERANCE = 8
"""Largest difference between the channels of a grey image, of 255: JPEG's chroma is not exact."""


@dataclass(frozen=True)
class Survey:
    """Figures about a collection. Sizes and captions are those of a part of a large collection."""

    packed: bool
    """Whether the images are in shards already."""
    count: int
    """Images with captions."""
    uncaptioned: int
    """Images that cannot be used, because they have no caption."""
    shorter_sides: tuple[int, ...]
    """Shorter sides in pixels, ascending."""
    square_share: float
    """Share of the images that are square."""
    kept_area: float
    """Mean share of the area that lies in the central square."""
    grey: bool
    """Whether all decoded images are grey."""
    caption: str
    """The first caption, on one line."""
    most_words: int
    """Words of the longest caption."""
    foreign_letters: float
    """Share of the letters in captions that are not Latin: T5 has no tokens for most of them."""

    def side_quantile(self, share: float) -> int:
        """The shorter side that `share` of the images fall below."""
        return self.shorter_sides[int(share * (len(self.shorter_sides) - 1))]


def survey(source: str | Path) -> Survey:
    """Look at a folder of images with captions, a table of them, or shards.

    Raises ValueError, with one line that says what to do, if there is nothing to train on.
    """
    path = Path(source)
    if is_table(path):
        return _survey_items(source, *_listed_items(path))
    if path.is_dir() and not any(path.glob("*.tar")):
        report = PackReport()
        items = folder_items(path, report, CaptionOptions())
        return _survey_items(source, items, report.skipped.get("empty caption", 0))
    if any(URL.match(shard) for shard in list_shards(str(source))):
        raise ValueError(
            f"{source} is remote: look at one downloaded shard, and put the URL into data.shards afterwards"
        )
    shards = open_shards(str(source))
    chosen = spread_samples(shards, MAX_HEADERS)
    readers = [partial(shard.image, index) for shard, index in chosen]
    captions = [shard.caption(index) for shard, index in chosen]
    excluded = sum(sum(shard.excluded.values()) for shard in shards)
    return _survey(readers, captions, excluded, packed=True, count=sum(map(len, shards)))


def _listed_items(path: Path) -> tuple[list[Item], int]:
    """The samples of a table whose images are here, and the number of rows without a caption."""
    report = PackReport()
    items = list(table_items(read_table(path, report), report, PackOptions(), image_column=None, caption_column=None))
    if any(isinstance(item.image, str) for item in items):
        raise ValueError(f"{path} lists URLs: pack them first (fastimagen shards table {path}), and give the shards")
    uncaptioned = report.skipped.get("empty caption", 0) + report.skipped.get("row without caption", 0)
    return [item for item in items if isinstance(item.image, bytes) or Path(item.image).is_file()], uncaptioned


def _survey_items(source: str | Path, items: list[Item], uncaptioned: int) -> Survey:
    captioned = [item for item in items if item.captions]
    uncaptioned += len(items) - len(captioned)
    if not captioned:
        found = f"{uncaptioned} images, but none has a caption" if uncaptioned else "no images"
        raise ValueError(
            f"{source}: found {found}: put a caption beside each image, cat.jpg and cat.txt; for a cascade that reads "
            f"no captions, pack them with --no-captions and give the shards"
        )
    readers = [partial(_read, item) for item in captioned]
    return _survey(readers, [item.captions[0] for item in captioned], uncaptioned, packed=False)


def _read(item: Item) -> bytes:
    """The image file; nothing if it cannot be read."""
    try:
        return read_local(item)
    except Unusable:
        return b""


def _survey(
    readers: Sequence[Read], captions: Sequence[str], uncaptioned: int = 0, *, packed: bool, count: int | None = None
) -> Survey:
    """The figures of images that `readers` read, with their captions. count: if these are only a part."""
    sizes = [size for size in map(image_size, spread(readers, MAX_HEADERS)) if size is not None]
    if not sizes:
        raise ValueError(f"none of {len(readers)} images can be read; the formats are {', '.join(FORMATS)}")
    shorter = np.array([min(size) for size in sizes])
    longer = np.array([max(size) for size in sizes])
    letters = [letter for caption in spread(captions, MAX_HEADERS) for letter in caption if letter.isalpha()]
    foreign = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    return Survey(
        packed=packed,
        count=len(readers) if count is None else count,
        uncaptioned=uncaptioned,
        shorter_sides=tuple(sorted(shorter.tolist())),
        square_share=float((shorter == longer).mean()),
        kept_area=float((shorter / longer).mean()),
        grey=all(map(_is_grey, spread(readers, MAX_DECODED))),
        caption=" ".join(captions[0].split()),
        most_words=max((len(caption.split()) for caption in captions), default=0),
        foreign_letters=foreign / max(1, len(letters)),
    )


def spread_samples(shards: Sequence[Shard], most: int) -> list[tuple[Shard, int]]:
    """(shard, index) of at most `most` samples, evenly spread over all. Memory does not grow with their number."""
    ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)  # (shards,)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(0, total, max(1, -(-total // most)))  # (n,)
    owners = np.searchsorted(ends, numbers, side="right")
    return [
        (shards[owner], number - int(ends[owner]) + len(shards[owner]))
        for owner, number in zip(owners.tolist(), numbers.tolist())
    ]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items, evenly spread."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])


def _is_grey(read: Read) -> bool:
    """Whether an image has no colour; damaged images do not object."""
    try:
        pixels = np.asarray(open_rgb(read(), at_least=64)).astype(np.int16)  # (H, W, 3)
    except ValueError:
        return True
    return int((pixels.max(axis=2) - pixels.min(axis=2)).max()) <= GREY_TOLERANCE
