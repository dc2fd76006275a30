"""The GPU architecture that kernels are launched on."""

from functools import cache

from triton import knobs
from triton.runtime import driver


@cache
def architecture() -> str:
    """Of the current device: "sm_90", "gfx942", ..., or "interpreter" with TRITON_INTERPRET=1. Queried once."""
    if knobs.runtime.interpret:
        return "interpreter"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch
