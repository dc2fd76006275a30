"""A table of images and captions -> shards. Images are URLs, files, or in the table itself (parquet, Hugging Face).

Conceptual Captions' and LAION's tables are such; they are packed in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .download import Downloader, DownloadOptions
from .folder import finish
from .report import PackReport, Tally
from .rows import CAPTION_COLUMNS, IMAGE_COLUMNS, Table, read_table
from .samples import Item, Packed, Unusable, clean_captions, json_values, pack_item
from .writer import PackOne, PackOptions, output_folder, write_shards


def pack_table(
    source: str | Path,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    download: DownloadOptions | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> PackReport:
    """Pack the images that a table lists, downloading those that are URLs.

    Paths are relative to the table's folder. Everything that is not taken is counted by reason, in the report and in
    `out`/report.json. To resume, call it again. Raises ValueError if the table or one of its columns is missing, `out`
    is not empty or nothing is left to pack.
    """
    options, download = options or PackOptions(), download or DownloadOptions()
    with output_folder(Path(out)) as working, Downloader(download) as downloader:
        report = PackReport(folder=Path(out))
        table = read_table(Path(source), report)
        items = table_items(table, report, options, image_column=image_column, caption_column=caption_column)
        with ThreadPoolExecutor(download.threads, thread_name_prefix="download") as pool:

            def map_items(pack_one: PackOne, chunk: list[Item]) -> Iterator[Packed | Unusable]:
                pack = partial(pack_item, read=downloader.read, max_side=options.max_side, captions=options.captions)
                return pool.map(partial(_pack, pack), chunk)

            write_shards(items, working, report, options, map_items=map_items)
        finish(report, working)
    return report


def table_items(
    table: Table, report: PackReport, options: PackOptions, *, image_column: str | None, caption_column: str | None
) -> Iterator[Item]:
    """The rows as items. Rows without an image, or with an unreadable caption, are counted in `report`."""
    image = table.column(image_column, IMAGE_COLUMNS, flag="--image-column", holds="images or their URLs")
    caption = None
    if options.captions:
        caption = table.column(caption_column, CAPTION_COLUMNS, flag="--caption-column", holds="captions")
        report.notes.append(f'images are in the column "{image}", captions in "{caption}"')
    return _items(table, report, image, caption)


def _items(table: Table, tally: Tally, image: str, caption: str | None) -> Iterator[Item]:
    for where, row in table.rows:
        value = row.get(image)
        try:
            captions = clean_captions([row.get(caption)]) if caption else ()
            source, name = _image(value, table.path.parent)
        except Unusable as problem:
            tally.skip(problem.reason, f"{where}: {problem.detail}" if problem.detail else where)
            continue
        if caption and not captions:
            blank = isinstance(row.get(caption), str)
            tally.skip("empty caption" if blank else "row without caption", where)
            continue
        values = {key: value for key, value in row.items() if key not in (image, caption)}
        named = {"url" if isinstance(source, str) else "path": name or where}
        yield Item(name or where, source, captions, json_values(values) | named)


def _image(value: Any, folder: Path) -> tuple[Path | str | bytes, str]:
    """(file, URL or content, name) of a cell. Raises Unusable if it has none."""
    if isinstance(value, dict):  # Hugging Face's Image: {"bytes": ..., "path": ...}
        if value.get("bytes"):
            return value["bytes"], str(value.get("path") or "")
        value = value.get("path")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value), ""
    if not isinstance(value, str) or not value.strip():
        raise Unusable("row without image")
    value = value.strip()
    if value.startswith(("http://", "https://")):
        return value, value
    if "://" in value:
        raise Unusable("URL that is neither http nor https", value)
    return folder / value, value


def _pack(pack: PackOne, item: Item) -> Packed | Unusable:
    try:
        return pack(item)
    except Unusable as problem:
        return problem
