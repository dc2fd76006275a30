"""The kernels of attention: what they compute, in Triton's interpreter, and what they compile to, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.kernels.aot import SHARED_LIMIT, compiled
from tests.kernels.interpreting import interpreted_tests

pytest.importorskip("triton")

PASSES = ("forward", "backward_rows", "backward_keys")  # that have tiles
KERNELS = {f"attention_{name}_kernel" for name in (*PASSES, "add_splits")}
MATRIX_INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_attention.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)


def check(row: dict[str, Any]) -> None:
    assert row["shared_bytes"] <= SHARED_LIMIT[row["target"]], row
    if row["label"].startswith("bfloat16") and row["kernel"] != "attention_add_splits_kernel":
        assert row["instructions"].get(MATRIX_INSTRUCTION[row["target"]]), row
    if row["target"] == "sm_90" and not (row["label"].startswith("float32 D=128")):
        assert row["spills"] == 0, row


@pytest.mark.slow
def test_64_channels_per_head_compile_for_hopper() -> None:
    rows = compiled("attention", ["sm_90"], "bfloat16 D=64")
    assert {row["kernel"] for row in rows} == KERNELS
    assert (
        len({row["constants"]["ROWS"] for row in rows if row["kernel"] == "attention_forward_kernel"}) == 2
    )  # few rows, many rows
    for row in rows:
        check(row)


@pytest.mark.slow
def test_64_channels_per_head_compile_for_other_gpus() -> None:
    rows = compiled("attention", ["sm_80", "sm_100", "gfx942"], "bfloat16 D=64 1024")
    assert {row["target"] for row in rows} == {"sm_80", "sm_100", "gfx942"}
    for row in rows:
        check(row)


def test_aot_results_cover_all_tiles_of_the_table() -> None:
    """benchmarks/results/aot.json has every tile; python -m benchmarks.studies.aot makes it again."""
    from fastimagen_kernels.attention_tiles import TILES

    rows = [
        row
        for row in json.loads((ROOT / "benchmarks/results/aot.json").read_text())["rows"]
        if row["file"] == "attention"
    ]
    for row in rows:
        check(row)
    measured = {
        (
            "float32" if row["label"].startswith("float32") else row["target"],
            row["kernel"].removeprefix("attention_").removesuffix("_kernel"),
            row["constants"].get("ROWS"),
            row["constants"].get("KEYS"),
            row["num_warps"],
            row["num_stages"],
        )
        for row in rows
    }
    shipped = {
        (target, kernel, *tile)
        for (target, kernel), table in TILES.items()
        if target not in ("other", "interpreter")
        for pair in table.values()
        for tile in pair
    }
    assert shipped <= measured, shipped - measured
