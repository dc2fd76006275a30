"""The DeepSpeed configuration of a stage: what is resolved, what is refused, that all of it is told."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from fastimagen.train.engine import resolve_deepspeed
from tests.conftest import ROOT

ADAM = {"type": "AdamW", "params": {"lr": 1e-4}}


def resolve(
    override: dict[str, Any] | None = None, *, cuda: bool = True, world_size: int = 1, steps: int = 100, **base: Any
) -> tuple[dict[str, Any], list[str]]:
    tree = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": ADAM,
        "zero_optimization": {"stage": 1},
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


def test_what_nobody_has_to_decide_is_passed_on_without_a_word() -> None:
    given = {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "wandb": {"enabled": True, "project": "p"},
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 7,
    }
    resolved, notices = resolve(**given)
    assert resolved == {"train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": ADAM, **given}
    assert notices == []


def test_deepspeed_prints_no_lines_of_its_own() -> None:
    assert resolve()[0]["steps_per_print"] >= 10**6


# ---- clipping


def test_clipping_that_nobody_asked_for_is_told() -> None:
    resolved, notices = resolve(gradient_clipping=None)  # DeepSpeed's default, of which it says nothing
    assert resolved["gradient_clipping"] == 1.0 and notices == ["gradient_clipping: 1.0 (not given)"]


def test_muon_is_not_clipped() -> None:
    resolved, notices = resolve(optimizer={"type": "Muon", "params": {"lr": 1e-3}}, gradient_clipping=None)
    assert resolved["gradient_clipping"] == 0.0 and notices == ["gradient_clipping: 0.0 (Muon)"]
    assert "gradient_clipping with Muon" in refusal(optimizer={"type": "Muon"})


# ---- ZeRO


@pytest.mark.parametrize("zero", [None, {}, {"overlap_comm": False}])
def test_no_zero_stage_means_1(zero: dict | None) -> None:
    resolved, notices = resolve(zero_optimization=zero)
    assert resolved["zero_optimization"] == {**(zero or {}), "stage": 1}
    assert notices == ["zero_optimization.stage: 1 (not given)"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_given_zero_stage_stays(stage: int) -> None:
    assert resolve(zero_optimization={"stage": stage})[0]["zero_optimization"] == {"stage": stage}


def test_zero_stage_0_is_refused_and_the_reason_given() -> None:
    for message in (refusal(zero_optimization={"stage": 0}), refusal({"zero_optimization": {"stage": 0}})):
        assert message.startswith("zero_optimization.stage 0 is refused")
        for reason in ("non-finite step in fp32", "gradient norm", "bf16 gradients in bf16", "use stage 1"):
            assert reason in message


# ---- without CUDA


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("enabled", [True, "auto"])
def test_without_cuda_the_run_is_fp32_and_says_so(precision: str, enabled: bool | str) -> None:
    resolved, notices = resolve(cuda=False, **{precision: {"enabled": enabled}})
    assert resolved[precision] == {"enabled": False}
    assert f"{precision}.enabled: false (no CUDA: the run is fp32)" in notices


@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
@pytest.mark.parametrize("params", [{"lr": 1e-3}, {"lr": 1e-3, "torch_adam": False}])
def test_without_cuda_adam_is_torchs_and_says_so(name: str, params: dict) -> None:
    resolved, notices = resolve(cuda=False, optimizer={"type": name, "params": params})
    assert resolved["optimizer"] == {"type": name, "params": {**params, "torch_adam": True}}
    assert notices == ["optimizer.params.torch_adam: true (no CUDA)"]


def test_without_cuda_what_is_right_already_is_not_mentioned() -> None:
    resolved, notices = resolve(
        cuda=False, optimizer={"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}}, bf16={"enabled": False}
    )
    assert notices == [] and resolved["bf16"] == {"enabled": False}
    assert resolve(cuda=False, optimizer={"type": "SGD", "params": {"lr": 1.0}})[1] == []


def test_with_cuda_precision_and_adam_are_the_users() -> None:
    resolved, notices = resolve(bf16={"enabled": True})
    assert resolved["bf16"] == {"enabled": True} and resolved["optimizer"] == ADAM and notices == []


# ---- "auto"


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_that_has_one_right_answer_is_resolved(cuda: bool) -> None:
    resolved, notices = resolve(
        cuda=cuda,
        steps=1234,
        bf16={"enabled": "auto"},
        optimizer={"type": "SGD"},
        scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
    )
    assert resolved["bf16"]["enabled"] is cuda
    assert resolved["scheduler"]["params"]["total_num_steps"] == 1234
    assert "scheduler.params.total_num_steps: 1234 (was auto)" in notices
    assert any(notice.startswith(f"bf16.enabled: {'true' if cuda else 'false'}") for notice in notices)


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        ("optimizer.params.lr", {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}),
        (
            "optimizer.params.weight_decay",
            {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "weight_decay": "auto"}}},
        ),
        ("scheduler.params.warmup_num_steps", {"scheduler": {"params": {"warmup_num_steps": "auto"}}}),
        ("gradient_clipping", {"gradient_clipping": "auto"}),
        ("zero_optimization.stage", {"zero_optimization": {"stage": "auto"}}),
        ("zero_optimization.reduce_bucket_size", {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}),
        ("fp16.enabled", {"fp16": {"enabled": "auto"}}),
    ],
)
def test_auto_that_only_other_trainers_resolve_is_refused(path: str, tree: dict) -> None:
    message = refusal(**tree)
    assert message.startswith(f'DeepSpeed key {path} is "auto"') and "give a value" in message
    assert refusal(tree) == message  # in a stage's override as well


@pytest.mark.parametrize(
    "tree",
    [
        {"optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": ["auto", "auto"]}}},
        {"zero_optimization": "auto"},
        {"bf16": "auto"},
        {"bf16": True},
        {"optimizer": "AdamW"},
        {"optimizer": {"params": {}}},
    ],
)
def test_sections_of_a_wrong_kind_are_refused(tree: dict) -> None:
    assert refusal(cuda=False, **tree)


def test_no_auto_is_left_and_every_decision_is_told() -> None:
    """The repository's own file, where nothing may reach DeepSpeed as text."""
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
    ],
)
def test_the_batch_triangle(given: tuple, world_size: int, expected: tuple) -> None:
    keys = (TOTAL, MICRO, ACCUMULATION)
    tree = {key: value for key, value in zip(keys, given) if value is not None}
    tree |= {"optimizer": ADAM, "zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}
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
        ((64, 5, None), 2, "train_batch_size 64 is not train_micro_batch_size_per_gpu 5"),
        ((64, None, 3), 1, "train_batch_size 64 is not"),
        ((10, None, None), 4, "train_batch_size 10 is not"),
        ((2, None, None), 4, "train_batch_size 2 is not"),
        ((2, 4, None), 1, "train_batch_size 2 is not"),
        ((None, None, None), 1, "give train_batch_size or train_micro_batch_size_per_gpu"),
        (("auto", "auto", 2), 1, "give train_batch_size or train_micro_batch_size_per_gpu"),
        ((True, None, None), 1, "train_batch_size must be a positive whole number, got True"),
        ((0, None, None), 1, "train_batch_size must be a positive whole number, got 0"),
        ((64, 2.5, None), 1, "train_micro_batch_size_per_gpu must be a positive whole number, got 2.5"),
        ((64, None, "4"), 1, "gradient_accumulation_steps must be a positive whole number, got '4'"),
    ],
)
def test_contradictory_batches_are_refused(given: tuple, world_size: int, complaint: str) -> None:
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
    assert resolved["zero_optimization"] == {"stage": 1}


def test_a_stage_may_bring_what_the_file_lacks() -> None:
    assert resolve({"optimizer": ADAM}, optimizer=None)[0]["optimizer"] == ADAM
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    assert resolve({"scheduler": scheduler})[0]["scheduler"] == scheduler
    assert refusal(optimizer=None).startswith('the DeepSpeed key "optimizer" needs a type')


def test_a_stages_batch_must_fit_the_files() -> None:
    assert refusal({MICRO: 3}).startswith("train_batch_size 8 is not train_micro_batch_size_per_gpu 3")


# ---- monitors


def test_tensorboard_goes_into_the_run_directory_under_the_stages_name() -> None:
    assert resolve(tensorboard={"enabled": True})[0]["tensorboard"] == {
        "enabled": True,
        "output_path": "runs/x/tensorboard",
        "job_name": "base",
    }
    mine = {"enabled": True, "output_path": "mine"}
    assert resolve(tensorboard=mine)[0]["tensorboard"]["output_path"] == "mine"
    assert resolve(tensorboard={"enabled": False})[0]["tensorboard"] == {"enabled": False}
    assert "tensorboard" not in resolve()[0]
