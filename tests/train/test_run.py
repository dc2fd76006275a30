"""What a start finds in a run directory: the dry run refuses what training refuses; config.json claims what is true."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastimagen.config import StageTrainConfig
from fastimagen.config_file import config_from_dict, load_config
from fastimagen.train import checkpoint
from fastimagen.train.run import Run
from fastimagen.train.run_lock import stage_lock
from fastimagen.train.trainer import Trainer
from fastimagen.words import counted


def trained(tree: dict[str, Any], folder: Path, stage: str, step: int, **state: Any) -> Path:
    """Leave a checkpoint of a stage in the run directory, without weights."""
    run = Run(config_from_dict(tree), folder, stage)
    (config,) = run.stages
    deepspeed, _ = run.resolve(config, 1, "cpu")
    settings = run.resume_settings(config, deepspeed, run.data[0].shards)
    content = {"step": step, "samples": 4 * step, "settings": settings, "stage": config.model_dump(mode="json")}
    incomplete = run.checkpoints(config) / checkpoint.incomplete_name(step, "token")
    incomplete.mkdir(parents=True)
    return checkpoint.complete(incomplete, 0, {"parameters": {}}, {"val_loss": None, **content, **state})


def changed(tree: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Values by dotted key with __ for the dot."""
    tree = copy.deepcopy(tree)
    for key, value in values.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the dry run


def test_the_dry_run_says_what_resuming_would_change(toy_config: dict, tmp_path: Path) -> None:
    trained(toy_config, tmp_path, "base", 3)
    before = files(tmp_path)
    now = changed(toy_config, fastimagen__train__log_every=5, train_batch_size=2)
    lines = Trainer(config_from_dict(now), tmp_path, stage="base").describe().splitlines()
    assert lines[:2] == ["base: resuming from step 3", "base: train_batch_size 4 -> 2 from step 4 on"]
    assert "base: train.log_every 1 -> 5 from step 4 on" in lines
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fastimagen__train__seed": 1}, r"cannot resume with train.seed 0 -> 1 \(positions in the data"),
        ({"fastimagen__train__stages": {}}, r'cannot resume with optimizer.type "Muon" -> "AdamW"'),
    ],
)
def test_the_dry_run_refuses_what_training_refuses(
    values: dict[str, Any], message: str, toy_config: dict, tmp_path: Path
) -> None:
    trained(toy_config, tmp_path, "base", 3)
    with pytest.raises(ValueError, match=message):
        Trainer(config_from_dict(changed(toy_config, **values)), tmp_path).describe()


def test_the_dry_run_passes_damaged_checkpoints_by_and_needs_an_intact_one(toy_config: dict, tmp_path: Path) -> None:
    older = trained(toy_config, tmp_path, "base", 2)
    (trained(toy_config, tmp_path, "base", 4) / "state.json").write_text("{")
    run = Run(config_from_dict(toy_config), tmp_path, "all")
    assert run.check_run(run.look_for_checkpoint) == {"base": ["base: resuming from step 2"], "sr": []}
    (older / "engine.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .*base is intact \(step-00000004: .*; step-00000002: "):
        run.check_run(run.look_for_checkpoint)


def test_shapes_that_are_not_rendered_yet_are_rendered_when_training_resumes(toy_config: dict, tmp_path: Path) -> None:
    trained(toy_config, tmp_path, "base", 2)
    now = changed(toy_config, fastimagen__data__shards=str(tmp_path / "elsewhere/train"))
    now["fastimagen"]["data"]["validation"] = None
    run = Run(config_from_dict(now), tmp_path, "base")
    (lines,) = run.check_run(run.look_for_checkpoint).values()
    assert lines[0] == "base: resuming from step 2" and any("data.shards" in line for line in lines)


def test_a_stage_whose_last_validation_is_unfinished_is_not_trained(toy_config: dict, tmp_path: Path) -> None:
    trained(toy_config, tmp_path, "base", 6, unfinished=["samples"])
    run = Run(config_from_dict(toy_config), tmp_path, "base")
    assert run.check_run(run.look_for_checkpoint) == {"base": ["base: resuming from step 6, with its preview grid"]}
    assert not run.is_trained(run.stages[0])


def test_the_text_encoder_of_a_trained_stage_stays(toy_config: dict, tmp_path: Path) -> None:
    """All stages of an exported model share it."""
    folder = trained(toy_config, tmp_path, "base", 6)
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["text.encoder"] = "another"
    (folder / "state.json").write_text(json.dumps(state))  # of a stage that is not selected: not verified
    run = Run(config_from_dict(toy_config), tmp_path, "sr")
    with pytest.raises(ValueError, match=r'base.*text.encoder "another" -> "text_encoder"'):
        run.check_run(run.look_for_checkpoint)


# ---- config.json


def written(tree: dict[str, Any], folder: Path, stage: str = "all") -> Run:
    """The run that config.json describes after a start with a configuration."""
    run = Run(config_from_dict(tree), folder, stage)
    run.check_run(run.look_for_checkpoint)
    run.write_config()
    return Run(load_config(folder / "config.json"), folder, "all")


@pytest.mark.parametrize("stage", ["all", "sr"])
def test_config_json_keeps_the_sections_of_a_trained_stage(stage: str, toy_config: dict, tmp_path: Path) -> None:
    toy_config["fastimagen"]["train"]["ema"] = {"decay": 0.9}
    trained(toy_config, tmp_path, "base", 6)
    now = changed(toy_config, fastimagen__train__ema={"decay": 0.5}, fastimagen__train__steps=5)
    now["fastimagen"]["train"]["stages"]["sr"] = {"steps": 4}
    for config in now["fastimagen"]["cascade"]["stages"]:
        config["sampling"] = {**config["sampling"], "steps": 9}
        config["objective"] = {"caption_dropout": 0.3}
    run = written(now, tmp_path, stage)
    base, sr = run.cascade.stages
    assert (base.sampling.steps, base.objective.caption_dropout) == (2, 0.1)  # as trained, as `export` writes it
    assert (sr.sampling.steps, sr.objective.caption_dropout) == (9, 0.3)
    own = run.settings.stages["base"]
    assert own.steps == 6 and own.ema is not None and own.ema.decay == 0.9
    assert run.settings.ema.decay == 0.5 and run.settings.stages["sr"] == StageTrainConfig(steps=4)
    assert run.settings.steps is None  # no stage has it
    before = (tmp_path / "config.json").read_text()
    assert written(json.loads(before), tmp_path, stage).config.to_json() == before


def test_config_json_is_that_of_the_start_where_nothing_is_trained(toy_config: dict, tmp_path: Path) -> None:
    trained(toy_config, tmp_path, "base", 3)
    now = changed(toy_config, fastimagen__train__log_every=5)
    assert written(now, tmp_path).config.to_json() == Run(config_from_dict(now), tmp_path, "all").config.to_json()


def test_config_json_stays_where_nothing_is_left_to_train(toy_config: dict, tmp_path: Path) -> None:
    for stage in ("base", "sr"):
        trained(toy_config, tmp_path, stage, 6)
    run = Run(config_from_dict(changed(toy_config, fastimagen__train__log_every=5)), tmp_path, "all")
    notices = run.check_run(run.look_for_checkpoint)
    run.write_config()
    assert notices["sr"][1] == "sr: train.log_every 1 -> 5 does not change it: trained to step 6"
    assert not (tmp_path / "config.json").exists()


def test_stages_train_side_by_side_with_one_configuration(toy_config: dict, tmp_path: Path) -> None:
    content = Run(config_from_dict(toy_config), tmp_path, "all").config.to_json()
    with stage_lock(tmp_path, ["base"], content):
        written(toy_config, tmp_path, "sr")
        now = changed(toy_config, fastimagen__train__log_every=5)
        with pytest.raises(
            ValueError, match=r"^process .* trains stage base of .*\(fastimagen.train.log_every 1 -> 5\)"
        ):
            written(now, tmp_path, "sr")
    written(changed(toy_config, fastimagen__train__log_every=5), tmp_path, "sr")


# ---- lengths


@pytest.mark.parametrize("length", [{"steps": 9}, {"epochs": 0.5}])
def test_a_length_that_no_stage_has_is_refused(
    length: dict[str, Any], toy_config: dict, write_config: Callable[[dict], Path]
) -> None:
    train = toy_config["fastimagen"]["train"]
    del train["steps"]
    train |= {**length, "stages": {"base": {"epochs": 2}}}
    path = write_config(toy_config)
    Trainer(load_config(path))  # sr has it
    (key,) = length
    overrides = ["fastimagen.train.stages.sr.steps=3"]
    with pytest.raises(
        ValueError, match=rf"fastimagen.train.{key} .* has no effect.*train.stages.base, train.stages.sr"
    ):
        Trainer(load_config(path, overrides))


def test_numbers_and_their_nouns_agree() -> None:
    assert [counted(number, "shard") for number in (0, 1, 1.0, 0.5, 1234567)] == [
        "0 shards",
        "1 shard",
        "1 shard",
        "0.5 shards",
        "1234567 shards",
    ]
