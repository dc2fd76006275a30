"""The files in kernels/, and the table of those that an op's benchmark rows depend on."""

from __future__ import annotations

import re

import pytest

from benchmarks.harness.rows import KERNELS
from tests.conftest import ROOT


def with_imports(file: str) -> set[str]:
    """A file in kernels/, and all those that it imports from there, directly or not."""
    found, pending = set(), {file}
    while pending:
        name = pending.pop()
        found.add(name)
        imported = re.findall(r"^from \.(\w+) import", (ROOT / "kernels" / name).read_text(), re.MULTILINE)
        pending |= {f"{module}.py" for module in imported} - found
    return found


@pytest.mark.parametrize("op", KERNELS)
def test_results_become_stale_when_any_file_of_the_op_changes(op: str) -> None:
    assert set(KERNELS[op]) == with_imports(KERNELS[op][0])


def test_every_kernel_file_belongs_to_an_op() -> None:
    assert {name for names in KERNELS.values() for name in names} == {
        path.name for path in (ROOT / "kernels").glob("*.py")
    }
