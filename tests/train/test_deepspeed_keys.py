"""Misspelt keys and names of DeepSpeed are errors of one line, in the dry run already; valid ones pass."""

from __future__ import annotations

from typing import Any

import pytest

from fastimagen.train.deepspeed_keys import check_deepspeed_keys

BASE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,  # and two processes
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 1e-3}}},
        {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True},  # of torch.optim
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "cos_min_ratio": 0.1}}},
        {"flops_profiler": {"enabled": False}, "activation_checkpointing": {}, "aio": {}, "wall_clock_breakdown": True},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"tensorboard": {"enabled": False}, "csv_monitor": {"enabled": False}, "data_types": {}, "compile": {}},
    ],
)
def test_keys_that_deepspeed_reads_are_accepted(changes: dict[str, Any]) -> None:
    check_deepspeed_keys(BASE | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_cliping": 1.0}, 'unknown DeepSpeed key gradient_cliping; did you mean "gradient_clipping"?'),
        ({"zero_optimisation": {}}, 'unknown DeepSpeed key zero_optimisation; did you mean "zero_optimization"?'),
        ({"bf16": {"enable": True}}, 'unknown DeepSpeed key bf16.enable; did you mean "enabled"?'),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            'unknown DeepSpeed key zero_optimization.overlap_com; did you mean "overlap_comm"?',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            'unknown DeepSpeed key zero_optimization.offload_optimizer.devise; did you mean "device"?',
        ),
        ({"zero_optimization": {"stage": 4}}, "DeepSpeed key zero_optimization.stage: Input should be 0, 1, 2"),
        ({"optimizer": {"type": "AdmaW"}}, 'unknown DeepSpeed optimizer.type "AdmaW"; did you mean "AdamW"?'),
        (
            {"optimizer": {"type": "Muon", "params": {"muon_lrr": 1e-3}}},
            'unknown DeepSpeed key optimizer.params.muon_lrr; did you mean "muon_lr"?',
        ),
        ({"scheduler": {"type": "CosineLR"}}, 'unknown DeepSpeed scheduler.type "CosineLR"; did you mean "WarmupCosin'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            'unknown DeepSpeed key scheduler.params.warmup_steps; did you mean "warmup_num_steps"?',
        ),
    ],
)
def test_a_misspelt_key_or_name_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_deepspeed_keys(BASE | changes)
    assert str(caught.value).startswith(message)
