"""Pipelines of DeepFloyd IF in diffusers' format: to model directories and back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import CascadeConfig, StageConfig
from ..config_file import hint, validate
from ..files import atomic_folder, read_json_object, read_safetensors, require_empty, write_json
from ..network_config import IFUNetConfig
from ..networks.build import build_network
from ..sampling.model_directory import check_shapes, read_model, write_model
from .deepfloyd_unet import config_for_diffusers, config_of, weights_for_diffusers, weights_of

PIPELINES = {False: "IFPipeline", True: "IFSuperResolutionPipeline"}
"""diffusers' classes for stages without and with a low-resolution input."""

WEIGHTS = "diffusion_pytorch_model"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
VARIANCES = {"learned_range": "learned", "fixed_small": "small"}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
"""Known keys of scheduler_config.json, and diffusers' values where they are missing; its betas are "linear" then."""

FREE = ("clip_sample", "dynamic_thresholding_ratio", "sample_max_value", "thresholding", "beta_start", "beta_end")
"""Keys of the scheduler that may have any value: the betas' ends have no effect on squaredcos_cap_v2."""

NO_CEILING = 1e6
"""diffusers has no infinite sample_max_value."""

T5_XXL = ("google/t5-v1_1-xxl", 4096)
"""The text encoder of DeepFloyd IF, frozen, and the width of its embeddings."""

CARD = """---
library_name: fastimagen
pipeline_tag: {task}
tags: [imagen, diffusion, {task}]
license: deepfloyd-if-license
---

# {name}

DeepFloyd IF, converted from diffusers' format by fastimagen {version}.

| stage | size | parameters |
| --- | --- | --- |
{stages}

Text encoder: {encoder}

The weights have the licence of the model that they come from: DeepFloyd's own weights may be used for research only.
"""


# ---- import


def import_diffusers(sources: Sequence[str | Path], out: str | Path, *, text_encoder: str | None = None) -> Path:
    """Convert folders of IFPipeline and IFSuperResolutionPipeline, one or both, to a model directory; returns `out`.

    text_encoder: name on the hub or folder of the T5 to refer to; without it, that of the first source is copied. If it
    has none, or one in several files, DeepFloyd's own is named. Raises ValueError, and writes nothing, for folders of
    another class, missing or damaged files, unknown keys, weights that do not fit, and an `out` that is not empty.
    """
    out = Path(out)
    require_empty(out)
    stages, weights = [], {}
    for source in map(Path, sources):
        stage, stage_weights = _read_stage(source)
        stages.append(stage)
        weights[stage.name] = stage_weights
    stages.sort(key=lambda stage: stage.size)
    if len(stages) > 1:  # the size below is that of the stage below
        stages = [stages[0], *(stage.model_copy(update={"lowres_size": None}) for stage in stages[1:])]
    cascade = validate(CascadeConfig, {"stages": stages}, " and ".join(map(str, sources)))
    with ExitStack() as stack:
        folder = None if text_encoder else _encoder_folder(Path(sources[0]), stack)
        name = text_encoder or ("text_encoder" if folder else _default_encoder(cascade))
        encoder = {
            "name": name,
            "revision": None,
            "max_length": stages[0].unet.max_text_length,
            "encoding": "if",
            "included": folder is not None,
        }
        rows = [
            f"| {stage.name} | {stage.size}x{stage.size} | "
            f"{sum(weight.numel() for weight in weights[stage.name].values()) / 1e6:.2f} M |"
            for stage in stages
        ]
        task = "image-to-image" if stages[0].unet.lowres else "text-to-image"
        card = CARD.format(task=task, name=out.name, version=__version__, stages="\n".join(rows), encoder=name)
        return write_model(out, cascade, weights, text_encoder=encoder, encoder_folder=folder, card=card)


def _read_stage(source: Path) -> tuple[StageConfig, dict[str, Tensor]]:
    """The stage and the weights of a pipeline's folder."""
    if not (source / "model_index.json").is_file():
        raise ValueError(f"{source} is not a folder of a diffusers pipeline: it has no model_index.json")
    pipeline = read_json_object(source / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES.values():
        raise ValueError(f"{source} is a {pipeline}: only {' and '.join(PIPELINES.values())} can be imported")
    path = source / "unet/config.json"
    content = read_json_object(path)
    try:
        unet = config_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if pipeline != PIPELINES[unet.lowres]:
        raise ValueError(f"{source} is a {pipeline}, but its U-Net is that of a {PIPELINES[unet.lowres]}")
    size = content.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"{path}: sample_size must be the side of the images, got {size!r}")
    fields = _process(source / "scheduler/scheduler_config.json", unet.learned_variance)
    fields["sampling"] |= {"sampler": "ddpm", "steps": 50 if unet.lowres else 100, "guidance": 4 if unet.lowres else 7}
    if unet.lowres:
        noising = _process(source / "image_noising_scheduler/scheduler_config.json", True)
        # 250 of 1000 steps is the default of diffusers' pipeline.
        fields["augmentation"] = {
            "schedule": noising["schedule"],
            "sample_level": 0.25,
            "resize": "bilinear_corners",
        }
        fields["lowres_size"] = size // 4
    name = f"{'sr' if unet.lowres else 'base'}{size}"
    stage = validate(StageConfig, {"name": name, "size": size, "unet": unet, **fields}, str(source))
    weights, file = _read_weights(source / "unet")
    with torch.device("meta"):
        network = build_network(unet)
    weights = weights_of(weights)
    check_shapes(network, {name: tuple(weight.shape) for name, weight in weights.items()}, str(file))
    return stage, weights


def _process(path: Path, learned_variance: bool) -> dict[str, Any]:
    """schedule, objective and sampling of a stage from scheduler_config.json."""
    content = read_json_object(path)
    known = {**SCHEDULER, "beta_schedule": "linear"} | {k: v for k, v in content.items() if k in SCHEDULER}
    for key in content:
        if key not in SCHEDULER and not key.startswith("_"):
            raise ValueError(f'{path}: unknown key "{key}"; {hint(key, SCHEDULER, "known keys")}')
    allowed: dict[str, Sequence[Any]] = {"prediction_type": list(PREDICTIONS), "variance_type": list(VARIANCES)}
    for key, default in SCHEDULER.items():
        values = allowed.get(key, [default])
        if key not in (*FREE, "num_train_timesteps") and known[key] not in values:
            raise ValueError(f"{path}: {key} is {known[key]!r}; this can be {' or '.join(map(repr, values))}")
    dynamic = known["thresholding"]
    learned = VARIANCES[known["variance_type"]] == "learned" and learned_variance
    sampling = {
        "respacing": "leading",
        "variance": "learned" if learned else "small",
        "threshold": "dynamic" if dynamic else "static" if known["clip_sample"] else "none",
    }
    if dynamic:
        sampling |= {"percentile": known["dynamic_thresholding_ratio"], "ceiling": known["sample_max_value"]}
    return {
        "schedule": {"name": "squaredcos", "timesteps": known["num_train_timesteps"]},
        "objective": {"prediction": PREDICTIONS[known["prediction_type"]]},
        "sampling": sampling,
    }


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of one safetensors file, or of several with an index, in full or half precision, and the file."""
    for variant in ("", ".fp16"):
        single = folder / f"{WEIGHTS}{variant}.safetensors"
        if single.is_file():
            return read_safetensors(single), single
        index = folder / f"{WEIGHTS}.safetensors.index{variant}.json"
        if index.is_file():
            files = sorted(set(read_json_object(index).get("weight_map", {}).values()))
            return {name: weight for file in files for name, weight in read_safetensors(folder / file).items()}, index
    raise ValueError(f"{folder} has no {WEIGHTS}.safetensors, .fp16.safetensors or index of several files")


def _encoder_folder(source: Path, stack: ExitStack) -> Path | None:
    """A folder, until the stack closes, with the text encoder and the tokenizer of a pipeline; None if it has none."""
    weights = source / "text_encoder/model.safetensors"
    if not weights.is_file() or not (source / "tokenizer").is_dir():
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shutil.copytree(source / "tokenizer", folder, dirs_exist_ok=True)
    shutil.copyfile(source / "text_encoder/config.json", folder / "config.json")
    (folder / weights.name).symlink_to(weights.resolve())  # write_model copies what it points to
    return folder


def _default_encoder(cascade: CascadeConfig) -> str:
    name, width = T5_XXL
    if cascade.stages[0].unet.text_dim != width:
        raise ValueError(
            f"there is no text_encoder/model.safetensors, and embeddings of width {cascade.stages[0].unet.text_dim} "
            f"are not those of DeepFloyd's text encoder, {name}: name yours with --text-encoder"
        )
    return name


# ---- export


def export_diffusers(model: str | Path, out: str | Path) -> list[str]:
    """Write OUT/STAGE for every stage of a model directory whose network is IF's; returns a line for each stage.

    The folders are diffusers' IFPipeline or IFSuperResolutionPipeline, without text encoder. Raises ValueError if no
    stage can be exported, and for noise schedules that diffusers' scheduler does not have.
    """
    cascade, weights, _ = read_model(model)
    exported = [stage for stage in cascade.stages if isinstance(stage.unet, IFUNetConfig)]
    if not exported:
        raise ValueError(
            f'{model} has no stage of DeepFloyd IF (unet.kind "if"): diffusers has no network for the others'
        )
    files = {stage.name: _pipeline_files(stage) for stage in exported}  # raises before anything is written
    with atomic_folder(out) as temporary:
        for stage in exported:
            folder = temporary / stage.name
            for path, content in files[stage.name].items():
                write_json(folder / path, content)
            tensors = weights_for_diffusers(weights[stage.name])
            save_file(tensors, folder / f"unet/{WEIGHTS}.safetensors", metadata={"format": "pt"})
    done = [f"{Path(out) / stage.name}: {PIPELINES[stage.unet.lowres]}" for stage in exported]
    others = [stage.name for stage in cascade.stages if stage not in exported]
    return done + [f"{name}: not exported, because diffusers has no such network" for name in others]


def _pipeline_files(stage: StageConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a stage's pipeline, by path."""
    unet = stage.unet
    assert isinstance(unet, IFUNetConfig)
    if not unet.learned_variance:
        raise ValueError(
            f'stage "{stage.name}": diffusers\' pipelines of IF split the output into prediction and variance, '
            f"but unet.learned_variance is false"
        )
    absent: list[None] = [None, None]
    index: dict[str, Any] = {
        "_class_name": PIPELINES[unet.lowres],
        "feature_extractor": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": absent,
        "tokenizer": absent,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": absent,
    }
    files = {
        "unet/config.json": config_for_diffusers(unet, stage.size),
        "scheduler/scheduler_config.json": _scheduler(stage),
    }
    if stage.augmentation is not None:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
        noising = stage.augmentation.schedule
        _require_squaredcos(noising.name, f'stage "{stage.name}": augmentation.schedule')
        files["image_noising_scheduler/scheduler_config.json"] = SCHEDULER | {"num_train_timesteps": noising.timesteps}
    return {"model_index.json": index, **files}


def _scheduler(stage: StageConfig) -> dict[str, Any]:
    """scheduler_config.json of a stage."""
    _require_squaredcos(stage.schedule.name, f'stage "{stage.name}": schedule')
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if stage.objective.prediction not in predictions:
        raise ValueError(f'stage "{stage.name}": diffusers has no prediction "{stage.objective.prediction}"')
    sampling = stage.sampling
    ceiling = NO_CEILING if sampling.ceiling is None else sampling.ceiling
    return SCHEDULER | {
        "clip_sample": sampling.threshold != "none",
        "dynamic_thresholding_ratio": sampling.percentile,
        "num_train_timesteps": stage.schedule.timesteps,
        "prediction_type": predictions[stage.objective.prediction],
        "sample_max_value": ceiling,
        "thresholding": sampling.threshold == "dynamic",
        "variance_type": "learned_range" if sampling.variance == "learned" else "fixed_small",
    }


def _require_squaredcos(name: str, where: str) -> None:
    if name != "squaredcos":
        raise ValueError(f'{where} is "{name}", but diffusers\' scheduler of IF has "squaredcos" alone')
