"""What a resumed run says, does or refuses where its configuration differs from the checkpoint's; learning rates."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fastimagen.config import FastimagenConfig, StageConfig, StageTrainConfig, TrainConfig
from fastimagen.data.shard import Shard
from fastimagen.data_config import DataConfig, TextConfig
from fastimagen.section import Section
from fastimagen.train.learning_rate import set_learning_rate
from fastimagen.train.length import steps_of_epochs
from fastimagen.train.resume import ACTS, RULES, check_resuming, check_trained, rule_of, settings_of
from tests.conftest import ROOT, TOY_STAGES, toy_tree

WHERE = Path("runs/x/checkpoints/sr/step-00000500")

# ---- every key has a rule


def leaves(section: type[Section], prefix: str = "") -> list[str]:
    """The dotted keys of a section, down to what is not a section itself."""
    found = []
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        found += [leaf for kind in inner for leaf in leaves(kind, f"{prefix}{name}.")] or [f"{prefix}{name}"]
    return list(dict.fromkeys(found))


def sections_in(annotation: object) -> list[type[Section]]:
    """The sections that may be the value of a field: more than one for networks of several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


KEYS = [
    *leaves(StageConfig),
    *leaves(DataConfig, "data."),
    *leaves(TextConfig, "text."),
    *(key for key in leaves(TrainConfig, "train.") if not key.startswith("train.stages.")),  # resolved for the stage
    "train.init_from",
    "train.lora",
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_configuration_has_a_rule(key: str) -> None:
    assert rule_of(key)


def test_the_settings_of_a_stage_are_resolved() -> None:
    """settings_of reads these fields by name."""
    assert set(StageTrainConfig.model_fields) == {"steps", "epochs", "deepspeed", "ema", "init_from", "lora"}


def test_no_rule_is_for_a_key_that_does_not_exist() -> None:
    known = [*KEYS, "data.samples", "data.weights", "processes", "optimizer.type"]
    unknown = [rule for rule in RULES if not any(key == rule or key.startswith(f"{rule}.") for key in known)]
    assert unknown == []


def test_the_documentation_lists_every_rule() -> None:
    text = (ROOT / "docs/training.md").read_text().split("## Changes between start and resume")[1].split("\n## ")[0]
    listed: dict[str, bool] = {}
    for row in re.findall(r"^\| (`.*?) \| (acts|refused)", text, re.MULTILINE):
        listed |= dict.fromkeys(re.findall(r"`([\w.]+)`", row[0]), row[1] == "acts")
    assert listed == {key: rule == ACTS for key, rule in RULES.items()}


# ---- what is announced and refused


def shard(path: str, count: int) -> Shard:
    return Shard(path, "", np.zeros((count, 6), np.int64), np.array([f"{i}".encode() for i in range(count)]), {})


def settings(
    stage: dict[str, Any] | None = None,
    ours: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    shards: tuple[tuple[str, int], ...] = (("a/0.tar", 5), ("a/1.tar", 7)),
    processes: int = 2,
) -> dict[str, Any]:
    tree = copy.deepcopy(toy_tree(Path("data"))["fastimagen"])
    tree["cascade"]["stages"][1] |= stage or {}
    for key, value in (ours or {}).items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    config = FastimagenConfig.model_validate(tree)
    return settings_of(
        config,
        config.cascade.stages[1],  # type: ignore[union-attr]
        steps=config.train.steps or 0,
        epochs=None,
        lowres_size=8,
        deepspeed=deepspeed or {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
        processes=processes,
        shards=[shard(path, count) for path, count in shards],
    )


def resume(now: dict[str, Any]) -> list[str]:
    return check_resuming(WHERE, "sr", settings(), now, step=500, samples=2000)


def test_nothing_changed_nothing_said() -> None:
    assert resume(settings()) == []


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (settings(ours={"train.ema.decay": 0.5}), ["sr: train.ema.decay 0.9999 -> 0.5 from step 501 on"]),
        (
            settings(ours={"train.stages.sr": {"ema": {"decay": 0.5}}}),
            ["sr: train.ema.decay 0.9999 -> 0.5 from step 501 on"],
        ),
        (settings(ours={"train.steps": 9}), ["sr: train.steps 6 -> 9 from step 501 on"]),
        (
            settings({"objective": {"caption_dropout": 0.2}}),
            ["sr: objective.caption_dropout 0.1 -> 0.2 from step 501 on"],
        ),
        (settings({"crop": None}), ["sr: crop 8 -> null from step 501 on"]),
        (settings(processes=1), ["sr: processes 2 -> 1 from step 501 on"]),
        (settings(shards=(("moved/0.tar", 5), ("moved/1.tar", 7))), []),
        (
            settings(deepspeed={"train_batch_size": 6, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}),
            [
                "sr: train_batch_size 4 -> 6 from step 501 on",
                'sr: optimizer.type "AdamW" -> "Adam" from step 501 on',
                "sr: the data continue with sample 2000: none is repeated or left out",
            ],
        ),
        (
            settings(
                deepspeed={
                    "train_batch_size": 4,
                    "optimizer": {"type": "AdamW", "params": {}},
                    "scheduler": {"type": "WarmupLR"},
                }
            ),
            [
                'sr: scheduler.type not set -> "WarmupLR" from step 501 on',
                "sr: optimizer.params.lr 0.1 -> not set from step 501 on",
            ],
        ),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) and value else None,
)
def test_what_acts_is_announced(now: dict[str, Any], lines: list[str]) -> None:
    assert resume(now) == lines


@pytest.mark.parametrize(
    ("now", "key"),
    [
        (
            settings({"unet": {**TOY_STAGES[1]["unet"], "heads": 2}}),
            "unet.heads 1 -> 2",
        ),
        (settings({"schedule": {"shift": 2.0}}), "schedule.shift 1.0 -> 2.0"),
        (settings({"objective": {"prediction": "x0"}}), 'objective.prediction "v" -> "x0"'),
        (settings(ours={"train.seed": 1}), "train.seed 0 -> 1"),
        (settings(ours={"data.shapes.seed": 1}), "data.shapes.seed 0 -> 1"),
        (settings(ours={"text.encoder": "elsewhere/t5"}), 'text.encoder "text_encoder" -> "t5"'),
        (settings(ours={"train.stages.sr": {"init_from": "m"}}), 'train.init_from null -> "m"'),
        (settings(shards=(("a/0.tar", 5), ("a/2.tar", 7))), 'data.samples "12 in 2 shards'),
        (
            settings(deepspeed={"train_batch_size": 4, "optimizer": {"type": "Muon", "params": {}}}),
            "optimizer.type",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_one_line_with_the_way_out(now: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError) as caught:
        resume(now)
    message = str(caught.value)
    assert message.startswith(f"{WHERE} cannot resume with {key}") and "\n" not in message
    assert "restore what it was trained with, or choose another --run-dir" in message
    assert ("sr.init_from" in message) == ("unet" not in key)


def test_a_trained_stage_names_what_changed_and_refuses_another_network() -> None:
    now = settings(ours={"train.seed": 1, "train.log_every": 7})
    assert check_trained(WHERE, "sr", settings(), now, step=6) == [
        "sr: train.seed 0 -> 1 does not change it: trained to step 6",
        "sr: train.log_every 1 -> 7 does not change it: trained to step 6",
    ]
    with pytest.raises(ValueError, match="cannot resume with size 16 -> 32"):
        check_trained(WHERE, "sr", settings(), settings({"size": 32}), step=6)


def test_epochs_are_counted_in_samples_where_the_batch_size_has_changed() -> None:
    assert steps_of_epochs(2, 60, 4) == 30
    assert steps_of_epochs(2, 60, 8, done=(10, 40)) == 10 + 10
    assert steps_of_epochs(2, 60, 8, done=(30, 120)) == 30


# ---- learning rates


def rates(name: str, steps: int, start: int = 1, **params: Any) -> list[float]:
    """The rates of optimizer steps `start` to `steps` under DeepSpeed's scheduler."""
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    engine = SimpleNamespace(
        lr_scheduler=getattr(lr_schedules, name)(optimizer, **params),
        get_lr=lambda: [group["lr"] for group in optimizer.param_groups],
    )
    found = []
    for update in range(start, steps + 1):
        found.append(set_learning_rate(engine, update))
        assert optimizer.param_groups[0]["lr"] == found[-1]
        engine.lr_scheduler.step()  # DeepSpeed's, after the step
    return found


LINEAR = {"warmup_num_steps": 4, "warmup_type": "linear"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**LINEAR, "warmup_max_lr": 0.5},
    "WarmupDecayLR": {**LINEAR, "warmup_max_lr": 0.5, "total_num_steps": 10},
    "WarmupCosineLR": {**LINEAR, "total_num_steps": 10},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.5, "cycle_first_step_size": 3},
    "LRRangeTest": {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_runs_at_rate_0_and_resuming_changes_none(name: str) -> None:
    found = rates(name, 10, **SCHEDULERS[name])
    assert min(found) > 0
    assert rates(name, 10, start=7, **SCHEDULERS[name]) == found[6:]


def test_warm_up_and_decay_are_straight_lines() -> None:
    assert rates("WarmupDecayLR", 10, **SCHEDULERS["WarmupDecayLR"]) == pytest.approx(
        [0.125, 0.25, 0.375, 0.5] + [0.5 * rest / 6 for rest in (6, 5, 4, 3, 2, 1)]
    )
    assert rates("WarmupLR", 6, **SCHEDULERS["WarmupLR"]) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates("OneCycle", 3, **SCHEDULERS["OneCycle"]) == pytest.approx(
        [0.01 + 0.49 * part / 3 for part in (1, 2, 3)]
    )


def test_without_a_scheduler_the_rate_is_that_of_the_optimizer() -> None:
    assert set_learning_rate(SimpleNamespace(lr_scheduler=None, get_lr=lambda: [0.25, 0.5]), 3) == 0.25


def test_a_text_encoder_at_another_commit_is_refused_unless_the_commit_was_not_recorded() -> None:
    first, second = ("a" * 40, "b" * 40)
    now = {"text.encoder": "t5-small", "text.revision": second}
    for saved in (None, "main"):  # of an earlier fastimagen
        assert check_resuming(WHERE, "sr", now | {"text.revision": saved}, now, step=500, samples=4000) == []
    with pytest.raises(ValueError, match=r"text.revision .* \(the network has learned the other text embeddings\)"):
        check_resuming(WHERE, "sr", now | {"text.revision": first}, now, step=500, samples=4000)
