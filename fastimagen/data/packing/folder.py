"""A folder of images -> shards.

Captions come from Hugging Face's metadata files (metadata.jsonl, .csv or .parquet, with a column file_name), and from
files beside an image: cat.txt, cat.caption, cat.json. What several of them say are several captions of the image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_json
from ...images import IMAGE_EXTENSIONS
from ...seeds import random_bits
from ..order import SAMPLES
from .report import PackReport, Tally
from .rows import CAPTION_COLUMNS, read_table
from .samples import Item, Unusable, clean_captions, json_values
from .writer import REPORT, PackOptions, output_folder, usable_items, write_shards

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXTS = (".txt", ".caption", ".json")
"""Files beside an image: KEY.txt and KEY.caption hold its caption, KEY.json its metadata, among them a caption."""

FILE_COLUMNS = ("file_name",)


@dataclass(frozen=True)
class CaptionOptions:
    """Where captions are. column: of metadata, or key of KEY.json; None takes the first of CAPTION_COLUMNS.

    per_line: each line of KEY.txt and KEY.caption is a caption of its own.
    """

    column: str | None = None
    per_line: bool = False


def pack_folder(
    source: str | Path,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    validation: float = 0.0,
    captions: CaptionOptions | None = None,
) -> PackReport:
    """Pack all images below `source`.

    They are shuffled, always in the same order, so that images of one folder do not fill whole shards.
    validation: share of the images, in [0, 1). Above 0, that share goes into `out`/val and the rest into `out`/train.
    Everything that is not taken is counted by reason, in the report and in `out`/report.json. Raises ValueError if
    `source` is not a folder, `out` is not empty or nothing is left to pack; then there is no `out`.
    """
    options = options or PackOptions()
    if not 0 <= validation < 1:
        raise ValueError(f"the validation share must lie in [0, 1), got {validation}")
    with output_folder(Path(out)) as working:
        report = PackReport(folder=Path(out))
        items = folder_items(Path(source), report, captions or CaptionOptions())
        order = np.argsort(random_bits(0, SAMPLES, (0, 0), len(items)), kind="stable")
        items = [items[index] for index in order]
        if validation:
            items = usable_items(items, report, options)
            held_out = _choose_held_out([item.name for item in items], validation, report)
            write_shards((item for item in items if item.name not in held_out), working / "train", report, options)
            write_shards((item for item in items if item.name in held_out), working / "val", report, options)
            report.held_out = len(held_out)
        else:
            write_shards(items, working, report, options)
        finish(report, working)
    return report


def finish(report: PackReport, working: Path) -> None:
    """Write the report. Raises ValueError if nothing was packed."""
    if not report.packed:
        raise ValueError(f"nothing to pack for {report.folder}: {'; '.join(report.reasons()) or 'there are no images'}")
    write_json(working / REPORT, report.as_json())


def _choose_held_out(names: list[str], share: float, report: PackReport) -> set[str]:
    """The names of the usable images in the validation split: those with the smallest hashes, at least one.

    The choice depends on the names alone, so that packing the same folder again holds out the same images.
    """
    if not names:
        raise ValueError(f"nothing to pack for {report.folder}: {'; '.join(report.reasons()) or 'there are no images'}")
    if len(names) < 2:
        raise ValueError(f"a validation split needs at least 2 images with captions, found {len(names)}")
    ranked = sorted(names, key=lambda name: blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())
    count = max(1, round(share * len(names)))
    return set(ranked[: min(count, len(names) - 1)])


# ---- what a folder contains


def folder_items(root: Path, tally: Tally, options: CaptionOptions) -> list[Item]:
    """Every image below a folder with its captions, sorted by name; images without a caption have none.

    Counted are files that are neither an image nor a caption of one, and captions that cannot be read.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of images")
    root = Path(os.path.normpath(root))
    files = sorted(_files(root, tally))
    images = [path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    known = set(images)
    listed: dict[Path, list[dict[str, Any]]] = {}
    for path in files:
        if path.name in METADATA:
            for where, image, row in _metadata(path, tally, options):
                if image in known:
                    listed.setdefault(image, []).append(row)
                else:
                    tally.skip("row of an image that is not there", where)
    beside = _files_beside(files, known, tally, root)
    items = []
    for path in images:
        name = str(path.relative_to(root))
        try:
            items.append(_item(path, name, listed.get(path, []), beside.get(path.with_suffix(""), []), options))
        except Unusable as problem:
            tally.skip(problem.reason, f"{name}: {problem.detail}" if problem.detail else name)
    return items


def _files(root: Path, tally: Tally) -> Iterator[Path]:
    """All files below a folder. Counted are links that lead nowhere or to folders, and folders that cannot be read."""

    def unreadable(error: OSError) -> None:
        tally.skip("unreadable folder", f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                tally.skip("link to a folder", Path(folder, name).relative_to(root))
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path
            else:
                tally.skip("broken link" if path.is_symlink() else "not a file", path.relative_to(root))


def _files_beside(files: list[Path], images: set[Path], tally: Tally, root: Path) -> dict[Path, list[Path]]:
    """The caption files of each image, by its path without suffix. Files without an image are counted."""
    stems = {path.with_suffix("") for path in images}
    beside: dict[Path, list[Path]] = {}
    for path in files:
        if path in images or path.name in METADATA:
            continue
        if path.suffix.lower() not in TEXTS:
            kind = path.suffix.lower() or path.name
            tally.skip(f"not an image that can be read, and not a caption ({kind})", path.relative_to(root))
        elif path.with_suffix("") in stems:
            beside.setdefault(path.with_suffix(""), []).append(path)
        else:
            tally.skip("caption without image", path.relative_to(root))
    return beside


def _metadata(path: Path, tally: Tally, options: CaptionOptions) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(where, image, row) of each row of a metadata file. The row has its caption under the key None."""
    table = read_table(path, tally)
    file_column = table.column(None, FILE_COLUMNS, flag="file_name", holds="names of images, as Hugging Face's do")
    caption_column = table.column(options.column, CAPTION_COLUMNS, flag="--caption-column", holds="captions")
    for where, row in table.rows:
        name = row.get(file_column)
        where = f"{path.parent.name}/{where}"
        if not isinstance(name, str) or not name:
            tally.skip("row without a file name", where)
            continue
        values = {key: value for key, value in row.items() if key not in (file_column, caption_column)}
        yield where, Path(os.path.normpath(path.parent / name)), {"captions": row.get(caption_column), "values": values}


def _item(path: Path, name: str, listed: list[dict[str, Any]], beside: list[Path], options: CaptionOptions) -> Item:
    """The image with all its captions and metadata. Raises Unusable if a caption cannot be read."""
    captions: list[Any] = [row["captions"] for row in listed]
    metadata: dict[str, Any] = {}
    for row in listed:
        metadata |= json_values(row["values"])
    found_blank = any(caption is not None for caption in captions)
    for file in sorted(beside, key=lambda file: TEXTS.index(file.suffix.lower())):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise Unusable("caption not in UTF-8") from None
        except OSError as error:
            raise Unusable("unreadable caption file", f"{file.name}: {error.strerror}") from None
        if file.suffix.lower() == ".json":
            content = _json_object(text, file)
            keys = [options.column] if options.column else [key for key in CAPTION_COLUMNS if key in content]
            captions += [content.get(key) for key in keys[:1]]
            metadata |= {key: value for key, value in content.items() if key not in keys[:1]}
        else:
            captions += text.splitlines() if options.per_line else [text]
            found_blank = True
    cleaned = clean_captions(captions)
    if found_blank and not cleaned:
        raise Unusable("empty caption")
    return Item(name, path, cleaned, {"path": name, **metadata})


def _json_object(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise Unusable("damaged .json", file.name) from None
    if not isinstance(content, dict):
        raise Unusable("damaged .json", f"{file.name} is not an object")
    return content
