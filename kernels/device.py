"""The GPU architecture that kernels are launched on."""

from contextlib import nullcontext
from functools import cache

import torch
from triton import knobs
from triton.runtime import driver


def architecture(device: torch.device) -> str:
    """Of the GPU `device`: "sm_90", "gfx942", ..., or "interpreter" with TRITON_INTERPRET=1.

    GPUs of one machine may differ. Tensors that are not on a GPU get the target that the driver has at the moment:
    that of the current GPU, or the one that kernels are compiled for ahead of time.
    """
    if knobs.runtime.interpret:
        return "interpreter"
    # Asking the driver costs microseconds, so its answer is kept for each GPU, or each target of a compilation.
    return _architecture(device.index if device.type == "cuda" else driver.active.get_current_device())


@cache
def _architecture(device: int | str) -> str:
    with torch.cuda.device(device) if isinstance(device, int) else nullcontext():
        target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
