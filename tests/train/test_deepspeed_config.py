"""The DeepSpeed configuration of a stage: what is resolved, what is refused, and that every decision is a notice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.train import deepspeed_auto, deepspeed_config
from fastimagen.train.deepspeed_config import REDUCE_BUCKET_SIZE, can_compile_fused_adam, resolve_deepspeed
from tests.conftest import ROOT

ADAM = {"type": "AdamW", "params": {"lr": 1e-4}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
GIVEN_ZERO = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": False}


@pytest.fixture(autouse=True)
def nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed can compile its FusedAdam, unless a test says otherwise."""
    monkeypatch.setattr(deepspeed_config, "can_compile_fused_adam", lambda: True)


def resolve(
    override: dict[str, Any] | None = None, *, cuda: bool = True, world_size: int = 1, steps: int = 100, **base: Any
) -> tuple[dict[str, Any], list[str]]:
    tree = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": ADAM,
        "zero_optimization": GIVEN_ZERO,
        "gradient_clipping": 1.0,
        **base,
    }
    tree = {key: value for key, value in tree.items() if value is not None}
    before = copy.deepcopy((tree, override))
    resolved, notices = resolve_deepspeed(
        tree,
        override or {},
        steps=steps,
        world_size=world_size,
        cuda=cuda,
        tensorboard="runs/x/tensorboard",
        job_name="base",
    )
    assert (tree, override) == before, "the caller's configuration was changed"
    assert all("\n" not in notice for notice in notices)
    return resolved, [notice for notice in notices if not notice.startswith("train_micro_batch_size_per_gpu")]


def refusal(override: dict[str, Any] | None = None, **base: Any) -> str:
    with pytest.raises(ValueError) as error:
        resolve(override, **base)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- passed on as it is


def test_complete_configuration_is_passed_on_without_notices() -> None:
    given = {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 1000},
        "csv_monitor": {"enabled": True, "output_path": "p"},
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 7,
    }
    resolved, notices = resolve(**given)
    assert resolved == {"train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": ADAM, **given}
    assert notices == []


def test_deepspeed_prints_no_progress_lines() -> None:
    assert resolve()[0]["steps_per_print"] >= 10**6


# ---- clipping


def test_default_clipping_has_a_notice() -> None:
    resolved, notices = resolve(gradient_clipping=None)  # DeepSpeed's default, which it does not print
    assert resolved["gradient_clipping"] == 1.0 and notices == ["gradient_clipping: 1.0 (not given)"]


def test_muon_is_not_clipped() -> None:
    resolved, notices = resolve(optimizer={"type": "Muon", "params": {"lr": 1e-3}}, gradient_clipping=None)
    assert resolved["gradient_clipping"] == 0.0 and notices == ["gradient_clipping: 0.0 (Muon)"]
    assert "gradient_clipping with Muon" in refusal(optimizer={"type": "Muon"})


# ---- ZeRO


@pytest.mark.parametrize("zero", [None, {}, {"overlap_comm": False}])
def test_no_zero_stage_means_1(zero: dict | None) -> None:
    resolved, notices = resolve(zero_optimization=zero, cuda=False, **SGD)
    assert resolved["zero_optimization"] == {**(zero or {}), "stage": 1}
    assert notices == ["zero_optimization.stage: 1 (not given)"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_given_zero_stage_is_kept(stage: int) -> None:
    assert resolve(zero_optimization={"stage": stage})[0]["zero_optimization"]["stage"] == stage


def test_zero_stage_0_is_refused_with_reasons() -> None:
    for message in (refusal(zero_optimization={"stage": 0}), refusal({"zero_optimization": {"stage": 0}})):
        assert message.startswith("zero_optimization.stage 0 is refused")
        for reason in ("non-finite step in fp32", "gradient norm", "bf16 gradients in bf16", "use stage 1"):
            assert reason in message


# ---- without CUDA


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("enabled", [True, "auto"])
def test_without_cuda_the_run_is_fp32_with_a_notice(precision: str, enabled: bool | str) -> None:
    resolved, notices = resolve(cuda=False, **{precision: {"enabled": enabled}})
    assert resolved[precision] == {"enabled": False}
    assert f"{precision}.enabled: false (no CUDA: the run is fp32)" in notices


@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
@pytest.mark.parametrize("params", [{"lr": 1e-3}, {"lr": 1e-3, "torch_adam": False}])
def test_without_cuda_adam_is_that_of_torch_with_deepspeeds_weight_decay(name: str, params: dict) -> None:
    resolved, notices = resolve(cuda=False, optimizer={"type": name, "params": params})
    assert resolved["optimizer"] == {"type": name, "params": {**params, "torch_adam": True, "weight_decay": 0.0}}
    assert notices[0] == "optimizer.params.torch_adam: true (no CUDA)"
    assert notices[1].startswith("optimizer.params.weight_decay: 0.0 (DeepSpeed's default") and len(notices) == 2


def test_without_cuda_fitting_settings_have_no_notice() -> None:
    resolved, notices = resolve(
        cuda=False, optimizer={"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}}, bf16={"enabled": False}
    )
    assert notices == [] and resolved["bf16"] == {"enabled": False}
    assert resolve(cuda=False, **SGD)[1] == []


def test_with_cuda_and_nvcc_precision_and_adam_are_left_alone() -> None:
    resolved, notices = resolve(bf16={"enabled": True})
    assert resolved["bf16"] == {"enabled": True} and resolved["optimizer"] == ADAM and notices == []


# ---- with CUDA, without nvcc


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_config, "can_compile_fused_adam", lambda: False)


NO_NVCC = "optimizer.params.torch_adam: true (no nvcc of torch's CUDA version to compile DeepSpeed's FusedAdam)"


def test_without_nvcc_adam_is_torchs_fused_one(no_nvcc: None) -> None:
    resolved, notices = resolve(optimizer={"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}})
    assert resolved["optimizer"]["params"] == {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True, "fused": True}
    assert notices == [NO_NVCC, "optimizer.params.fused: true (one kernel updates all weights)"]


def test_without_nvcc_the_weight_decay_stays_that_of_deepspeed(no_nvcc: None) -> None:
    resolved, notices = resolve()
    assert resolved["optimizer"]["params"]["weight_decay"] == 0.0
    assert any(notice.startswith("optimizer.params.weight_decay: 0.0") for notice in notices)


def test_without_nvcc_muons_adam_is_that_of_torch(no_nvcc: None) -> None:
    """DeepSpeed passes lr, betas, eps and weight_decay on to Muon's Adam, and refuses nothing else."""
    resolved, notices = resolve(optimizer={"type": "Muon", "params": {"muon_lr": 0.01}}, gradient_clipping=0.0)
    assert resolved["optimizer"]["params"] == {"muon_lr": 0.01, "torch_adam": True} and notices == [NO_NVCC]


@pytest.mark.parametrize(
    ("optimizer", "zero"),
    [
        ({"type": "AdamW", "params": {"lr": 1.0, "torch_adam": False}}, {}),
        ({"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}}, {}),
        ({"type": "AdamW", "params": {"lr": 1.0}}, {"offload_optimizer": {"device": "cpu"}}),  # DeepSpeedCPUAdam
    ],
)
def test_without_nvcc_what_the_user_chose_is_kept(optimizer: dict, zero: dict, no_nvcc: None) -> None:
    resolved, notices = resolve(optimizer=optimizer, zero_optimization={**GIVEN_ZERO, **zero})
    assert resolved["optimizer"] == optimizer and notices == []


def test_torch_takes_the_parameters_of_the_fused_adam(no_nvcc: None) -> None:
    """DeepSpeed keeps torch_adam to itself, passes everything else on, and adds foreach=None."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}
    params = resolve(optimizer=optimizer)[0]["optimizer"]["params"]
    del params["torch_adam"]
    weight = torch.nn.Parameter(torch.zeros(4))
    adam = torch.optim.AdamW([weight], foreach=None, **params)
    weight.grad = torch.ones(4)
    adam.step()
    assert adam.defaults["fused"] and weight.allclose(torch.full((4,), -1e-4))


@pytest.mark.parametrize(
    ("torch_version", "nvcc_version", "expected"),
    [("12.8", "12.8", True), ("12.8", "11.5", False), ("12.8", None, False), (None, "12.8", False)],
)
def test_fused_adam_needs_nvcc_of_torchs_cuda_version(
    torch_version: str | None, nvcc_version: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.cpp_extension

    monkeypatch.setattr(torch.version, "cuda", torch_version)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    if nvcc_version:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, release {nvcc_version}, V1\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
    assert can_compile_fused_adam() is expected


# ---- bf16 gradients of several micro-batches


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_accumulate_in_fp32(stage: int) -> None:
    zero = {**GIVEN_ZERO, "stage": stage}
    resolved, notices = resolve(zero_optimization=zero, bf16={"enabled": True}, gradient_accumulation_steps=4)
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert notices == ["data_types.grad_accum_dtype: fp32 (adds 4 bf16 gradients per step)"]


@pytest.mark.parametrize(
    "tree",
    [
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": False}, "gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 4},
        {
            "bf16": {"enabled": True},
            "gradient_accumulation_steps": 4,
            "data_types": {"grad_accum_dtype": "bf16"},
        },
    ],
)
def test_other_gradients_accumulate_as_given(tree: dict) -> None:
    resolved, notices = resolve(**tree)
    assert resolved.get("data_types") == tree.get("data_types") and notices == []


# ---- communication


@pytest.mark.parametrize("stage", [1, 2])
def test_several_gpus_reduce_gradients_during_the_backward_pass(stage: int) -> None:
    resolved, notices = resolve(zero_optimization={"stage": stage}, world_size=2)
    expected = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
    assert resolved["zero_optimization"] == expected
    assert [notice.partition(" (")[0] for notice in notices] == [
        "zero_optimization.reduce_bucket_size: 50000000",
        "zero_optimization.overlap_comm: true",
    ]


def test_zero_3_and_one_gpu_keep_deepspeeds_overlap() -> None:
    """ZeRO 3 overlaps by default; one process has nothing to overlap, and would allocate a second bucket."""
    for zero, world_size in (({"stage": 3}, 2), ({"stage": 1}, 1)):
        resolved = resolve(zero_optimization=zero, world_size=world_size)[0]["zero_optimization"]
        assert resolved == {**zero, "reduce_bucket_size": REDUCE_BUCKET_SIZE}


def test_zero_1_with_fp32_accumulation_reduces_once_per_step_and_has_nothing_to_set() -> None:
    tree = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 4}
    resolved, notices = resolve(world_size=2, **tree)
    assert resolved["zero_optimization"] == {"stage": 1}
    assert [notice.partition(":")[0] for notice in notices] == ["data_types.grad_accum_dtype"]
    offloaded = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    assert "overlap_comm" in resolve(world_size=2, **{**tree, "zero_optimization": offloaded})[0]["zero_optimization"]


def test_given_communication_settings_are_kept() -> None:
    resolved, notices = resolve(zero_optimization=GIVEN_ZERO, world_size=2)
    assert resolved["zero_optimization"] == GIVEN_ZERO and notices == []


def test_without_cuda_communication_is_that_of_deepspeed() -> None:
    zero = {"stage": 2}
    assert resolve(zero_optimization=zero, world_size=2, cuda=False)[0]["zero_optimization"] == zero


def test_nvme_is_refused_for_the_optimizer() -> None:
    message = refusal(zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}})
    assert message.startswith("zero_optimization.offload_optimizer.device") and 'use "cpu"' in message


# ---- "auto"


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_with_one_right_answer_is_resolved(cuda: bool) -> None:
    resolved, notices = resolve(
        cuda=cuda,
        steps=1234,
        bf16={"enabled": "auto"},
        scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
        **SGD,
    )
    assert resolved["bf16"]["enabled"] is cuda
    assert resolved["scheduler"]["params"]["total_num_steps"] == 1234
    assert "scheduler.params.total_num_steps: 1234 (was auto)" in notices
    assert any(notice.startswith(f"bf16.enabled: {'true' if cuda else 'false'}") for notice in notices)


AUTOS = [
    ("gradient_clipping", "auto", 1.0),
    ("optimizer.params.lr", "auto", 1e-4),
    ("optimizer.params.betas", "auto", [0.9, 0.999]),
    ("optimizer.params.betas", ["auto", "auto"], [0.9, 0.999]),
    ("optimizer.params.eps", "auto", 1e-8),
    ("optimizer.params.weight_decay", "auto", 0.0),
    ("zero_optimization.stage", "auto", 1),
    ("zero_optimization.reduce_bucket_size", "auto", REDUCE_BUCKET_SIZE),
    ("zero_optimization.stage3_prefetch_bucket_size", "auto", 50_000_000),
    ("zero_optimization.stage3_param_persistence_threshold", "auto", 100_000),
    ("zero_optimization.allgather_bucket_size", "auto", 500_000_000),
    ("zero_optimization.offload_optimizer.device", "auto", "none"),
    ("scheduler.params.warmup_min_lr", "auto", 0.0),
    ("scheduler.params.warmup_max_lr", "auto", 1e-4),
    ("scheduler.params.warmup_num_steps", "auto", 1000),
    ("scheduler.params.total_num_steps", "auto", 10_000),
    ("fp16.loss_scale_window", "auto", 1000),
    ("prescale_gradients", "auto", False),
    ("wall_clock_breakdown", "auto", False),
]


@pytest.mark.parametrize(("path", "given", "expected"), AUTOS)
def test_auto_has_a_documented_answer(path: str, given: Any, expected: Any) -> None:
    tree: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    tree["scheduler"] = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
    tree |= {"gradient_clipping": None, "zero_optimization": {}}
    *sections, key = path.split(".")
    owner = tree
    for section in sections:
        owner = owner.setdefault(section, {})
    owner[key] = given
    resolved, notices = resolve(steps=10_000, **tree)
    assert flat(resolved)[path] == expected
    assert any(notice.startswith(f"{path}: ") for notice in notices)


@pytest.mark.parametrize(
    ("bf16", "fp16", "has_bf16", "expected"),
    [
        ("auto", "auto", True, "bf16"),
        ("auto", "auto", False, "fp16"),
        ("auto", None, True, "bf16"),
        (None, "auto", True, "bf16"),
        (None, "auto", False, "fp16"),
        (False, "auto", True, "fp16"),
        (True, "auto", False, "bf16"),
        ("auto", True, True, "fp16"),
        ("auto", False, False, "bf16"),
    ],
)
def test_auto_precision_is_bf16_where_the_gpu_has_it(
    bf16: bool | str | None, fp16: bool | str | None, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_auto, "_gpu_has_bf16", lambda: has_bf16)
    given = {name: {"enabled": value} for name, value in (("bf16", bf16), ("fp16", fp16)) if value is not None}
    resolved = resolve(**given)[0]
    assert [name for name in ("bf16", "fp16") if resolved.get(name, {}).get("enabled")] == [expected]
    without_cuda = resolve(cuda=False, **given)[0]
    assert not any(without_cuda.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


def test_all_autos_without_an_answer_are_named_at_once() -> None:
    optimizer = {"type": "Muon", "params": {"muon_lr": "auto", "adam_lr": "auto", "weight_decay": "auto"}}
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": "auto", "cycle_max_lr": 1.0}}
    tree = {"optimizer": optimizer, "scheduler": scheduler, "gradient_clipping": None}
    message = refusal(**tree)
    for path in ("optimizer.params.muon_lr", "optimizer.params.adam_lr", "scheduler.params.cycle_min_lr"):
        assert path in message
    assert "weight_decay" not in message and message.endswith("give values")
    assert refusal(tree) == message  # in a stage's override as well


@pytest.mark.parametrize(
    "tree",
    [
        {"zero_optimization": "auto"},
        {"bf16": "auto"},
        {"bf16": True},
        {"optimizer": "AdamW"},
        {"data_types": "fp32"},
        {"optimizer": {"params": {}}},
    ],
)
def test_sections_of_the_wrong_type_are_refused(tree: dict) -> None:
    assert refusal(cuda=False, **tree)


def test_no_auto_is_left_and_every_decision_has_a_notice() -> None:
    """With the repository's own ds.json."""
    tree = json.loads((ROOT / "ds.json").read_text())
    del tree["fastimagen"]
    for cuda in (True, False):
        resolved, notices = resolve_deepspeed(
            tree, {}, steps=50, world_size=2, cuda=cuda, tensorboard="t", job_name="sr"
        )
        assert "auto" not in json.dumps(resolved)
        told = {notice.partition(":")[0] for notice in notices}
        changed = {path for path, value in flat(resolved).items() if flat(tree).get(path) != value}
        assert changed - told == {"tensorboard.output_path", "tensorboard.job_name", "steps_per_print"}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


# ---- the batch: total = micro x accumulation x processes

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ((64, None, None), 1, (64, 64, 1)),
        ((64, None, None), 8, (64, 8, 1)),
        ((64, None, 2), 8, (64, 4, 2)),
        ((64, 4, None), 8, (64, 4, 2)),
        ((64, 4, 2), 8, (64, 4, 2)),
        ((None, 4, None), 8, (32, 4, 1)),
        ((None, 4, 3), 8, (96, 4, 3)),
        (("auto", 4, "auto"), 2, (8, 4, 1)),
        ((64, "auto", 4), 2, (64, 8, 4)),
        ((64, "auto", "auto"), 2, (64, 32, 1)),
        (("auto", "auto", "auto"), 2, (16, 8, 1)),
        (("auto", None, 2), 1, (16, 8, 2)),
    ],
)
def test_batch_size_is_the_product_of_its_factors(given: tuple, world_size: int, expected: tuple) -> None:
    keys = (TOTAL, MICRO, ACCUMULATION)
    tree = {key: value for key, value in zip(keys, given) if value is not None}
    tree |= {"optimizer": ADAM, "zero_optimization": GIVEN_ZERO, "gradient_clipping": 0.5}
    resolved, notices = resolve_deepspeed(
        tree, {}, steps=1, world_size=world_size, cuda=True, tensorboard="", job_name=""
    )
    assert tuple(resolved[key] for key in keys) == expected
    assert expected[0] == expected[1] * expected[2] * world_size
    assert sorted(notices) == sorted(
        f"{key}: {value} ({'was auto' if was == 'auto' else 'not given'})"
        for key, was, value in zip(keys, given, expected)
        if was != value
    )


@pytest.mark.parametrize(
    ("given", "world_size", "complaint"),
    [
        (
            (64, 4, 4),
            8,
            "train_batch_size 64 is not train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 4 x 8",
        ),
        (
            (64, 5, None),
            2,
            "train_batch_size 64 is not a multiple of train_micro_batch_size_per_gpu 5 x 2 processes = 10",
        ),
        ((64, None, 3), 1, "train_batch_size 64 is not a multiple of gradient_accumulation_steps 3 x 1 processes = 3"),
        (
            (64, "auto", 4),
            3,
            "train_batch_size 64 is not a multiple of gradient_accumulation_steps 4 x 3 processes = 12",
        ),
        ((10, None, None), 4, "train_batch_size 10 is not"),
        ((2, None, None), 4, "train_batch_size 2 is not"),
        ((2, 4, None), 1, "train_batch_size 2 is not"),
        ((None, None, None), 1, "give train_batch_size or train_micro_batch_size_per_gpu"),
        ((True, None, None), 1, "train_batch_size must be a positive whole number, got True"),
        ((0, None, None), 1, "train_batch_size must be a positive whole number, got 0"),
        ((64, 2.5, None), 1, "train_micro_batch_size_per_gpu must be a positive whole number, got 2.5"),
        ((64, None, "4"), 1, "gradient_accumulation_steps must be a positive whole number, got '4'"),
    ],
)
def test_contradictory_batch_sizes_are_refused(given: tuple, world_size: int, complaint: str) -> None:
    assert refusal(world_size=world_size, **dict(zip((TOTAL, MICRO, ACCUMULATION), given))).startswith(complaint)


# ---- a stage's own keys


def test_a_stage_overrides_single_keys() -> None:
    resolved, _ = resolve(
        {"optimizer": {"params": {"lr": 5e-5}}, TOTAL: 16, "gradient_clipping": 2.0},
        optimizer={"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}},
        gradient_clipping=1.0,
    )
    assert resolved["optimizer"] == {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.99]}}
    assert (resolved[TOTAL], resolved[MICRO], resolved["gradient_clipping"]) == (16, 16, 2.0)
    assert resolved["zero_optimization"] == GIVEN_ZERO


def test_a_stage_may_have_keys_that_the_file_lacks() -> None:
    assert resolve({"optimizer": ADAM}, optimizer=None)[0]["optimizer"] == ADAM
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    assert resolve({"scheduler": scheduler})[0]["scheduler"] == scheduler
    assert refusal(optimizer=None).startswith('the DeepSpeed key "optimizer" needs a type')


def test_batch_size_of_a_stage_must_fit_that_of_the_file() -> None:
    assert refusal({MICRO: 3}).startswith("train_batch_size 8 is not train_micro_batch_size_per_gpu 3")


# ---- monitors


def test_tensorboard_writes_to_the_run_directory_under_the_name_of_the_stage() -> None:
    assert resolve(tensorboard={"enabled": True})[0]["tensorboard"] == {
        "enabled": True,
        "output_path": "runs/x/tensorboard",
        "job_name": "base",
    }
    mine = {"enabled": True, "output_path": "mine"}
    assert resolve(tensorboard=mine)[0]["tensorboard"]["output_path"] == "mine"
    assert resolve(tensorboard={"enabled": False})[0]["tensorboard"] == {"enabled": False}
    assert "tensorboard" not in resolve()[0]
