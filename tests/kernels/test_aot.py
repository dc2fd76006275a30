"""What the kernels compile to for GPUs that are not here; of attention's, test_attention.py."""

from __future__ import annotations

import pytest

from tests.kernels.aot import SHARED_LIMIT, compiled

EVERYWHERE = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.parametrize(
    ("files", "targets", "labels", "kernels"),
    [
        (
            "group_norm",
            EVERYWHERE,
            "bfloat16 channels_last",
            "one_pass_forward partial_statistics apply_forward one_pass_backward partial_sums apply_backward "
            "vector_gradients",
        ),
        (
            "dynamic_threshold,sampler_step",
            EVERYWHERE,
            "bfloat16|dynamic|static",
            "count walk apply step recover finish",
        ),
    ],
)
def test_nothing_spills(files: str, targets: list[str], labels: str, kernels: str) -> None:
    rows = compiled(files, targets, labels)
    assert {(row["target"], row["kernel"]) for row in rows} == {(t, name) for t in targets for name in kernels.split()}
    assert [row for row in rows if row["spills"] or row["stack_bytes"]] == []
    assert all(row["shared_bytes"] <= SHARED_LIMIT[row["target"]] for row in rows)
