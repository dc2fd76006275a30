"""Tables of images and captions as rows: CSV, TSV, JSON lines, parquet, and Hugging Face data sets on disk."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...extras import import_extra
from ...files import first_line, read_json_object
from .report import Tally

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")
"""Suffixes of tables."""

IMAGE_COLUMNS = (
    "url",
    "image_url",
    "image",
    "file_name",
    "filename",
    "image_path",
    "path",
    "file",
    "img",
    "jpg",
    "png",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "description", "sentences", "top_caption", "title")
"""Names of columns, best first; upper and lower case are the same."""

Row = tuple[str, dict[str, Any]]  # where it stands, for reports; column -> value


@dataclass(frozen=True)
class Table:
    """Column names, and the rows as they are read. Rows that cannot be read are counted in the tally given."""

    path: Path
    columns: Sequence[str]
    rows: Iterable[Row]

    def column(self, given: str | None, names: Sequence[str], *, flag: str, holds: str) -> str:
        """The column that `given` names, or the first of `names` that the table has.

        Raises ValueError that lists the columns and names the flag. holds: what the column has, for the error.
        """
        if given is not None:
            if given not in self.columns:
                raise ValueError(f"{flag} {given}: {self.path} has the columns {', '.join(self.columns)}")
            return given
        lower = {column.lower(): column for column in reversed(self.columns)}
        for name in names:
            if name in lower:
                return lower[name]
        raise ValueError(
            f"{self.path}: none of its columns ({', '.join(self.columns) or 'it is empty'}) is known to hold {holds}: "
            f"name it with {flag}"
        )


def is_table(path: Path) -> bool:
    """Whether a path is a table that `read_table` reads, by its name."""
    return path.suffix.lower() in KINDS or (path / "state.json").is_file()


def read_table(path: Path, tally: Tally) -> Table:
    """Open a table. tally: counts the rows that cannot be read.

    Raises ValueError for a file that is missing, of another kind, or damaged; ImportError without pyarrow.
    """
    if path.is_dir():
        return _arrow_folder(path)
    if not path.is_file():
        raise ValueError(f"there is no table {path}")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, tally)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".arrow":
        return _arrow([path])
    if suffix in (".csv", ".tsv"):
        return _separated(path, tally, "," if suffix == ".csv" else "\t")
    raise ValueError(f"{path} is not a table: expected one of {', '.join(KINDS)}, or a Hugging Face data set on disk")


# ---- text


def _separated(path: Path, tally: Tally, delimiter: str) -> Table:
    """CSV with quotes, or TSV without them. Without a header (Conceptual Captions), the cell with a URL tells."""
    first = next(_cells(path, delimiter), None)
    if first is None:
        raise ValueError(f"{path} is empty")
    urls = [number for number, cell in enumerate(first) if "://" in cell]
    columns = [cell.strip() for cell in first]
    if urls:
        caption = max((n for n in range(len(first)) if n != urls[0]), key=lambda n: len(first[n]), default=None)
        names = {urls[0]: "url", caption: "caption"}
        columns = [names.get(number, f"column_{number + 1}") for number in range(len(first))]

    def rows() -> Iterator[Row]:
        lines = _cells(path, delimiter)
        if not urls:
            next(lines)
        for number, cells in enumerate(lines, start=1 if urls else 2):
            if len(cells) != len(columns):
                tally.skip("row with another number of columns", f"{path.name}:{number}")
            else:
                yield f"{path.name}:{number}", dict(zip(columns, cells))

    return Table(path, columns, rows())


def _cells(path: Path, delimiter: str) -> Iterator[list[str]]:
    """The rows of a CSV or TSV file; bytes that are not UTF-8 become surrogates, and blank lines are left out."""
    csv.field_size_limit(sys.maxsize)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            lines = (line.replace("\0", "") for line in file)
            yield from filter(None, csv.reader(lines, delimiter=delimiter, quoting=quoting))
        except csv.Error as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def _json_lines(path: Path, tally: Tally) -> Table:
    """Objects, one on each line. The columns are the keys of the first one."""

    def rows(counted: Tally) -> Iterator[Row]:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield f"{path.name}:{number}", row
                else:
                    counted.skip("row that is not a JSON object", f"{path.name}:{number}")

    first = next(rows(Tally()), None)
    if first is None:
        raise ValueError(f'{path}: no line is a JSON object, such as {{"image": "cat.jpg", "caption": "a cat"}}')
    return Table(path, list(first[1]), rows(tally))


# ---- pyarrow


def _pyarrow() -> Any:
    import_extra("pyarrow.parquet", user="reading parquet and arrow tables", extra="data")
    return import_extra("pyarrow", user="reading parquet and arrow tables", extra="data")


def _parquet(path: Path) -> Table:
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file or is damaged: {first_line(error)}") from None

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=100):  # rows may hold images
                for row in batch.to_pylist():
                    yield f"{path.name}:{number}", row
                    number += 1
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged after row {number}: {first_line(error)}") from None

    return Table(path, file.schema_arrow.names, rows())


def _arrow_folder(folder: Path) -> Table:
    """A data set that Hugging Face's `save_to_disk` has written."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(read_json_object(folder / "dataset_dict.json").get("splits", []))
        raise ValueError(f"{folder} has several splits ({splits}): give the folder of one, {folder}/SPLIT")
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face data set on disk: it has no state.json")
    files = read_json_object(folder / "state.json").get("_data_files", [])
    if not files:
        raise ValueError(f"{folder}/state.json lists no data files")
    return _arrow([folder / entry["filename"] for entry in files])


def _arrow(paths: Sequence[Path]) -> Table:
    arrow = _pyarrow()

    def batches(path: Path) -> Iterator[Any]:
        try:
            with open(path, "rb") as file:
                yield from arrow.ipc.open_stream(file)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged or missing: {first_line(error)}") from None

    def rows() -> Iterator[Row]:
        for path in paths:
            number = 0
            for batch in batches(path):
                for start in range(0, len(batch), 100):  # rows may hold images
                    for row in batch.slice(start, 100).to_pylist():
                        yield f"{path.name}:{number}", row
                        number += 1

    first = next(batches(paths[0]), None)
    return Table(paths[0], [] if first is None else first.schema.names, rows())
