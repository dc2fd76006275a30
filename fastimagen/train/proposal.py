"""A starting configuration for a collection of images and the machine at hand: `fastimagen init` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config import SamplingConfig, StageConfig
from ..data.survey import Survey
from ..diffusion_config import AugmentationConfig, ObjectiveConfig
from ..network_config import UNetConfig
from ..networks.build import build_network
from ..presets import shapes
from ..text.embeddings import LENGTH_MULTIPLE
from ..text.t5 import text_width
from .activations import Peaks, measure
from .memory import process_memory

SIZES = (32, 64, 128, 256, 512, 1024)
"""Final sizes; `stage_sizes` has the stages of each."""

DEEPSPEED: dict[str, Any] = {
    "optimizer": {"type": "AdamW"},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "gradient_accumulation_steps": 2,
}
"""What the memory of a process depends on, as `_content` sets it; with accumulation, which needs the most."""

USABLE_SHARE = 0.7
"""Of a GPU's memory: the rest is for CUDA's context, fragmentation, cuDNN's workspaces and validation."""

LARGE_GPU_GIB = 20
"""From here on the larger networks, those of launch/configs/own_images.json."""

TRAINING_PASSES = 300
"""Times that training reads every image, within MIN_STEPS and MAX_STEPS."""

MIN_STEPS, MAX_STEPS, CPU_STEPS = 5_000, 200_000, 2_000

CPU_SIZE = 64
"""Largest final size without a GPU."""


@dataclass(frozen=True)
class Machine:
    """Where training will run. gpus: number of GPUs; gib: memory of the smallest in GiB."""

    gpus: int
    gib: float = 0.0
    name: str = "CPU"

    @classmethod
    def here(cls) -> Machine:
        """This machine, as PyTorch sees it."""
        if not torch.cuda.is_available():
            return cls(0)
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return cls(len(devices), min(device.total_memory for device in devices) / 2**30, devices[0].name)


@dataclass(frozen=True)
class Proposal:
    """The content of a ds.json, and why it is as it is: (key, reason) in the order of the file."""

    content: dict[str, Any]
    reasons: list[tuple[str, str]]


def propose(found: Survey, machine: Machine, *, shards: str, run: str, size: int | None = None) -> Proposal:
    """A complete configuration. shards: of the images; run: run directory; size: of the final images, one of SIZES.

    Raises ValueError for another size.
    """
    reasons: list[tuple[str, str]] = []
    final = _final_size(found, machine, size, reasons)
    encoder = "large1.1" if machine.gpus else "small1.1"
    channels = 1 if found.grey else 3
    stages = _stages(stage_sizes(final), machine, channels, text_width(encoder))
    sizes = " to ".join(str(stage.size) for stage in stages)
    reasons.append(("fastimagen.cascade", f"{sizes} pixels, {_networks(machine)}"))
    reasons.append(("unet.channels", "1, all images are grey" if found.grey else "3, there are images in colour"))

    per_process = max(1, round(64 / machine.gpus)) if machine.gpus else 16
    batch = per_process * max(1, machine.gpus)
    steps = CPU_STEPS
    reason = f"{CPU_STEPS} per stage, which shows on a CPU whether everything works; good images need a GPU and more"
    if machine.gpus:
        steps = min(MAX_STEPS, max(MIN_STEPS, round(TRAINING_PASSES * found.count, -3) // batch))
        passes = steps * batch / found.count
        reason = f"{steps} per stage, {passes:.0f} times through {found.count} images; continue while val_loss falls"
    validation = max(1, min(500, found.count // 10))
    stage_settings: dict[str, Any] = {}
    for stage in stages:
        if machine.gpus:
            micro = micro_batch(stage, machine.gib, per_process)
            stage_settings[stage.name] = {"deepspeed": {"train_micro_batch_size_per_gpu": micro}}
            reasons.append(
                (
                    f"train.stages.{stage.name}.deepspeed",
                    f"{micro} images at a time should fit into {machine.gib:.0f} GiB",
                )
            )
    reasons += [
        ("fastimagen.train.steps", reason),
        ("train_batch_size", f"{batch} images per step; processes and accumulation share them"),
        ("fastimagen.data.validation", f"{validation} images are held out, chosen by their names, never trained on"),
        ("fastimagen.text.encoder", f"{encoder}, a T5 of width {text_width(encoder)} from the Hugging Face hub"),
    ]
    reasons += _remarks(found, final)
    return Proposal(_content(stages, stage_settings, batch, steps, validation, encoder, found, shards, run), reasons)


def stage_sizes(final: int) -> list[int]:
    """The sizes of the stages below a final size, each at most four times the one below, and the size itself."""
    if final <= 32:
        return [final]
    if final <= 128:
        return [final // 2, final]
    return [64, 256, final] if final > 256 else [64, final]


def micro_batch(stage: StageConfig, gib: float, most: int) -> int:
    """The largest divisor of `most` images that fits a GPU of `gib` GiB, by the dry run's estimate; at least 1."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_network(stage.unet).parameters())
    one = measure(stage, 1, torch.bfloat16, tokens=LENGTH_MULTIPLE, gpu=True).activations

    def fits(micro: int) -> bool:
        peaks = Peaks(micro * one, micro * one + 2 * parameters)  # gradients in bf16
        peak = process_memory(DEEPSPEED, parameters, 0, peaks, processes=1, gpu=True).peak
        return peak <= USABLE_SHARE * gib * 2**30

    return max(micro for micro in range(1, most + 1) if most % micro == 0 and (micro == 1 or fits(micro)))


def _final_size(found: Survey, machine: Machine, size: int | None, reasons: list[tuple[str, str]]) -> int:
    """The final size: as asked, or the largest that three quarters of the images have and the machine can train."""
    if size is not None:
        if size not in SIZES:
            raise ValueError(f"--size must be one of {', '.join(map(str, SIZES))}, got {size}")
        reasons.append(("size", f"{size} pixels, as you asked"))
        return size
    limit = CPU_SIZE if not machine.gpus else 256 if machine.gib < 40 else 1024
    side = found.side_quantile(0.25)
    final = max([candidate for candidate in SIZES if candidate <= min(side, limit)], default=SIZES[0])
    why = f"three quarters of the images have at least {side} pixels on their shorter side"
    if final == limit:
        why = f"the most that is sensible on this machine ({machine.name}); --size sets another"
    reasons.append(("size", f"{final} pixels: {why}"))
    return final


def _networks(machine: Machine) -> str:
    if not machine.gpus:
        return "with the quickstart's small networks"
    large = machine.gib >= LARGE_GPU_GIB
    return "with up to 200 M parameters a stage" if large else "with small networks, for a GPU of less than 20 GiB"


def _stages(sizes: list[int], machine: Machine, channels: int, text_dim: int) -> list[StageConfig]:
    stages = []
    for index, size in enumerate(sizes):
        name = f"sr{size}" if index else f"base{size}"
        make = _gpu_stage if machine.gpus else _cpu_stage
        stage = make(size, bool(index), text_dim, machine)
        unet = stage.unet.model_copy(update={"channels": channels})
        stages.append(StageConfig.model_validate(stage.model_dump() | {"name": name, "unet": unet.model_dump()}))
    return stages


def _cpu_stage(size: int, enlarges: bool, text_dim: int, machine: Machine) -> StageConfig:
    """A stage of the quickstart, whose networks work on patches."""
    stage = shapes(text_dim).stages[int(enlarges)]
    return stage.model_copy(update={"size": size, "crop": size // 2 if enlarges else None})


def _gpu_stage(size: int, enlarges: bool, text_dim: int, machine: Machine) -> StageConfig:
    """A stage as in launch/configs/own_images.json, or a smaller one."""
    large = machine.gib >= LARGE_GPU_GIB
    if not enlarges:
        unet = UNetConfig(
            text_dim=text_dim,
            dim=192 if large else 128,
            dim_mults=(1, 2, 3, 4),
            num_blocks=2 if large else 1,
            self_attention=(False, True, True, True),
            cross_attention=(False, True, True, True),
            middle_attention=True,
            cond_dim=768 if large else 512,
            stem_kernels=(3,),
            qk_norm=True,
        )
        return StageConfig(name="base", size=size, unet=unet, sampling=SamplingConfig(steps=32, guidance=5.0))
    unet = UNetConfig(
        text_dim=text_dim,
        lowres=True,
        dim=128 if large else 64,
        dim_mults=(1, 2, 4, 4),
        num_blocks=(1, 2, 3, 3) if large else (1, 1, 2, 2),
        self_attention=False,
        cross_attention=(False, False, False, True),
        downsample_first=True,
        full_resolution="extra_block",
        cond_dim=512,
        stem_kernels=(3,),
        qk_norm=True,
    )
    return StageConfig(
        name="sr",
        size=size,
        crop=None if size < 128 else min(256, size // 2),
        unet=unet,
        objective=ObjectiveConfig(),
        augmentation=AugmentationConfig(train_range=(0.0, 0.5), sample_level=0.1),
        sampling=SamplingConfig(steps=16, guidance=3.0),
    )


def _remarks(found: Survey, final: int) -> list[tuple[str, str]]:
    """What the images and captions lose."""
    remarks = []
    small = sum(side < final for side in found.shorter_sides) / len(found.shorter_sides)
    if small:
        remarks.append(("size", f"{small:.0%} of the images are smaller than {final} pixels and will be enlarged"))
    if found.square_share < 1:
        remarks.append(
            ("size", f"{1 - found.square_share:.0%} of the images are not square: training sees their central square, "
             f"{found.kept_area:.0%} of the area on average")
        )  # fmt: skip
    if found.uncaptioned:
        remarks.append(("fastimagen.data", f"{found.uncaptioned} images have no caption and are left out"))
    if found.foreign_letters > 0.01:
        remarks.append(
            ("fastimagen.text.encoder", f"{found.foreign_letters:.0%} of the letters in captions are not Latin. T5 was "
             f"trained on English, and has no tokens for other scripts: take an encoder that has them, such as "
             f"google/umt5-small, or translate the captions")
        )  # fmt: skip
    return remarks


def _content(
    stages: list[StageConfig],
    stage_settings: dict[str, Any],
    batch: int,
    steps: int,
    validation: int,
    encoder: str,
    found: Survey,
    shards: str,
    run: str,
) -> dict[str, Any]:
    """The file: DeepSpeed's keys, then ours."""
    every = max(1, steps // 10)
    scheduler = {"warmup_num_steps": "auto", "total_num_steps": "auto", "cos_min_ratio": 0.1}
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupCosineLR", "params": scheduler},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "tensorboard": {"enabled": True},
        "fastimagen": {
            "cascade": {"stages": [stage.model_dump(mode="json") for stage in stages]},
            "data": {"shards": shards, "validation": {"count": validation}},
            "text": {"encoder": encoder, "max_length": 256 if found.most_words > 60 else 128},
            "train": {
                "run": run,
                "steps": steps,
                **({"stages": stage_settings} if stage_settings else {}),
                "checkpoint_every": min(1000, every),
                "validate_every": every,
                "sample_every": every,
            },
        },
    }
