"""The fused operations of the U-Net and the sampler: one signature each, whatever computes it.

Each op is a plain PyTorch reference and, where they can run, Triton kernels; `set_backend` chooses.
"""

from .attention import attention
from .backend import backend, set_backend
from .group_norm import group_norm_silu
from .sampling import sampler_step
from .thresholding import dynamic_threshold

__all__ = ["attention", "backend", "dynamic_threshold", "group_norm_silu", "sampler_step", "set_backend"]
