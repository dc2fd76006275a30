"""The kernels of group_norm_silu as they compile for GPUs that are not here."""

from __future__ import annotations

from tests.kernels.aot import SHARED_LIMIT, compiled

KERNELS = {"one_pass_forward", "partial_statistics", "apply_forward", "one_pass_backward", "partial_sums",
           "apply_backward", "vector_gradients"}


def test_nothing_spills() -> None:
    rows = compiled("group_norm", ["sm_90"], "bfloat16 channels_last|float32 contiguous")
    assert {row["kernel"] for row in rows} == KERNELS
    assert [row for row in rows if row["spills"] or row["stack_bytes"]] == []
    assert all(row["shared_bytes"] <= SHARED_LIMIT["sm_90"] for row in rows)
