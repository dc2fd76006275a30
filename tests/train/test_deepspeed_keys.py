"""Keys that DeepSpeed would ignore, refuse with a traceback or misread are errors of one line; valid ones pass."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest

from fastimagen.train.deepspeed_config import resolve_deepspeed
from tests.conftest import ROOT

BASE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,  # and two processes
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
}


def resolve(changes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    return resolve_deepspeed(BASE | changes, {}, steps=100, world_size=2, cuda=False, tensorboard="t", job_name="base")


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def optimizer(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        optimizer("Muon", muon_lr=1e-3, adam_lr=1e-3, momentum=0.9, betas=[0.9, 0.99]),
        {**optimizer("SGD", lr=0.1, momentum=0.9), "zero_allow_untested_optimizer": True},  # of torch.optim
        optimizer("Adagrad", lr=0.1),
        scheduler("WarmupCosineLR", total_num_steps=9, cos_min_ratio=0.1),
        scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=1e-3),
        {"flops_profiler": {"enabled": False}, "activation_checkpointing": {}, "wall_clock_breakdown": True},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"tensorboard": {"enabled": False}, "csv_monitor": {"enabled": False}, "data_types": {}, "timers": {}},
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8, "prefetch_bucket_size": 1000}},
    ],
)
def test_keys_that_deepspeed_reads_are_accepted(changes: dict[str, Any]) -> None:
    resolve(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_cliping": 1.0}, 'unknown DeepSpeed key gradient_cliping; did you mean "gradient_clipping"?'),
        ({"gradient_cliping": "auto"}, 'unknown DeepSpeed key gradient_cliping; did you mean "gradient_clipping"?'),
        ({"zero_optimisation": {}}, 'unknown DeepSpeed key zero_optimisation; did you mean "zero_optimization"?'),
        ({"bf16": {"enable": True}}, 'unknown DeepSpeed key bf16.enable; did you mean "enabled"?'),
        ({"bf16": {"enable": "auto"}}, 'unknown DeepSpeed key bf16.enable; did you mean "enabled"?'),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            'unknown DeepSpeed key zero_optimization.overlap_com; did you mean "overlap_comm"?',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            'unknown DeepSpeed key zero_optimization.offload_optimizer.devise; did you mean "device"?',
        ),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "unknown DeepSpeed key data_types.grad_acum_dtype; did you mean"),
        ({"torch_autocast": {"enable": True}}, "unknown DeepSpeed key torch_autocast.enable; did you mean"),
        ({"flops_profiler": {"profile_steps": 3}}, "unknown DeepSpeed key flops_profiler.profile_steps; did you mean"),
        ({"comms_logger": {"verbos": True}}, 'unknown DeepSpeed key comms_logger.verbos; did you mean "verbose"?'),
        ({"timers": {"throughput": {"sync": True}}}, "unknown DeepSpeed key timers.throughput.sync; "),
        (
            {"optimizer": {"type": "AdamW", "parms": {}}},
            'unknown DeepSpeed key optimizer.parms; did you mean "params"?',
        ),
        (optimizer(lrr=1e-3), 'unknown DeepSpeed key optimizer.params.lrr; did you mean "lr"?'),
        (optimizer("AdmaW"), 'unknown DeepSpeed optimizer.type "AdmaW"; did you mean "AdamW"?'),
        (optimizer("Muon", muon_lrr=1e-3), 'unknown DeepSpeed key optimizer.params.muon_lrr; did you mean "muon_lr"?'),
        (scheduler("CosineLR"), 'unknown DeepSpeed scheduler.type "CosineLR"; did you mean "WarmupCosin'),
        (
            scheduler("WarmupLR", warmup_steps=3),
            'unknown DeepSpeed key scheduler.params.warmup_steps; did you mean "warmup_num_steps"?',
        ),
    ],
)
def test_a_misspelt_key_or_name_is_an_error(changes: dict[str, Any], message: str) -> None:
    assert refusal(changes).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (optimizer(lr="1e-3"), "optimizer.params.lr must be a number, got '1e-3': write 1e-3, without quotes"),
        (optimizer(lr=-1.0), "optimizer.params: Invalid learning rate: -1.0"),
        (optimizer(betas=0.9), "optimizer.params.betas must be two numbers, got 0.9"),
        (optimizer("Muon", muon_lr="fast"), "optimizer.params.muon_lr must be a number, got 'fast'"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping must be a number, got '1.0': write 1.0, without quotes"),
        ({"prescale_gradients": "true"}, "prescale_gradients must be true or false, got 'true': write true, without"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled must be true or false, got 'false': write false, without"),
        ({"zero_optimization": {"overlap_comm": 3}}, "zero_optimization.overlap_comm: Input should be a valid boolean"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: Input should be 0, 1, 2"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size: Input should be gre"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "zero_optimization.offload_optimizer.device"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale: fp16.loss_scale must be >= 0"),
        (
            {"data_types": {"grad_accum_dtype": "fp23"}},
            "data_types.grad_accum_dtype must be one of ",
        ),
        (scheduler("WarmupLR", warmup_num_steps=0), "scheduler.params: "),
        (scheduler("WarmupLR", warmup_max_lr="1e-3"), "scheduler.params.warmup_max_lr must be a number, got '1e-3'"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_an_error(changes: dict[str, Any], message: str) -> None:
    assert refusal(changes).startswith(f"DeepSpeed key {message}")


def test_what_deepspeed_refuses_is_refused_by_the_dry_run() -> None:
    assert "communication_data_type" in refusal({"communication_data_type": "float"})
    message = refusal({"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}})
    assert message.startswith("DeepSpeed refuses this configuration: gradient_allreduce_op")


def test_a_scheduler_says_what_it_needs() -> None:
    message = "DeepSpeed scheduler.type WarmupCosineLR needs scheduler.params.total_num_steps"
    assert refusal(scheduler("WarmupCosineLR")) == message


def test_an_optimizer_that_zero_does_not_know_needs_a_switch() -> None:
    message = refusal(optimizer("RMSprop", lr=0.1))
    assert message.startswith('DeepSpeed has not tested optimizer.type "RMSprop" with ZeRO')
    assert '"zero_allow_untested_optimizer": true' in message


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"activation_checkpointing": {"partition_activations": True}}, "checkpoint_levels"),
        ({"autotuning": {"enabled": True}}, "--dry-run"),
        ({"data_efficiency": {"enabled": True}}, "its own data loader"),
        ({"bfloat16": {"enabled": True}}, 'write "bf16": {"enabled": true}'),
        ({"fp16": {"fp16": True}}, 'write "fp16": {"enabled": true}'),
        (optimizer(max_grad_norm=1.0), 'write "gradient_clipping" at the top level'),
        ({"amp": {"enabled": True}}, '"bf16": {"enabled": true}'),
        ({"elasticity": {"enabled": True}}, "resumes on another number of processes"),
        ({"sparse_attention": {"mode": "fixed"}}, "no longer has it: remove it"),
        ({"tensor_parallel": {"autotp_size": 2}}, "ZeRO 3 shards the weights"),
        ({"zero_optimization": {"cpu_offload": True}}, '"offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "remove it"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'use "cpu"'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, 'set "stage": 3'),
        ({"compile": {"deepcompile": True}}, '"compile": "default"'),
        ({"zero_optimization": {"compute_grad_norm": False}}, "remove it"),
        ({"dataloader_drop_last": True}, "remove it"),
        (optimizer("OneBitAdam", lr=1e-3), 'use "AdamW" or "Muon"'),
        (optimizer("MuAdam", lr=1e-3), 'use "AdamW" or "Muon"'),
    ],
)
def test_what_would_have_no_effect_is_refused_with_the_way_out(changes: dict[str, Any], way_out: str) -> None:
    message = refusal(changes)
    assert "refused" in message or "needs stage 3" in message
    assert way_out in message


def test_all_refused_keys_are_named_at_once() -> None:
    message = refusal({"autotuning": {"enabled": True}, "aio": {"block_size": 1}, "zero_optimization": {"stage": 0}})
    assert message.count("DeepSpeed key ") == 2 and "stage 0 is refused" in message


def test_what_is_switched_off_is_removed_with_a_notice() -> None:
    changes = {"amp": {"enabled": False}, "zero_optimization": {"stage": 2, "cpu_offload": False}, "pipeline": {}}
    resolved, notices = resolve(changes)
    assert "amp" not in resolved and "cpu_offload" not in resolved["zero_optimization"]
    removed = ["amp: removed (it is off)", "pipeline: removed (it is off)"]
    assert {*removed, "zero_optimization.cpu_offload: removed (it is off)"} <= set(notices)


def test_16_bit_weights_come_from_the_export() -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    resolved, notices = resolve({"zero_optimization": zero})
    assert any("fastimagen export writes" in notice for notice in notices)
    assert "stage3_gather_16bit_weights_on_model_save" not in resolved["zero_optimization"]


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        optimizer("Lion", lr=1e-4),
        optimizer("Lamb"),
    ],
)
def test_what_deepspeed_has_for_gpus_only_needs_cuda(changes: dict[str, Any]) -> None:
    assert "needs CUDA" in refusal(changes)


def test_muon_with_zero_3_works_without_reduce_scatter() -> None:
    muon = optimizer("Muon", muon_lr=1e-3)
    assert resolve({**muon, "zero_optimization": {"stage": 3}})[0]["zero_optimization"]["reduce_scatter"] is False
    message = refusal({**muon, "zero_optimization": {"stage": 3, "reduce_scatter": True}})
    assert message == "zero_optimization.reduce_scatter true does not work with Muon and ZeRO 3: remove it"


def test_two_precisions_contradict_each_other() -> None:
    assert "are both true" in refusal({"bf16": {"enabled": True}, "fp16": {"enabled": True}})


def test_a_missing_monitor_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastimagen.train import deepspeed_optimizer

    monkeypatch.setattr(deepspeed_optimizer, "find_spec", lambda package: None)
    assert refusal({"wandb": {"enabled": True}}) == "DeepSpeed key wandb.enabled needs wandb: pip install wandb"
    assert "pip install comet_ml" in refusal({"comet": {"enabled": True}})


PUBLISHED = {  # what becomes of the files in tests/fixtures/ds_configs: "" is accepted
    "fp16_old_style.json": "fp16.fp16 is refused",
    "fp16_zero2_auto.json": "",
    "max_grad_norm.json": "optimizer.params.max_grad_norm is refused",
    "random_ltd_stage0.json": "data_efficiency is refused",
    "small_convnet.json": "",
    "upsampler_no_zero.json": "",
    "zenflow_offload.json": "zero_optimization.zenflow is refused",
    "zero2_auto.json": "",
    "zero3_auto_offload.json": "",
    "zero3_auto_precision.json": "",
}


def test_published_configurations_are_accepted_or_refused_in_one_line() -> None:
    """tests/drills/deepspeed_configs.py also trains them."""
    paths = sorted((ROOT / "tests/fixtures/ds_configs").glob("*.json"))
    assert {path.name for path in paths} == PUBLISHED.keys()
    for path in paths:
        tree, expected = json.loads(path.read_text()), PUBLISHED[path.name]
        with pytest.raises(ValueError, match=expected) if expected else nullcontext() as caught:
            resolved, _ = resolve_deepspeed(
                tree, {}, steps=100, world_size=2, cuda=False, tensorboard="t", job_name="base"
            )
        assert "\n" not in str(caught.value) if caught else "auto" not in json.dumps(resolved)
