"""Bad input of all kinds, what fastimagen does with it, and the line that it says: measured, for docs/bad-input.md.

Every function makes bad input of one place, uses it as training or packing does, and returns a row for each kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.data.bad_input.in_shards import embeddings, images_in_shards, samples_in_shards, shards
from tests.data.bad_input.making import Row
from tests.data.bad_input.packing import packing_folders, packing_tables
from tests.data.bad_input.remote import remote_shards

PLACES: dict[str, Callable[[Path], list[Row]]] = {
    "Images in shards": images_in_shards,
    "Samples in shards": samples_in_shards,
    "Shards": shards,
    "Remote shards": remote_shards,
    "Embeddings": embeddings,
    "Folders of images": packing_folders,
    "Tables of images": packing_tables,
}


def rows_of(place: str, folder: Path) -> list[Row]:
    """The rows of a place; in the lines, FOLDER and HOST stand for a temporary folder and a local server."""
    folder.mkdir(parents=True)

    def shown(line: str) -> str:
        line = re.sub(r"127\.0\.0\.1:\d+", "HOST", line.replace(str(folder), "FOLDER"))
        return re.sub(r"127\.0\.0\.1\d+-[0-9a-f]{8}", "HOST", line)

    return [Row(row.kind, row.happens, shown(row.line)) for row in PLACES[place](folder)]
