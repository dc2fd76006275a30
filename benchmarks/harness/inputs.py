"""Random inputs of single ops, the same at every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Normal = Callable[..., Tensor]


def usual_dtype(device: torch.device) -> torch.dtype:
    """What networks compute in there: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def normal_inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> Normal:
    """A function of a shape that draws normal numbers in fp32 and rounds them to `dtype`.

    On the meta device, where kernels are only listed, its tensors have no values.
    """
    if device.type == "meta":
        return lambda *shape: torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
