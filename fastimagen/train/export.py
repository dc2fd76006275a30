"""Export: averaged weights of the stages that a run has trained, as a model directory.

Without `ema` it is the average of the configured decay, on which val_loss, --step best and the preview grids depend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import CascadeConfig, Config, StageConfig, StageTrainConfig, TrainConfig
from ..config_file import load_config, validate
from ..data.buckets import bucket_sizes
from ..files import atomic_folder, read_safetensors, require_empty
from ..presets import resolve
from ..sampling.adapters import ADAPTER_FILE
from ..sampling.model_directory import write_model
from ..sizes import ImageSize
from ..text.t5 import is_path
from .adapters import base_weights, merge_into_base, saved_lora, write_adapters
from .checkpoint import best, checkpoints, damage, read_average, read_state
from .model_card import StageFacts, model_card
from .power_average import MAX_SIGMA_REL
from .reconstruct import average_of_length


class Trained(NamedTuple):
    """A stage of a run. weights: averaged, as in its checkpoint; those of adapters where it trained adapters.

    averaged: how, for the model card. line: for the user.
    """

    config: StageConfig
    state: dict[str, Any]
    weights: dict[str, Tensor]
    averaged: str
    line: str

    @property
    def has_adapters(self) -> bool:
        return saved_lora(self.state.get("settings", {})) is not None


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: str | int = "newest",
    ema: str | float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the model directory of a run, with weights of `dtype`. Adapters are merged into the weights under them.

    A stage that is not trained is that of its init_from, or is left out. step: "newest", "best" (smallest validation
    loss) or a number, for all stages or for each, as in "base=500,sr=best". ema: length sigma_rel of the average, for
    all stages or for each, as in "base=0.05" (reconstruct.py). say: gets a line for each stage. Raises ValueError if no
    stage is trained, if there is no such checkpoint or it is damaged, if the length cannot be made, if the weights
    under adapters are gone, and if `out` is not empty.
    """
    run = Path(run)
    require_empty(Path(out))
    config, planned = _planned(run)
    trained = _read(run, planned, config.fastimagen.train, step, ema, say)
    untrained = _starting_points(config, [stage for stage in planned if trained and stage.name not in trained])
    stages, weights, facts, lines = [], {}, [], []
    resolved = config.fastimagen.model_copy(update={"cascade": CascadeConfig(stages=planned)})
    sizes = {stage.name: bucket_sizes(resolved, stage) or [ImageSize.of(stage.size)] for stage in planned}
    for name in _contiguous(run, [stage.name for stage in planned], {*trained, *untrained}, say):
        if name in trained:
            stage = trained[name]
            stages.append(stage.config)
            weights[name] = _merged(name, stage)
            steps, averaged = stage.state["step"], stage.averaged
            lines.append(stage.line)
        else:
            stages.append(next(stage for stage in planned if stage.name == name))
            weights[name], steps, averaged = read_safetensors(untrained[name]), 0, "none"
            lines.append(f"{name}: not trained, as in {untrained[name].parent}")
        parameters = sum(weight.numel() for weight in weights[name].values())
        facts.append(StageFacts(name, sizes[name], parameters, steps, averaged))
    first = [stage.name for stage in planned].index(stages[0].name)
    if first:  # the stage below is not trained: this one still enlarges its size
        stages[0] = stages[0].model_copy(update={"lowres_size": planned[first - 1].size})
    cascade = CascadeConfig(stages=tuple(stages))
    encoder, folder = _text_encoder(config) if any(stage.unet.text_dim for stage in stages) else (None, None)
    grid = _newest_grid(run / "samples" / stages[-1].name)
    model = write_model(
        Path(out),
        cascade,
        weights,
        text_encoder=encoder,
        encoder_folder=folder,
        card=model_card(
            run.name,
            config.fastimagen,
            cascade,
            facts,
            includes_encoder=folder is not None,
            has_grid=grid is not None,
        ),
        grid=grid,
        dtype=getattr(torch, dtype),
        sizes=sizes,
    )
    for line in lines:
        say(line)
    return model


def export_adapters(
    run: str | Path,
    out: str | Path,
    *,
    step: str | int = "newest",
    ema: str | float | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write OUT/STAGE/pytorch_lora_weights.safetensors for every stage of a run that trained adapters.

    diffusers loads those of DeepFloyd IF's networks. step, ema, say, errors: as `export`.
    """
    run = Path(run)
    require_empty(Path(out))
    config, planned = _planned(run)
    trained = _read(run, planned, config.fastimagen.train, step, ema, say)
    adapted = {name: stage for name, stage in trained.items() if stage.has_adapters}
    if not adapted:
        raise ValueError(f"{run}: no stage has trained adapters (train.stages.NAME.lora): leave out --adapters")
    with atomic_folder(out) as temporary:
        for name, stage in adapted.items():
            (temporary / name).mkdir()
            write_adapters(temporary / name / ADAPTER_FILE, stage.state, stage.weights)
    for stage in adapted.values():
        say(stage.line)
    return Path(out)


def _planned(run: Path) -> tuple[Config, tuple[StageConfig, ...]]:
    """The configuration of a run, and its stages, trained or not."""
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is not a run directory: it has no config.json")
    config = load_config(run / "config.json")
    return config, resolve(config.fastimagen.cascade).stages


def _read(
    run: Path,
    planned: Sequence[StageConfig],
    train: TrainConfig,
    step: str | int,
    ema: str | float | None,
    say: Callable[[str], object],
) -> dict[str, Trained]:
    """The trained stages by name, with the chosen average of the chosen checkpoint."""
    names = [stage.name for stage in planned]
    wanted, lengths = _steps(str(step), names), _lengths(ema, names)
    chosen = {name: _choose(run / "checkpoints" / name, wanted[name], say) for name in names}
    trained = {}
    for name, path in chosen.items():
        if path is None:
            continue
        state = read_state(path)
        config = validate(StageConfig, state["stage"], f"stage {name}")
        if name in lengths:
            weights, average = average_of_length(path, lengths[name], say)
            what, averaged = f", average of {average}", f"length {lengths[name]:g}"
        else:
            weights = read_average(path)
            averaged = f"decay {(train.stages.get(name, StageTrainConfig()).ema or train.ema).decay:g}"
            what = "" if state.get("val_loss") is None else f", val_loss {state['val_loss']:.4g}"
        trained[name] = Trained(config, state, weights, averaged, f"{name}: step {state['step']}{what}")
    return trained


def _merged(name: str, stage: Trained) -> dict[str, Tensor]:
    return merge_into_base(name, stage.state, stage.weights) if stage.has_adapters else stage.weights


def _starting_points(config: Config, stages: Sequence[StageConfig]) -> dict[str, Path]:
    """The files with the weights that untrained stages would start from; a few-step student is none without
    training."""
    settings = config.fastimagen.train
    if settings.distill is not None:
        return {}
    own = {stage.name: settings.stages.get(stage.name, StageTrainConfig()) for stage in stages}
    found = {name: base_weights(value, name) for name, value in own.items() if value.init_from is not None}
    return {name: path for name, path in found.items() if path.is_file()}


def _by_stage(flag: str, value: str, names: list[str]) -> dict[str, str]:
    """{stage: value} of "500", for all stages, or of "base=500,sr=best", for those that it names."""
    if "=" not in value:
        return dict.fromkeys(names, value)
    given = dict(part.strip().partition("=")[::2] for part in value.split(","))
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(f"{flag} names the stage {unknown[0]}; the stages are {', '.join(names)}")
    return given


def _steps(step: str, names: list[str]) -> dict[str, str]:
    """ "newest", "best" or a number for each stage."""
    wanted = dict.fromkeys(names, "newest") | _by_stage("--step", step, names)
    for value in wanted.values():
        if value not in ("newest", "best") and not value.isdecimal():
            raise ValueError(
                f'--step takes a number, "best" or "newest", or one for each stage (base=500), got {value}'
            )
    return wanted


def _lengths(ema: str | float | None, names: list[str]) -> dict[str, float]:
    """The lengths of power-function averages, for stages that are to have one."""
    lengths = {}
    for name, value in ({} if ema is None else _by_stage("--ema", str(ema), names)).items():
        try:
            lengths[name] = float(value)
        except ValueError:
            lengths[name] = 0.0
        if not 0 < lengths[name] < MAX_SIGMA_REL:
            raise ValueError(
                f"--ema takes a length between 0 and {MAX_SIGMA_REL:.3f}, such as 0.05, or one for each stage "
                f"(base=0.05), got {value}"
            )
    return lengths


def _choose(folder: Path, wanted: str, say: Callable[[str], object]) -> Path | None:
    """The checkpoint of a stage to export, intact; None if the stage has none yet."""
    found = checkpoints(folder)
    if not found:
        return None
    steps = ", ".join(str(int(path.name[-8:])) for path in found)
    if wanted == "newest":
        for path in reversed(found):
            if (problem := damage(path)) is None:
                return path
            say(f"{path} is damaged: {problem}; taking the one before it")
        raise ValueError(f"no checkpoint in {folder} is intact")
    if wanted == "best":
        path = best(folder) or folder
        if path == folder:
            raise ValueError(f"no checkpoint in {folder} has a validation loss: give --step one of {steps}")
    else:
        path = folder / f"step-{int(wanted):08d}"
        if path not in found:
            raise ValueError(f"{folder} has no checkpoint of step {wanted}: it has {steps}")
    if (problem := damage(path)) is not None:
        raise ValueError(f"{path} is damaged: {problem}; give --step another one of {steps}")
    return path


def _contiguous(run: Path, names: list[str], chosen: Collection[str], say: Callable[[str], object]) -> list[str]:
    """The stages that there are, in order. Raises ValueError if there are none, or one between them is not trained."""
    trained = [name for name in names if name in chosen]
    if not trained:
        raise ValueError(f"{run}: no stage has a checkpoint yet; train it first")
    between = names[names.index(trained[0]) : names.index(trained[-1]) + 1]
    if missing := [name for name in between if name not in chosen]:
        raise ValueError(f"{run}: stage {missing[0]} has no checkpoint yet, and {trained[-1]} enlarges its images")
    for name in names:
        if name not in chosen:
            say(f"{name}: not trained yet, left out")
    return trained


def _newest_grid(folder: Path) -> Path | None:
    """The last grid of images that training sampled; None if there is none."""
    grids = sorted(folder.glob("step-*.png"))
    return grids[-1] if grids else None


def _text_encoder(config: Config) -> tuple[dict[str, Any], Path | None]:
    """The entry of model_index.json, and the folder to copy: a local encoder is included, so that the model works on
    another machine; one from the hub is named."""
    text = config.fastimagen.text
    folder = Path(text.encoder)
    included = folder.is_dir()
    if not included and is_path(text.encoder):
        raise ValueError(
            f"the run's text.encoder is {text.encoder}, but there is no such folder: run export in the directory that "
            f"training was started in"
        )
    reference = {
        "name": "text_encoder" if included else text.encoder,
        "revision": text.revision,
        "max_length": text.max_length,
        "encoding": text.encoding,
        "included": included,
    }
    return reference, folder if included else None
