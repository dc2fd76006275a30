"""Export: averaged weights of the stages that a run has trained, as a model directory.

Without `ema` it is the average of the configured decay, on which val_loss, --step best and the preview grids depend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import CascadeConfig, Config, StageConfig, StageTrainConfig
from ..config_file import load_config, validate
from ..files import require_empty
from ..presets import resolve
from ..sampling.model_directory import write_model
from ..text.t5 import is_path
from .checkpoint import best, checkpoints, damage, read_average, read_state
from .model_card import StageFacts, model_card
from .power_average import MAX_SIGMA_REL
from .reconstruct import average_of_length


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: str | int = "newest",
    ema: str | float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the model directory of a run, with weights of `dtype`.

    step: "newest", "best" (smallest validation loss) or a number, for all stages or for each, as in "base=500,sr=best".
    ema: length sigma_rel of the average, for all stages or for each, as in "base=0.05" (reconstruct.py). say: gets a
    line for each stage, exported or not trained yet. Raises ValueError if no stage is trained, if there is no such
    checkpoint or it is damaged, if the length cannot be made, and if `out` is not empty.
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is not a run directory: it has no config.json")
    require_empty(Path(out))
    config = load_config(run / "config.json")
    planned = resolve(config.fastimagen.cascade).stages
    wanted = _steps(str(step), [stage.name for stage in planned])
    lengths = _lengths(ema, [stage.name for stage in planned])
    chosen = {
        stage.name: path
        for stage in planned
        if (path := _choose(run / "checkpoints" / stage.name, wanted[stage.name], say)) is not None
    }
    stages, weights, facts, lines = [], {}, [], []
    for name in _contiguous(run, [stage.name for stage in planned], chosen, say):
        state = read_state(chosen[name])
        stages.append(validate(StageConfig, state["stage"], f"stage {name}"))
        if name in lengths:
            weights[name], average = average_of_length(chosen[name], lengths[name], say)
        else:
            weights[name], average = read_average(chosen[name]), ""
        parameters = sum(weight.numel() for weight in weights[name].values())
        train = config.fastimagen.train
        ema = train.stages.get(name, StageTrainConfig()).ema or train.ema
        averaged = f"length {lengths[name]:g}" if name in lengths else f"decay {ema.decay:g}"
        facts.append(StageFacts(name, stages[-1].size, parameters, state["step"], averaged))
        if average:
            lines.append(f"{name}: step {state['step']}, average of {average}")
        else:
            loss = "" if state.get("val_loss") is None else f", val_loss {state['val_loss']:.4g}"
            lines.append(f"{name}: step {state['step']}{loss}")
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
    )
    for line in lines:
        say(line)
    return model


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


def _contiguous(run: Path, names: list[str], chosen: dict[str, Path], say: Callable[[str], object]) -> list[str]:
    """The trained stages, in order. Raises ValueError if there are none, or one between them is not trained."""
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
