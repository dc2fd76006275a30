"""config.json of a run directory. It claims nothing that a trained stage has not used.

Its sections of a stage, `cascade.stages` and `train.stages.NAME`, are those that the stage was trained with, or, where
this start trains it, those that it gets. All other keys are those of the last start that trained something. A trained
stage that used other ones is named by that start (resume.check_trained); its checkpoints have all that it used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import CascadeConfig, Config, EMAConfig, StageConfig, StageTrainConfig, TrainConfig
from ..files import atomic_file
from .adapters import saved_lora
from .length import has_own_length, planned_epochs, planned_steps
from .run_lock import shared_lock


def write_config(run_dir: Path, config: Config, trained: Mapping[str, dict[str, Any]]) -> None:
    """Write config.json. trained: state.json of the stages that this start does not train, as far as they have one."""
    with shared_lock(run_dir, "config"), atomic_file(run_dir / "config.json") as temporary:
        temporary.write_text(as_trained(config, trained).to_json())


def as_trained(config: Config, trained: Mapping[str, dict[str, Any]]) -> Config:
    """The same configuration, whose cascade is resolved, with the sections of some stages from their state.json."""
    ours = config.fastimagen
    assert isinstance(ours.cascade, CascadeConfig)
    stages = [
        StageConfig.model_validate(trained[stage.name]["stage"]) if stage.name in trained else stage
        for stage in ours.cascade.stages
    ]
    train = ours.train
    for name, state in trained.items():
        own = _settings_of(name, train, state["settings"])
        if own != StageTrainConfig():
            train = train.model_copy(update={"stages": {**train.stages, name: own}})
    if all(has_own_length(train, stage.name) for stage in stages):
        train = train.model_copy(update={"steps": None, "epochs": None})
    cascade = ours.cascade.model_copy(update={"stages": tuple(stages)})
    return config.model_copy(update={"fastimagen": ours.model_copy(update={"cascade": cascade, "train": train})})


def _settings_of(name: str, train: TrainConfig, saved: dict[str, Any]) -> StageTrainConfig:
    """train.stages.NAME with what the stage was trained with, by dotted key."""
    own = train.stages.get(name, StageTrainConfig())
    update: dict[str, Any] = {"init_from": saved["train.init_from"], "lora": saved_lora(saved)}
    steps, epochs = saved["train.steps"], saved["train.epochs"]
    if epochs is not None and epochs != planned_epochs(train, name):
        update |= {"steps": None, "epochs": epochs}
    elif epochs is None and (planned_epochs(train, name) is not None or planned_steps(train, name) != steps):
        update |= {"steps": steps, "epochs": None}
    ema = EMAConfig(**{field: saved[f"train.ema.{field}"] for field in EMAConfig.model_fields})
    if ema != (own.ema or train.ema):
        update["ema"] = ema
    return own.model_copy(update=update)
