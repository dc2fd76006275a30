"""Convolutional layers of the U-Net and the sinusoidal time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .convolution import Conv2d


class GroupNormSiLU(nn.Module):
    """silu(GroupNorm(x) * (1 + scale) + shift) for x (B, C, H, W); scale and shift (B, C) are optional (FiLM)."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, scale=scale, shift=shift)


class MultiScaleStem(nn.Module):
    """(B, I, H, W) -> (B, dim, H, W): parallel convolutions of several kernel sizes with dim / 2, dim / 4, ...
    channels, concatenated (CrossEmbed in imagen-pytorch and MinImagen)."""

    def __init__(self, dim_in: int, dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        kernels = tuple(sorted(kernels))
        widths = [dim // 2**i for i in range(1, len(kernels))]
        widths.append(dim - sum(widths))
        self.convs = nn.ModuleList(Conv2d(dim_in, width, k, padding=k // 2) for k, width in zip(kernels, widths))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.convs) == 1:
            return self.convs[0](x)
        return torch.cat([conv(x) for conv in self.convs], dim=1)  # (B, dim, H, W)


class Downsample(Conv2d):
    """(B, I, H, W) -> (B, O, H / 2, W / 2): a 4x4 convolution of stride 2."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 4, stride=2, padding=1)


class Upsample(nn.Module):
    """(B, I, H, W) -> (B, O, 2 H, 2 W): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")  # (B, I, 2 H, 2 W)
        return self.conv(x)  # (B, O, 2 H, 2 W)


class ParallelConv(nn.Module):
    """(B, I, H, W) -> (B, O, H, W): sum of a 3x3 and a 1x1 convolution, at the end of the last level (MinImagen)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv3 = Conv2d(dim_in, dim_out, 3, padding=1)
        self.conv1 = Conv2d(dim_in, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x)


class Sinusoidal(nn.Module):
    """Sinusoidal embedding of a number: (B,) -> (B, dim), in fp32 (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the sinusoidal time embedding needs an even dim of at least 4, got {dim}")
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        index = torch.arange(half, device=time.device, dtype=torch.float32)  # (dim / 2,)
        frequency = torch.exp(index * (-math.log(10000) / (half - 1)))  # (dim / 2,)
        angle = time.float()[:, None] * frequency  # (B, dim / 2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (B, dim)
