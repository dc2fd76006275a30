"""Presets: published U-Nets and cascades, and those of the quickstart, one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .config import CascadeChanges, CascadeConfig, SamplingConfig, StageConfig
from .config_file import hint, validate
from .diffusion_config import AugmentationConfig, ObjectiveConfig, ScheduleConfig
from .network_config import IFUNetConfig, PixelTransformerConfig, UNetConfig
from .transformer_presets import jit_1024, jit_b, jit_base256, jit_h, jit_l

MINIMAGEN = dict(
    cross_heads=8,
    head_dim=64,
    time_tokens=2,
    groups=8,
    stem_kernels=(3, 7, 15),
    text_padding="null",
    max_text_length=256,
    text_pooling="mean",
    zero_init=False,
)
"""Constants of MinImagen's U-Nets that its constructor has no arguments for."""

PAPER_SUPER = dict(
    dim=128,
    dim_mults=(1, 2, 4, 8),
    cond_dim=512,
    lowres=True,
    downsample_first=True,
    full_resolution="extra_block",
    stem_kernels=(3,),
)
"""Common settings of the paper's Efficient U-Nets. Unlike the paper's, they have full_resolution="extra_block", which
prevents colour shift."""


def shapes(text_dim: int = 64) -> CascadeConfig:
    """The quickstart: a 32x32 and a 64x64 stage for the built-in captioned shapes, small enough for a laptop.

    The networks work on patches. They predict x0, because their few channels cannot represent a patch of noise. The
    schedule is shifted towards high noise levels, at which the output depends on the caption (docs/notes.md has the
    measurements).
    """
    common = dict(text_dim=text_dim, heads=4, head_dim=32, stem_kernels=(3,), cond_dim=64, num_blocks=0, qk_norm=True)
    base = StageConfig(
        name="base",
        size=32,
        unet=UNetConfig(
            dim=64,
            dim_mults=(1, 1),
            stem_stride=4,
            positional_encoding=True,
            self_attention=(False, True),
            cross_attention=(True, False),
            **common,
        ),
        schedule=ScheduleConfig(shift=4.0),
        objective=ObjectiveConfig(prediction="x0", difference_weight=1.0),
        sampling=SamplingConfig(steps=20, guidance=1.5, threshold="static"),
    )
    super_resolution = StageConfig(
        name="sr",
        size=64,
        crop=32,
        unet=UNetConfig(
            dim=32,
            dim_mults=(1, 2),
            lowres=True,
            stem_stride=2,
            self_attention=False,
            cross_attention=(False, True),
            **common,
        ),
        schedule=ScheduleConfig(shift=2.0),
        objective=ObjectiveConfig(prediction="x0", difference_weight=1.0),
        augmentation=AugmentationConfig(train_range=(0.0, 0.5), sample_level=0.15),
        sampling=SamplingConfig(steps=4, guidance=1.0, threshold="static"),
    )
    return CascadeConfig(stages=(base, super_resolution))


def shapes_transformer(text_dim: int = 64) -> CascadeConfig:
    """The quickstart's cascade with a pixel transformer of the same size as its base network."""
    base, super_resolution = shapes(text_dim).stages
    network = PixelTransformerConfig(
        kind="pixel_transformer",
        text_dim=text_dim,
        patch=4,
        dim=96,
        depth=4,
        heads=3,
        time_dim=256,
        cond_dim=64,
        positional_encoding=True,
        rotary_range=8,
    )
    return CascadeConfig(stages=(base.model_copy(update={"unet": network}), super_resolution))


def minimagen_base(text_dim: int = 768) -> UNetConfig:
    """MinImagen's Base: 1.62 B parameters with T5-XXL (the paper's has 2 B)."""
    attention = (False, True, True, True)
    return UNetConfig(
        dim=512,
        dim_mults=(1, 2, 3, 4),
        num_blocks=3,
        self_attention=attention,
        cross_attention=attention,
        text_dim=text_dim,
        **MINIMAGEN,
    )


def minimagen_super(text_dim: int = 768) -> UNetConfig:
    """MinImagen's Super: 716 M parameters with T5-XXL (the paper's has 600 M)."""
    attention = (False, False, False, True)
    return UNetConfig(
        dim=128,
        dim_mults=(1, 2, 4, 8),
        num_blocks=(2, 4, 8, 8),
        self_attention=attention,
        cross_attention=attention,
        lowres=True,
        downsample_first=True,
        text_dim=text_dim,
        **MINIMAGEN,
    )


def minimagen_base_test(text_dim: int = 512) -> UNetConfig:
    """MinImagen's BaseTest with its intended size, 0.1 M parameters (MinImagen's class builds Base instead)."""
    return UNetConfig(
        dim=8,
        dim_mults=(1, 2),
        num_blocks=1,
        self_attention=False,
        cross_attention=False,
        text_dim=text_dim,
        **MINIMAGEN,
    )


def minimagen_super_test(text_dim: int = 512) -> UNetConfig:
    """MinImagen's SuperTest with its intended size, 0.16 M parameters (MinImagen's class builds Super instead)."""
    return UNetConfig(
        dim=8,
        dim_mults=(1, 2),
        num_blocks=(1, 2),
        self_attention=False,
        cross_attention=False,
        lowres=True,
        downsample_first=True,
        text_dim=text_dim,
        **MINIMAGEN,
    )


def minimagen_stage(
    name: str,
    size: int,
    unet: UNetConfig,
    *,
    timesteps: int = 1000,
    caption_dropout: float = 0.15,
    loss: str = "l2",
    percentile: float = 0.9,
    sample_level: float = 0.2,
) -> StageConfig:
    """A stage with MinImagen's training and sampling: linear betas, epsilon prediction, and ancestral sampling with all
    timesteps.

    Raises ValueError with one line for values out of range.
    """
    linear = {"name": "linear", "timesteps": timesteps}
    guidance = 3.0 if caption_dropout else 1.0  # without dropout there is nothing to guide away from
    return validate(
        StageConfig,
        {
            "name": name,
            "size": size,
            "unet": unet,
            "schedule": linear,
            "objective": {"prediction": "epsilon", "loss": loss, "caption_dropout": caption_dropout},
            "augmentation": {"schedule": linear, "sample_level": sample_level} if unet.lowres else None,
            "sampling": {"sampler": "ddpm", "steps": timesteps, "guidance": guidance, "percentile": percentile},
        },
        f"stage {name}",
    )


def minimagen(text_dim: int = 768) -> CascadeConfig:
    """MinImagen's Base (64x64) and Super (256x256), for t5_base, the default encoder of its command line."""
    return CascadeConfig(
        stages=(
            minimagen_stage("base64", 64, minimagen_base(text_dim)),
            minimagen_stage("sr256", 256, minimagen_super(text_dim)),
        )
    )


def minimagen_test(text_dim: int = 512) -> CascadeConfig:
    """MinImagen's --TESTING configuration: BaseTest (64x64) and SuperTest (128x128), 25 timesteps, t5_small."""
    return CascadeConfig(
        stages=(
            minimagen_stage("base64", 64, minimagen_base_test(text_dim), timesteps=25),
            minimagen_stage("sr128", 128, minimagen_super_test(text_dim), timesteps=25),
        )
    )


# The paper's networks. Imagen publishes channels, residual blocks per level and parameter counts (2 B, 600 M, 400 M).
# NVIDIA NeMo has networks of these sizes (2.10 B, 646 M, 427 M), but two details differ. NeMo's Efficient U-Nets add
# skip connections; these here concatenate them. In NeMo the blocks of a regular U-Net going down have the width of
# their own level; here they have the width of the level above. To reach the published counts in spite of that, the
# deepest levels of base64 have more blocks than in the published tables, and the deepest level of sr1024 has fewer.


def paper_base64(text_dim: int = 4096) -> UNetConfig:
    """Imagen's 64x64 network, 2.08 B parameters: self-attention to pixels and text at resolutions 32, 16 and 8."""
    return UNetConfig(
        dim=512,
        dim_mults=(1, 2, 3, 4),
        num_blocks=(3, 3, 4, 5),
        heads=16,
        cond_dim=2048,
        self_attention=(False, True, True, True),
        cross_attention=False,
        text_in_self_attention=True,
        middle_attention=True,
        stem_kernels=(3,),
        text_dim=text_dim,
    )


def paper_sr256(text_dim: int = 4096) -> UNetConfig:
    """Imagen's Efficient U-Net 64 -> 256, 646 M parameters: self-attention to pixels and text at resolution 16."""
    return UNetConfig(
        num_blocks=(1, 3, 7, 7),
        self_attention=(False, False, False, True),
        cross_attention=False,
        text_in_self_attention=True,
        text_dim=text_dim,
        **PAPER_SUPER,
    )


def paper_sr1024(text_dim: int = 4096) -> UNetConfig:
    """Imagen's Efficient U-Net 256 -> 1024, 425 M parameters: cross-attention to text, no self-attention."""
    return UNetConfig(
        num_blocks=(1, 3, 7, 3),
        self_attention=False,
        cross_attention=(False, False, False, True),
        text_dim=text_dim,
        **PAPER_SUPER,
    )


def paper_base64_light(text_dim: int = 4096) -> UNetConfig:
    """The 64x64 network at half the width: 518 M parameters (NeMo: 500 M)."""
    return paper_base64(text_dim).model_copy(update={"dim": 256, "cond_dim": 512, "heads": 8})


def paper_sr256_light(text_dim: int = 4096) -> UNetConfig:
    """The 64 -> 256 network with 2, 4, 6, 4 blocks: 404 M parameters (NeMo: 400 M)."""
    return paper_sr256(text_dim).model_copy(update={"num_blocks": (1, 3, 5, 3)})


COSINE = ScheduleConfig()


def paper_stage(
    name: str,
    size: int,
    unet: UNetConfig,
    *,
    guidance: float,
    schedule: ScheduleConfig = COSINE,
    crop: int | None = None,
) -> StageConfig:
    """A stage with the paper's training: epsilon prediction, unweighted loss, uniform times, 10 % caption dropout."""
    return StageConfig(
        name=name,
        size=size,
        crop=crop,
        unet=unet,
        schedule=schedule,
        objective=ObjectiveConfig(prediction="epsilon"),
        augmentation=AugmentationConfig() if unet.lowres else None,
        sampling=SamplingConfig(guidance=guidance),
    )


def paper(text_dim: int = 4096) -> CascadeConfig:
    """Imagen for T5-XXL: 64, 256, 1024. The last stage has DDPM's linear schedule and trains on crops of 256.

    Guidance 8 for super-resolution is the paper's value for FID. For the base stage the paper sweeps from 1 to 10.
    """
    linear = ScheduleConfig(name="linear", timesteps=1000)
    return CascadeConfig(
        stages=(
            paper_stage("base64", 64, paper_base64(text_dim), guidance=5.0),
            paper_stage("sr256", 256, paper_sr256(text_dim), guidance=8.0),
            paper_stage("sr1024", 1024, paper_sr1024(text_dim), guidance=8.0, schedule=linear, crop=256),
        )
    )


def paper_light(text_dim: int = 4096) -> CascadeConfig:
    """The two smaller networks: 64 and 256."""
    return CascadeConfig(
        stages=(
            paper_stage("base64", 64, paper_base64_light(text_dim), guidance=5.0),
            paper_stage("sr256", 256, paper_sr256_light(text_dim), guidance=8.0),
        )
    )


def jit_256(network: Callable[[int], PixelTransformerConfig], text_dim: int = 4096) -> CascadeConfig:
    """One 256x256 stage with a transformer of JiT's."""
    return CascadeConfig(stages=(jit_base256(network(text_dim)),))


def jit_unet_1024(text_dim: int = 4096) -> CascadeConfig:
    """A mixed cascade: JiT-L at 256, and the paper's U-Net from 256 to 1024."""
    linear = ScheduleConfig(name="linear", timesteps=1000)
    sr1024 = paper_stage("sr1024", 1024, paper_sr1024(text_dim), guidance=8.0, schedule=linear, crop=256)
    return CascadeConfig(stages=(jit_base256(jit_l(text_dim)), sr1024))


SQUARED_COS = ScheduleConfig(name="squaredcos", timesteps=1000)
SMALL_ROOT = 0.7071
"""DeepFloyd IF's second stages divide residual sums by 1 / 0.7071, which is not quite the root of 2."""


def if_base(width: int, text_dim: int = 4096) -> IFUNetConfig:
    """A first stage of DeepFloyd IF. Widths 192, 320, 704: IF-I-M, L and XL, with 372 M, 935 M and 4.3 B parameters."""
    dims = tuple(width * factor for factor in (1, 2, 3, 4))
    return IFUNetConfig(kind="if", text_dim=text_dim, dims=dims, num_blocks=3)


def if_super(width: int, text_dim: int = 4096) -> IFUNetConfig:
    """A second stage of DeepFloyd IF. Width 96 and 160: IF-II-M and L with 482 M and 1.2 B parameters."""
    dims = tuple(width * factor for factor in (1, 2, 4, 6, 8))
    return IFUNetConfig(
        kind="if",
        lowres=True,
        text_dim=text_dim,
        dims=dims,
        num_blocks=(2, 2, 3, 5, 5),
        attention=(False, False, False, True, True),
        time_dim=dims[-1],
        residual_divisor=1 / SMALL_ROOT,
    )


def deepfloyd(base_width: int, super_width: int, text_dim: int = 4096) -> CascadeConfig:
    """Both stages of DeepFloyd IF to train from scratch; what they become opens in diffusers. The widths of the M and L
    networks are inferred from their published sizes. Captions need text.encoding "if" and text.max_length 77."""
    common = dict(schedule=SQUARED_COS, objective=ObjectiveConfig(prediction="epsilon"))
    base = StageConfig(
        name="base64",
        size=64,
        unet=if_base(base_width, text_dim),
        sampling=SamplingConfig(guidance=7.0, percentile=0.95, ceiling=1.5),
        **common,
    )
    super_resolution = StageConfig(
        name="sr256",
        size=256,
        unet=if_super(super_width, text_dim),
        augmentation=AugmentationConfig(schedule=SQUARED_COS, sample_level=0.25, resize="bilinear_corners"),
        sampling=SamplingConfig(guidance=4.0, percentile=0.95, ceiling=1.0),
        **common,
    )
    return CascadeConfig(stages=(base, super_resolution))


def deepfloyd_1024(text_dim: int = 4096) -> CascadeConfig:
    """IF-I-XL, IF-II-L, and the paper's U-Net from 256 to 1024 behind them: the third stage of DeepFloyd IF was never
    released. It is trained on the same embeddings."""
    linear = ScheduleConfig(name="linear", timesteps=1000)
    sr1024 = paper_stage("sr1024", 1024, paper_sr1024(text_dim), guidance=8.0, schedule=linear, crop=256)
    return CascadeConfig(stages=(*deepfloyd(704, 160, text_dim).stages, sr1024))


PRESETS: dict[str, Callable[..., CascadeConfig]] = {
    "shapes": shapes,
    "minimagen": minimagen,
    "minimagen-test": minimagen_test,
    "paper": paper,
    "paper-light": paper_light,
    "shapes-transformer": shapes_transformer,
    "jit-b": partial(jit_256, jit_b),
    "jit-l": partial(jit_256, jit_l),
    "jit-h": partial(jit_256, jit_h),
    "jit-1024": jit_1024,
    "jit-unet-1024": jit_unet_1024,
    "if-m": partial(deepfloyd, 192, 96),
    "if-l": partial(deepfloyd, 320, 160),
    "if-xl": partial(deepfloyd, 704, 160),
    "if-xl-1024": deepfloyd_1024,
}


def resolve(cascade: str | CascadeChanges | CascadeConfig, *, text_dim: int | None = None) -> CascadeConfig:
    """The stages in full of a preset, with changes or without, for text embeddings of width text_dim.

    A CascadeConfig is returned unchanged. Raises ValueError with the nearest name for an unknown preset, and what
    `change` raises.
    """
    if isinstance(cascade, CascadeConfig):
        return cascade
    if isinstance(cascade, CascadeChanges):
        assert cascade.preset is not None  # stage_setup reads models
        return change(resolve(cascade.preset, text_dim=text_dim), cascade.stages)
    if cascade not in PRESETS:
        raise ValueError(f'unknown cascade preset "{cascade}"; {hint(cascade, PRESETS, "presets")}')
    preset = PRESETS[cascade]
    return preset() if text_dim is None else preset(text_dim)


def change(cascade: CascadeConfig, changes: Mapping[str, Mapping[str, Any] | None]) -> CascadeConfig:
    """A cascade with some keys of its stages changed, by stage name; None leaves a stage out.

    Sections are merged key by key; lists and numbers are replaced. Raises ValueError with one line for unknown stages
    and keys, and if the result is no cascade.
    """
    where = "fastimagen.cascade"
    for name in changes:
        try:
            cascade.stage(name)
        except ValueError as error:
            raise ValueError(f"{where}.stages: {error}; to add a stage, give all of them in full as a list") from None
    stages = []
    for stage in cascade.stages:
        changed = changes.get(stage.name, {})
        if changed is not None:
            merged = merge(stage.model_dump(mode="json"), changed)
            stages.append(validate(StageConfig, merged, f"{where}.stages.{stage.name}"))
    return validate(CascadeConfig, {"stages": stages}, where)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: sections key by key, everything else replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
