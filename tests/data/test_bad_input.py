"""Every kind of bad input is counted or refused in one line: what docs/bad-input.md says is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate.bad_input import PAGE, page
from tests.data.bad_input import PLACES, rows_of


@pytest.mark.parametrize("place", PLACES)
def test_the_table_of_bad_input_is_what_happens(place: str, tmp_path: Path) -> None:
    rows = rows_of(place, tmp_path / "bad")
    for row in rows:
        assert row.line and "\n" not in row.line and "Traceback" not in row.line and len(row.line) < 300, row
    assert len({row.kind for row in rows}) == len(rows)
    written = PAGE.read_text()
    start = written.index(f"## {place}\n")
    end = written.find("\n## ", start)
    expected = page({place: rows}).partition("## ")[2]
    assert ("## " + expected).strip() == written[start : None if end < 0 else end].strip()
