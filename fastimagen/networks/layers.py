"""Convolutional layers of the U-Net and the sinusoidal time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .convolution import Conv2d, PointwiseConv, convolutions_add_bias

SKIP_SCALE = 2**-0.5
"""Skip connections are scaled by 1 / sqrt(2) (Imagen, appendix B.1)."""


class Film(nn.Linear):
    """Vector (B, T) -> scale and shift behind each other, (B, 2 C); without the bias if what follows adds it."""

    def forward(self, vector: Tensor, *, add_bias: bool = True) -> Tensor:
        return F.linear(vector, self.weight, self.bias if add_bias else None)


class NormWeights(nn.Module):
    """Gains and biases of a GroupNorm. Base class of those with SiLU."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class GroupNormSiLU(NormWeights):
    """silu(GroupNorm(x + x_bias) * (1 + scale) + shift) for x (B, C, H, W); film (B, 2 C) is scale and shift.

    All but x is optional. film_bias (2 C,) and x_bias (C,) are the biases of the layers that made film and x.
    """

    def forward(
        self,
        x: Tensor,
        film: Tensor | None = None,
        film_bias: Tensor | None = None,
        x_bias: Tensor | None = None,
    ) -> Tensor:
        scale, shift = (None, None) if film is None else ops.halves(film, dim=1)  # (B, C) each
        return ops.group_norm_silu(
            x, self.weight, self.bias, self.groups, scale=scale, shift=shift, film_bias=film_bias, x_bias=x_bias
        )


class ResidualGroupNormSiLU(NormWeights):
    """silu(GroupNorm(cat([x, skip * SKIP_SCALE], dim=1))), and x and skip once more for the residual path.

    x (B, I, H, W), skip (B, J, H, W) or None -> (B, I + J, H, W), x, skip. The gradients of both paths are added inside
    the norm's kernel.
    """

    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        return ops.group_norm_silu_residual(x, self.weight, self.bias, self.groups, skip=skip, skip_scale=SKIP_SCALE)


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
        self.conv1 = PointwiseConv(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        if convolutions_add_bias(x):
            return self.conv3(x) + self.conv1(x)
        h, residual = self.conv3(x, add_bias=False), self.conv1(x, add_bias=False)  # (B, O, H, W) each
        return ops.add_residual(h, residual, self.conv3.bias, self.conv1.bias)


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


def positional_encoding(height: int, width: int, num_freqs: int, like: Tensor) -> Tensor:
    """Sines and cosines of every position's row and column, (1, 4 num_freqs, H, W), with the dtype of `like`.

    The frequencies are half a period over the image, one, two, ...
    """
    rows = _waves(height, num_freqs, like.device)[:, :, None].expand(-1, -1, width)  # (2 num_freqs, H, W)
    columns = _waves(width, num_freqs, like.device)[:, None, :].expand(-1, height, -1)  # (2 num_freqs, H, W)
    return torch.cat([rows, columns])[None].to(like.dtype)  # (1, 4 num_freqs, H, W)


def _waves(side: int, num_freqs: int, device: torch.device) -> Tensor:
    """Sines and cosines along one side: (2 num_freqs, side)."""
    frequency = 2.0 ** torch.arange(num_freqs, device=device)  # (num_freqs,)
    angle = torch.linspace(0, math.pi, side, device=device)[:, None] * frequency  # (side, num_freqs)
    return torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2 num_freqs, side)
