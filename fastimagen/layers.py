"""Convolutional parts of the U-Net. Letters: B batch, C channels, H height, W width, T time width, D model width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops


WIDE, BLOCK = 9, 4  # kernels from so wide on work on blocks of the output where a CPU trains


class Conv2d(nn.Module):
    """Convolution whose weight is stored as a matrix (O, kH kW I) and seen as channels_last (O, I, kH, kW).

    DeepSpeed flattens parameters and refuses channels_last ones; stored this way they are contiguous for it and
    channels_last for the convolution. Its Muon takes matrices alone.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int, *, stride: int = 1, padding: int = 0,
                 zero_init: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.weight = nn.Parameter(torch.empty(dim_out, kernel * kernel * dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out))
        bound = 0.0 if zero_init else 1 / math.sqrt(dim_in * kernel * kernel)  # PyTorch's own default
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (self.kernel, self.kernel, -1)).permute(0, 3, 1, 2)  # (O, I, kH, kW), a view
        if self.kernel >= WIDE and self.stride == 1 and x.device.type == "cpu" and torch.is_grad_enabled():
            return self._in_blocks(x, weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    def _in_blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with stride R: its R x R neighbours in the output come from as many shifted kernels.

        oneDNN's gradient of a wide kernel over few channels can take a hundred times what it should (docs/notes.md);
        with more outputs and fewer places it does not.
        """
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % BLOCK, 0, -height % BLOCK))  # (B, I, H', W'), multiples of R
        shifts = [(j, BLOCK - 1 - j, i, BLOCK - 1 - i) for i in range(BLOCK) for j in range(BLOCK)]
        weight = torch.stack([F.pad(weight, shift) for shift in shifts], dim=1).flatten(0, 1)  # (O R R, I, kH', kW')
        out = F.conv2d(x, weight, self.bias.repeat_interleave(BLOCK**2), BLOCK, self.padding)  # (B, O R R, H'/R, W'/R)
        out = F.pixel_shuffle(out, BLOCK)[..., :height, :width]  # (B, O, H, W)
        return out.contiguous(memory_format=torch.channels_last)


class GroupNormSiLU(nn.Module):
    """silu(GroupNorm(x) * (1 + scale) + shift), the modulation (FiLM) optional."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, scale=scale, shift=shift)


class CrossEmbed(nn.Module):
    """Stem: parallel convolutions of several kernel sizes, channels dim/2, dim/4, ..., rest, concatenated."""

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
    """(B, C, H, W) -> (B, C', H/2, W/2) by a 4x4 convolution of stride 2."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 4, stride=2, padding=1)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Widen(nn.Module):
    """(B, C, H, W) -> (B, C', H, W): sum of a 3x3 and a 1x1 convolution, where the last level keeps its resolution."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv3 = Conv2d(dim_in, dim_out, 3, padding=1)
        self.conv1 = Conv2d(dim_in, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x)


class Sinusoidal(nn.Module):
    """Sinusoidal embedding of a number per sample: (B,) -> (B, dim), computed in fp32 (Vaswani et al. 2017, 3.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the sinusoidal time embedding needs an even dim of at least 4, got {dim}")
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(torch.arange(half, device=time.device, dtype=torch.float32) *
                              (-math.log(10000) / (half - 1)))
        angle = time.float()[:, None] * frequency  # (B, dim / 2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (B, dim)
