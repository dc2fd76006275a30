"""Which values of the configuration contradict each other, section by section.

Each function raises ValueError with one line: what is wrong, what is allowed, which key to change. config.py calls them
when it validates a section, so that nothing is read, trained or sampled with settings that cannot work together.
Settings that a choice elsewhere makes ineffective are errors too. Rules that need files or torch are in
train/field_checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .respacing import respaced
from .sizes import ImageSize

if TYPE_CHECKING:
    from .config import CascadeConfig, SamplingConfig, StageConfig
    from .diffusion_config import AugmentationConfig, ObjectiveConfig, PerceptualConfig, ScheduleConfig
    from .network_config import IFUNetConfig, PixelTransformerConfig, UNetConfig
    from .section import Section

RESERVED_NAMES = {
    "all": "--stage all trains all stages",
    "text_encoder": "model directories have a folder of that name",
}
"""Names that no stage can have, and why."""

MIN_LPIPS = 16
"""Pixels: VGG16 halves an image four times before the last features of LPIPS."""


def check_unet(unet: UNetConfig) -> None:
    """Rules between the fields of a U-Net."""
    levels = len(unet.dim_mults)
    if not levels or min(unet.dim_mults) < 1:
        raise ValueError(f"dim_mults must hold at least one positive number, got {unet.dim_mults}")
    for name in ("num_blocks", "self_attention", "cross_attention"):
        value = getattr(unet, name)
        if isinstance(value, tuple) and len(value) != levels:
            raise ValueError(f"{name} has {len(value)} entries but dim_mults has {levels} levels")
    if unet.dim < 4 or unet.dim % 2:
        raise ValueError(f"dim must be even and at least 4, for the sinusoidal time embedding, got {unet.dim}")
    for width in (unet.dim, *(unet.dim * mult for mult in unet.dim_mults)):
        if width % unet.groups:
            raise ValueError(f"a level of {width} channels cannot be split into groups = {unet.groups}")
    if min(unet.per_level(unet.num_blocks)) < 0:
        raise ValueError(f"num_blocks must not be negative, got {unet.num_blocks}")
    if not unet.stem_kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in unet.stem_kernels):
        raise ValueError(f"stem_kernels must be odd, got {unet.stem_kernels}")
    if 2 ** (len(unet.stem_kernels) - 1) > unet.dim:  # the kernels have dim / 2, dim / 4, ... channels
        raise ValueError(f"dim {unet.dim} has too few channels for {len(unet.stem_kernels)} stem_kernels")
    if unet.text_dim is None and (unet.text_in_self_attention or unet.text_padding == "null"):
        raise ValueError('text_in_self_attention and text_padding "null" need text_dim')
    if unet.text_in_self_attention and not any(unet.per_level(unet.self_attention)):
        raise ValueError("text_in_self_attention needs a level with self_attention")
    if any(not 0 <= level < levels for level in unet.checkpoint_levels):
        raise ValueError(f"checkpoint_levels must be levels from 0 to {levels - 1}, got {unet.checkpoint_levels}")
    if unet.full_resolution == "extra_block" and not unet.downsample_first:
        raise ValueError('full_resolution "extra_block" needs "downsample_first": true')


def check_pixel_transformer(config: PixelTransformerConfig) -> None:
    """Rules between the fields of a pixel transformer."""
    if config.dim % config.heads or config.dim // config.heads % 8 or not 16 <= config.dim // config.heads <= 128:
        raise ValueError(
            f"dim / heads, the channels per head, must be a multiple of 8 from 16 to 128, got {config.dim} / "
            f"{config.heads}"
        )
    if any(not 0 <= block < config.depth for block in config.checkpoint_levels):
        raise ValueError(
            f"checkpoint_levels must be blocks from 0 to {config.depth - 1}, got {config.checkpoint_levels}"
        )
    if config.text_from >= config.depth:
        raise ValueError(f"text_from {config.text_from} leaves no block of {config.depth} that reads text")
    if config.text_reading == "tokens":
        _require_defaults(config, ("cond_dim",), 'for "text_reading": "cross_attention"')
    if config.text_dim is None:
        for name in ("text_reading", "text_from", "cond_dim"):
            if getattr(config, name) != type(config).model_fields[name].default:
                raise ValueError(f'"{name}" needs text_dim')


def check_if_unet(unet: IFUNetConfig) -> None:
    """Rules between the fields of a U-Net of DeepFloyd IF."""
    levels = len(unet.dims)
    if levels < 1 or len(unet.blocks) != levels or len(unet.attention) != levels:
        raise ValueError(
            f"dims, num_blocks and attention must have one entry for each level, got {levels}, {len(unet.blocks)} and "
            f"{len(unet.attention)} entries"
        )
    if min(unet.blocks) < 1:
        raise ValueError(f"num_blocks must be positive, got {unet.num_blocks}")
    for width in (*unet.dims, *([unet.context_dim] if unet.context_dim else [])):
        if width < 1 or width % unet.groups:
            raise ValueError(f"{width} channels cannot be split into groups = {unet.groups}")
    if unet.dims[0] % 2:
        raise ValueError(f"dims must begin with an even number, for the sinusoidal time embedding, got {unet.dims[0]}")
    for width, has_attention in zip((*unet.dims, unet.dims[-1]), (*unet.attention, True)):
        if has_attention and width % unet.head_dim:
            raise ValueError(f"a level of {width} channels cannot be split into heads of head_dim = {unet.head_dim}")
    if unet.text_dim % unet.pool_heads:
        raise ValueError(f"text_dim {unet.text_dim} cannot be split into pool_heads = {unet.pool_heads}")
    if any(not 0 <= level < levels for level in unet.checkpoint_levels):
        raise ValueError(f"checkpoint_levels must be levels from 0 to {levels - 1}, got {unet.checkpoint_levels}")


def check_schedule(schedule: ScheduleConfig) -> None:
    """Rules between the fields of a noise schedule."""
    if schedule.name in ("linear", "squaredcos"):
        if schedule.timesteps is None:
            raise ValueError(
                f'the {schedule.name} schedule is discrete: set "timesteps" (1000 in DDPM, MinImagen and DeepFloyd IF)'
            )
        _require_defaults(schedule, ("shift",), "for the cosine schedule and flow")
    elif schedule.timesteps is not None:
        raise ValueError(f'the {schedule.name} schedule is continuous: remove "timesteps"')
    if schedule.name != "cosine":
        _require_defaults(schedule, ("logsnr_range",), "for the cosine schedule")
    if schedule.logsnr_range[0] >= schedule.logsnr_range[1]:
        raise ValueError(f"logsnr_range must ascend, got {schedule.logsnr_range}")


def check_objective(objective: ObjectiveConfig) -> None:
    """Rules between the fields of an objective."""
    if objective.weighting != "min_snr":
        _require_defaults(objective, ("min_snr_gamma",), 'for "weighting": "min_snr"')
    if objective.times != "edm":
        _require_defaults(objective, ("edm_mean", "edm_std"), 'for "times": "edm"')
    if objective.times != "logit_normal":
        _require_defaults(objective, ("logit_mean", "logit_std"), 'for "times": "logit_normal"')
    if objective.prediction != "edm":
        _require_defaults(objective, ("sigma_data",), 'for "prediction": "edm"')


def check_perceptual(perceptual: PerceptualConfig) -> None:
    """Perceptual losses without a network to compare features in are none."""
    if perceptual.lpips is None and perceptual.dino is None:
        raise ValueError('give "lpips" or "dino", or set "perceptual" to null')


def check_augmentation(augmentation: AugmentationConfig) -> None:
    """Rules between the fields of the noise conditioning augmentation."""
    low, high = augmentation.train_range
    if not 0 <= low <= high <= 1:
        raise ValueError(f"train_range must ascend within [0, 1], got {augmentation.train_range}")
    if not low <= augmentation.sample_level <= high:
        raise ValueError(
            f"sample_level {augmentation.sample_level} lies outside of train_range {list(augmentation.train_range)}: "
            f"the network never sees such an input in training"
        )


def check_stage(stage: StageConfig) -> None:
    """Rules between the sections of a stage."""
    unet, label = stage.unet, f'stage "{stage.name}"'
    if stage.name in RESERVED_NAMES:
        raise ValueError(f"{label}: choose another name, because {RESERVED_NAMES[stage.name]}")
    if unet.channels not in (1, 3):
        raise ValueError(
            f"{label}: unet.channels must be 3 (colour) or 1 (grey), got {unet.channels}; transparency is not drawn"
        )
    for name, side in (("size", stage.size), ("crop", stage.crop or stage.size)):
        if side % unet.stride:
            raise ValueError(
                f"{label}: {name} {side} is not a multiple of {unet.stride}, the total stride of its U-Net"
            )
    if stage.crop is not None and stage.crop > stage.size:
        raise ValueError(f"{label}: crop {stage.crop} is larger than size {stage.size}")
    if stage.crop is not None and unet.sees_positions:
        raise ValueError(
            f"{label} trains on crops, which a positional encoding of the whole image does not fit: remove one of the "
            f"two"
        )
    if unet.lowres and stage.augmentation is None:
        raise ValueError(f'{label} has a low-resolution input: set "augmentation"')
    for name in ("augmentation", "lowres_size"):
        if not unet.lowres and getattr(stage, name) is not None:
            raise ValueError(f'{label} has no low-resolution input: remove "{name}"')
    if stage.lowres_size is not None:
        if stage.lowres_size >= stage.size:
            raise ValueError(f"{label}: lowres_size {stage.lowres_size} must be smaller than size {stage.size}")
        _check_crop(stage, stage.lowres_size)
    if unet.text_dim is not None and stage.objective.caption_dropout == 1:
        raise ValueError(
            f"{label}: objective.caption_dropout 1 drops every caption: lower it, or set unet.text_dim to null"
        )
    if stage.objective.variance == "hybrid":
        _check_hybrid(stage)
    side = stage.crop or stage.size
    if stage.objective.perceptual is not None and stage.objective.perceptual.lpips is not None and side < MIN_LPIPS:
        raise ValueError(f"{label} trains on {side} pixels, but objective.perceptual.lpips needs {MIN_LPIPS} or more")
    check_sampling(stage, stage.sampling)


def _check_hybrid(stage: StageConfig) -> None:
    """The variance is that of the steps of a discrete schedule, and its term is estimated from uniform times."""
    label = f'stage "{stage.name}": objective.variance "hybrid"'
    if stage.unet.out_channels == stage.unet.channels:
        raise ValueError(f"{label} trains a variance, but the network predicts none: remove it")
    if stage.schedule.timesteps is None:
        raise ValueError(f"{label} needs a discrete schedule, with timesteps: squaredcos or linear")
    if stage.objective.times != "uniform":
        raise ValueError(f'{label} needs "times": "uniform"')


def check_sampling(stage: StageConfig, sampling: SamplingConfig) -> None:
    """Rules between a stage and sampling settings, its own or those of a request."""
    label, unet, objective = f'stage "{stage.name}"', stage.unet, stage.objective
    timesteps = stage.schedule.timesteps
    if timesteps is not None and sampling.steps > timesteps:
        raise ValueError(f"{label}: {sampling.steps} sampling steps, but the schedule has {timesteps} timesteps")
    if sampling.respacing != "even":
        if timesteps is None:
            raise ValueError(f'{label}: respacing "{sampling.respacing}" needs a discrete schedule, with timesteps')
        try:
            respaced(sampling.respacing, sampling.steps, timesteps)
        except ValueError as error:
            raise ValueError(f"{label}: sampling: {error}") from None
    if sampling.variance == "learned" and unet.out_channels == unet.channels:
        raise ValueError(f'{label}: its network predicts no variance: set sampling.variance to "small"')
    if sampling.guidance != 1 and unet.text_dim is None:
        raise ValueError(f"{label} reads no captions, so that nothing can be guided: set sampling.guidance to 1")
    if sampling.guidance != 1 and objective.caption_dropout == 0:
        raise ValueError(
            f"{label}: guidance {sampling.guidance:g} needs a network that was trained without captions too, but "
            f"objective.caption_dropout is 0: set sampling.guidance to 1, or train with caption_dropout, such as 0.1"
        )
    check_tile(stage, ImageSize.of(stage.size), sampling.tile)
    if sampling.augmentation_level is not None:
        if stage.augmentation is None:
            raise ValueError(f"{label} has no low-resolution input: it takes no augmentation_level")
        low, high = stage.augmentation.train_range
        if not low <= sampling.augmentation_level <= high:
            raise ValueError(
                f"{label}: augmentation_level {sampling.augmentation_level:g} lies outside of {low:g} to {high:g}, the "
                f"train_range of its augmentation"
            )


def sizes_of_stages(stages: Sequence[StageConfig], size: ImageSize, *, of: int, key: str) -> dict[str, ImageSize]:
    """The size of each stage's images, where a stage of `of` pixels has images of `size`, which need not be square.

    Raises ValueError that starts with `key` for a size that a stage cannot have.
    """
    sizes = {}
    for stage in stages:
        label, stride = f'{key}: stage "{stage.name}"', stage.unet.stride
        try:
            own = sizes[stage.name] = size.scaled(stage.size, of)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if own.height % stride or own.width % stride:
            raise ValueError(
                f"{label} would have {own}, but sides must be multiples of {stride}, the total stride of its network"
            )
    return sizes


def check_tile(stage: StageConfig, size: ImageSize, tile: int | None) -> None:
    """Whether a stage's images of a size can be sampled in tiles; None is without."""
    if tile is None or tile >= max(size):
        return
    label, stride = f'stage "{stage.name}"', stage.unet.stride
    if tile % stride:
        raise ValueError(f"{label}: tile {tile} must be a multiple of {stride}, the stride of its U-Net")
    if stage.unet.sees_positions:
        raise ValueError(f"{label} has a positional encoding of the whole image: it cannot use tiles")


def check_cascade(cascade: CascadeConfig) -> None:
    """Rules between the stages of a cascade."""
    stages = cascade.stages
    names = [stage.name for stage in stages]
    if len({name.lower() for name in names}) != len(names):
        raise ValueError(f"stage names must differ, by more than upper and lower case, got {names}")
    sizes = [stage.size for stage in stages]
    if sizes != sorted(set(sizes)):
        raise ValueError(f"stage sizes must ascend, got {sizes}")
    for below, stage in pairwise(stages):
        if not stage.unet.lowres:
            raise ValueError(f'stage "{stage.name}" is not the first: its unet needs "lowres": true')
        if stage.lowres_size not in (None, below.size):
            raise ValueError(
                f'stage "{stage.name}": lowres_size {stage.lowres_size} is not the size of stage "{below.name}", '
                f"{below.size}: remove it"
            )
        _check_crop(stage, below.size)
    channels = [stage.unet.channels for stage in stages]
    if len(set(channels)) > 1:
        raise ValueError(f"every stage enlarges the images of the one below, but unet.channels differs: {channels}")
    widths = {stage.unet.text_dim for stage in stages if stage.unet.text_dim is not None}
    if len(widths) > 1:
        raise ValueError(f"all stages read the same text, but text_dim differs: {sorted(widths)}")


def _check_crop(stage: StageConfig, lowres_size: int) -> None:
    """A crop, reduced for the low-resolution input, must have whole pixels: else training enlarges by another factor
    than sampling."""
    if stage.crop is not None and stage.crop * lowres_size % stage.size:
        raise ValueError(
            f'stage "{stage.name}" enlarges {lowres_size} to {stage.size} pixels, so that a crop of {stage.crop} would '
            f"be enlarged from {stage.crop * lowres_size / stage.size:.2f} pixels: choose a crop for which that is a "
            f"whole number"
        )


def _require_defaults(section: Section, names: tuple[str, ...], purpose: str) -> None:
    """Raise ValueError if a field that has no effect here is set."""
    for name in names:
        default: Any = type(section).model_fields[name].default
        if getattr(section, name) != default:
            raise ValueError(f'"{name}" is only {purpose}: remove it')
