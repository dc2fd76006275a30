"""Named U-Nets and cascades, a function each: the published tables, and the quickstart's."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from .config import (AugmentationConfig, CascadeConfig, ObjectiveConfig, SamplingConfig, ScheduleConfig, StageConfig,
                     UNetConfig)


def shapes(text_dim: int = 64) -> CascadeConfig:
    """The quickstart: 32x32, then 64x64, for the built-in captioned shapes on a laptop."""
    common = dict(text_dim=text_dim, heads=4, head_dim=32, stem_kernels=(3,), cond_dim=64)
    base = StageConfig(
        name="base", size=32,
        unet=UNetConfig(dim=48, dim_mults=(1, 2), self_attention=(False, True), cross_attention=(False, True),
                        stem_stride=2, **common),
        objective=ObjectiveConfig(prediction="v"),
        sampling=SamplingConfig(steps=20, guidance=3.0),
    )
    super_resolution = StageConfig(
        name="sr", size=64, crop=32,
        unet=UNetConfig(dim=32, dim_mults=(1, 2), lowres=True, self_attention=False, cross_attention=(False, True),
                        stem_stride=2, **common),
        objective=ObjectiveConfig(prediction="v"),
        augmentation=AugmentationConfig(train_range=(0.0, 0.5), sample_level=0.1),
        sampling=SamplingConfig(steps=8, guidance=1.0, threshold="static"),
    )
    return CascadeConfig(stages=(base, super_resolution))


PRESETS: dict[str, Callable[..., CascadeConfig]] = {"shapes": shapes}


def resolve(cascade: str | CascadeConfig, *, text_dim: int | None = None) -> CascadeConfig:
    """A cascade by preset name, for text embeddings of width text_dim; a cascade in full is returned as it is.

    Raises ValueError naming the nearest preset.
    """
    if isinstance(cascade, CascadeConfig):
        return cascade
    if cascade not in PRESETS:
        near = difflib.get_close_matches(cascade, PRESETS, n=1, cutoff=0.4)
        hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f'no cascade "{cascade}"; {hint}')
    return PRESETS[cascade](**({} if text_dim is None else {"text_dim": text_dim}))
