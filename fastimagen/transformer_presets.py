"""Pixel transformers of JiT's sizes (Li and He 2025, arXiv 2511.13720, table of model sizes), with text for classes."""

from __future__ import annotations

from .config import CascadeConfig, SamplingConfig, StageConfig
from .diffusion_config import AugmentationConfig, ObjectiveConfig, ScheduleConfig
from .network_config import PixelTransformerConfig


def jit_b(text_dim: int | None = 4096) -> PixelTransformerConfig:
    """JiT-B/16: 130 M parameters without text (the paper's has 131 M with its classes), 136 M with T5-XXL's."""
    return _jit(dim=768, depth=12, heads=12, bottleneck=128, text_from=4, text_dim=text_dim)


def jit_l(text_dim: int | None = 4096) -> PixelTransformerConfig:
    """JiT-L/16: 457 M parameters without text (the paper's has 459 M with its classes), 466 M with T5-XXL's."""
    return _jit(dim=1024, depth=24, heads=16, bottleneck=128, text_from=8, text_dim=text_dim)


def jit_h(text_dim: int | None = 4096) -> PixelTransformerConfig:
    """JiT-H/16: 948 M parameters without text (the paper's has 953 M with its classes), 962 M with T5-XXL's."""
    return _jit(dim=1280, depth=32, heads=16, bottleneck=256, text_from=10, text_dim=text_dim)


def _jit(
    *, dim: int, depth: int, heads: int, bottleneck: int, text_from: int, text_dim: int | None
) -> PixelTransformerConfig:
    """One network. As JiT's class tokens, text tokens join the sequence after a third of the blocks."""
    text = {} if text_dim is None else {"text_dim": text_dim, "text_reading": "tokens", "text_from": text_from}
    return PixelTransformerConfig(
        kind="pixel_transformer",
        patch=16,
        dim=dim,
        depth=depth,
        heads=heads,
        bottleneck=bottleneck,
        positional_encoding=True,
        **text,
    )


def jit_base256(network: PixelTransformerConfig) -> StageConfig:
    """A 256x256 stage that predicts x0, on a cosine schedule shifted by 256 / 64 (Hoogeboom et al. 2023).

    Differs from JiT, which trains the same prediction by flow matching with the loss on the velocity.
    """
    return StageConfig(
        name="base256",
        size=256,
        unet=network,
        schedule=ScheduleConfig(shift=4.0),
        objective=ObjectiveConfig(prediction="x0"),
        sampling=SamplingConfig(guidance=3.0),
    )


def jit_1024(text_dim: int = 4096) -> CascadeConfig:
    """Two transformers: JiT-L at 256, then JiT-B from 256 to 1024 in patches of 32: 466 M and 140 M parameters.

    The second stage trains on whole images: 1,024 tokens, of which each holds a patch of the noisy image and the same
    patch of the enlarged one.
    """
    network = jit_b(text_dim).model_copy(update={"lowres": True, "patch": 32, "rotary_range": 32})
    super_resolution = StageConfig(
        name="sr1024",
        size=1024,
        unet=network,
        schedule=ScheduleConfig(shift=4.0),
        objective=ObjectiveConfig(prediction="x0"),
        augmentation=AugmentationConfig(),
        sampling=SamplingConfig(guidance=1.0),
    )
    return CascadeConfig(stages=(jit_base256(jit_l(text_dim)), super_resolution))
