"""What the kernels compile to, without a GPU; for those of attention see test_attention.py."""

from __future__ import annotations

import pytest

from tests.kernels.aot import SHARED_LIMIT, compiled

pytestmark = pytest.mark.slow

EVERYWHERE = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.parametrize(
    ("files", "targets", "labels", "kernels"),
    [
        (
            "group_norm",
            EVERYWHERE,
            "bfloat16 channels_last [0-9x]+$",
            "group_norm_silu_one_pass_forward_kernel group_norm_silu_statistics_kernel group_norm_silu_forward_kernel "
            "group_norm_silu_one_pass_backward_kernel group_norm_silu_backward_sums_kernel "
            "group_norm_silu_backward_kernel group_norm_silu_vector_gradients_kernel",
        ),
        (
            "group_norm",
            ["sm_90"],
            "biases|skip|gelu",
            "group_norm_silu_one_pass_forward_kernel group_norm_silu_statistics_kernel group_norm_silu_forward_kernel "
            "group_norm_silu_one_pass_backward_kernel group_norm_silu_backward_sums_kernel "
            "group_norm_silu_backward_kernel group_norm_silu_vector_gradients_kernel",
        ),
        (
            "dynamic_threshold,modulated_norm,residual,sampler_step",
            EVERYWHERE,
            "bfloat16|dynamic|static",
            "add_residual_kernel modulated_norm_forward_kernel modulated_norm_backward_kernel "
            "dynamic_threshold_count_kernel dynamic_threshold_apply_kernel "
            "sampler_step_kernel sampler_step_x0_kernel sampler_step_finish_kernel",
        ),
    ],
)
def test_no_kernel_spills_registers(files: str, targets: list[str], labels: str, kernels: str) -> None:
    rows = compiled(files, targets, labels)
    assert {(row["target"], row["kernel"]) for row in rows} == {(t, name) for t in targets for name in kernels.split()}
    assert [row for row in rows if row["spills"] or row["stack_bytes"]] == []
    assert all(row["shared_bytes"] <= SHARED_LIMIT[row["target"]] for row in rows)
