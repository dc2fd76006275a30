"""Result rows and tables: an interrupt loses nothing, and the tables say what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.cases import step
from benchmarks.harness.rows import Results, kernel_digest, read
from fastimagen.networks.convolution import Conv2d
from tests.conftest import ROOT

HERE = {
    "device": "NVIDIA Test",
    "clocks": None,
    "threads": 1,
    "versions": {"torch": "0"},
    "commit": "abc",
    "date": "2026-01-01",
}
ROW = {"op": "threshold", "shape": "B1 8x8", "dtype": "float32", "mode": "forward", "timer": "events"}


# ---- rows


def test_an_interrupt_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "device/2026-01-01.json"
    results = Results(path, HERE)
    results.add(**ROW, provider="ours, torch", ms=(1.0, 2.0, 3.0))
    before = path.read_text()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.add(**ROW, provider="topk", ms=(1.0, 2.0, 3.0))
    monkeypatch.undo()
    assert path.read_text() == before
    again = Results(path, HERE)
    again.add(**ROW, provider="topk", ms=(4.0, 5.0, 6.0))
    again.add(**ROW, provider="topk", ms=(7.0, 8.0, 9.0))
    assert [(row["provider"], row["ms"][1]) for row in read(path)] == [("ours, torch", 2.0), ("topk", 8.0)]


# ---- report


def table(*rows: dict) -> str:
    return report.TABLES["threshold"](report.Measured([{**ROW, **HERE, **row} for row in rows]))


def test_a_row_older_than_its_kernel_is_stale() -> None:
    fresh = {"provider": "ours, triton", "ms": [0.1, 0.2, 0.3], "kernels": kernel_digest("threshold")}
    assert "200 µs" in table(fresh) and "stale" not in table(fresh)
    assert "200 µs (stale)" in table(fresh | {"kernels": "of another day"})


def test_what_was_never_measured_says_so() -> None:
    shown = table(
        {"provider": "topk", "ms": [1.0, 2.0, 3.0]}, {"provider": "topk", "shape": "B2 8x8", "missing": "out of memory"}
    )
    assert "| B2 8x8, forward | not measured |" in shown and "| B1 8x8, forward | 2 ms |" in shown
    assert "make gpu-check` measures it" in report.TABLES["step"](report.Measured([]))


def test_shares_are_of_the_rates_of_the_same_run() -> None:
    shown = table({"provider": "ours, triton", "ms": [1.0, 2.0, 3.0], "bytes": 4e6, "gbs": 4.0, "tflops": 1.0})
    assert "| 50 % |" in shown  # 4 MB in 2 ms are 2 GB/s


def test_a_mark_without_a_table() -> None:
    with pytest.raises(ValueError, match='no table "speed"; there are cpu, families, engine, step'):
        report.fill("<!-- benchmarks: speed -->\n<!-- end of benchmarks -->", report.Measured([]))


def test_tables_and_plots_are_those_of_the_result_files() -> None:
    """After a measurement: make report."""
    old = [path.name for path, text in report.generated().items() if not path.exists() or path.read_text() != text]
    assert old == []


def test_result_files_are_complete() -> None:
    for path in sorted((ROOT / "benchmarks/results").glob("*/[0-9]*.json")):
        for row in json.loads(path.read_text())["rows"]:
            assert {"op", "shape", "dtype", "mode", "provider", "device", "versions", "date", "commit"} <= row.keys()
            assert "ms" in row or "missing" in row or "peak_bytes" in row, row
            assert not row["commit"].endswith("+"), f"{path.name} measured sources that were not committed"


def test_breakdown_counts_what_an_op_calls_with_it() -> None:
    """The convolution's weight gradient by products, its copies too, is convolution; a bare product is not."""
    conv, x = Conv2d(128, 128, 3, padding=1), torch.randn(4, 128, 16, 16)
    parts = step.breakdown(lambda: conv(x).sum().backward(), torch.device("cpu"))
    assert parts["convolution"] > 0.8 * sum(parts.values())
    assert parts["linear"] == 0
    parts = step.breakdown(lambda: torch.randn(256, 256) @ torch.randn(256, 256), torch.device("cpu"))
    assert parts["linear"] > 0 == parts["convolution"]
