"""docs/bad-input.md: what becomes of bad input, by making it and using it.

    python docs/generate/bad_input.py

writes the page. tests/data/test_bad_input.py compares it with what happens now.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/bad-input.md"
TEXT = """# Bad input

{count} kinds of bad input, what happens, and the line that is said: on the console, in the log, or in `report.json`.
Nothing is skipped without being counted. This page is written by `python docs/generate/bad_input.py`, which makes each
kind and uses it as training or packing does; a test compares it with what happens. FOLDER and HOST stand for a
temporary folder and a local server.

Records of training have the counts `bad`, `lost`, `excluded` and `filtered`. Training stops if they exceed
`data.max_bad_share`, except for `filtered`, which is what `data.where` asks for. [Data](data.md) describes the rest.
"""


def page(rows: dict[str, list[tuple[str, str, str]]]) -> str:
    """Markdown of the rows (kind, what happens, line) of each place."""
    parts = [TEXT.format(count=sum(map(len, rows.values())))]
    for place, found in rows.items():
        table = [f"| {kind} | {happens} | {_code(line)} |" for kind, happens, line in found]
        parts.append("\n".join([f"## {place}\n", "| input | what happens | line |", "| --- | --- | --- |", *table, ""]))
    return "\n".join(parts)


def _code(line: str) -> str:
    return f"`{line}`".replace("|", "\\|")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.data.bad_input import PLACES, rows_of

    with tempfile.TemporaryDirectory() as name:
        rows = {place: rows_of(place, Path(name) / str(number)) for number, place in enumerate(PLACES)}
    PAGE.write_text(page(rows))
    print(f"{PAGE}: {sum(map(len, rows.values()))} kinds")


if __name__ == "__main__":
    main()
