"""The fused ops of the networks and the sampler, each with one signature for all backends.

Each op has a reference in plain PyTorch and Triton kernels; `set_backend` chooses between them.
"""

from .attention import attention
from .dispatch import backend, set_backend
from .dynamic_threshold import dynamic_threshold
from .group_norm import group_norm_silu, group_norm_silu_residual
from .halves import halves
from .modulated_norm import modulated_norm
from .residual import add_residual
from .sampler_step import sampler_step

__all__ = [
    "add_residual",
    "attention",
    "backend",
    "dynamic_threshold",
    "group_norm_silu",
    "group_norm_silu_residual",
    "halves",
    "modulated_norm",
    "sampler_step",
    "set_backend",
]
