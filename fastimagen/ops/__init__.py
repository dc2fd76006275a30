"""The fused operations of the U-Net and the sampler: one signature each, whatever computes it.

Each op is a plain PyTorch reference and, where they can run, Triton kernels; `set_backend` chooses.
"""

from .attention import attention
from .dispatch import backend, set_backend
from .dynamic_threshold import dynamic_threshold
from .group_norm import group_norm_silu
from .sampler_step import sampler_step

__all__ = ["attention", "backend", "dynamic_threshold", "group_norm_silu", "sampler_step", "set_backend"]
