"""The convolution of the U-Net, with faster weight gradients on a CPU.

oneDNN computes the weight gradient of a channels_last convolution at a third to a half of the rate of the forward pass,
and for wide kernels over few channels at a hundredth (docs/notes.md). Both cases have an implementation here. H' and W'
are the size of the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WIDE_KERNEL = 9  # from this width on, kernels compute blocks of outputs at once
BLOCK_SIZE = 4  # outputs per side of such a block; measured in docs/notes.md
MANY_CHANNELS = 128  # from this number of input and output channels on, the weight gradient is a matrix product
IM2COL_ELEMENTS = 1 << 20  # of the patches in one such product: 4 MiB in fp32, so that they stay in the cache


class Conv2d(nn.Module):
    """Convolution whose weight is stored as a matrix (O, kH kW I) and seen as channels_last (O, I, kH, kW).

    DeepSpeed requires contiguous parameters, and its Muon requires matrices. Stored this way, the weight is both, and
    channels_last for the convolution.
    """

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int, *, stride: int = 1, padding: int = 0, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.weight = nn.Parameter(torch.empty(dim_out, kernel * kernel * dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out))
        bound = 0.0 if zero_init else 1 / math.sqrt(dim_in * kernel * kernel)  # PyTorch's default
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        weight = self.weight.unflatten(1, (self.kernel, self.kernel, -1)).permute(0, 3, 1, 2)  # (O, I, kH, kW), a view
        if x.device.type == "cpu" and torch.is_grad_enabled():
            if self.kernel >= WIDE_KERNEL and self.stride == 1:
                return _in_blocks(x, weight, self.bias, self.padding)
            if self.kernel > 1 and min(weight.shape[:2]) >= MANY_CHANNELS and _exact(x):
                return ConvolutionByColumns.apply(x, weight, self.bias, self.stride, self.padding)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """F.conv2d with stride 1 as one of stride R = BLOCK_SIZE: R x R shifted kernels compute a block of outputs."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % BLOCK_SIZE, 0, -height % BLOCK_SIZE))  # (B, I, H', W'), multiples of R
    shifts = [(j, BLOCK_SIZE - 1 - j, i, BLOCK_SIZE - 1 - i) for i in range(BLOCK_SIZE) for j in range(BLOCK_SIZE)]
    weight = torch.stack([F.pad(weight, shift) for shift in shifts], dim=1).flatten(0, 1)  # (O R R, I, kH', kW')
    out = F.conv2d(x, weight, bias.repeat_interleave(BLOCK_SIZE**2), BLOCK_SIZE, padding)  # (B, O R R, H'/R, W'/R)
    out = F.pixel_shuffle(out, BLOCK_SIZE)[..., :height, :width]  # (B, O, H, W)
    return out.contiguous(memory_format=torch.channels_last)


def _exact(x: Tensor) -> bool:
    """Whether partial sums may be rounded once per block of patches: not in bf16 or fp16."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


class ConvolutionByColumns(torch.autograd.Function):
    """F.conv2d whose weight gradient is a matrix product of the output's gradient and patches of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
            of_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, grad, weight.shape[-1], ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None


def _weight_gradient(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """x (B, I, H, W) and grad (B, O, H', W') -> (O, I, k, k), a view of (O, k k I)."""
    dim_in, (_, dim_out, height, width) = x.shape[1], grad.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    patches = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B, H', W', I, k, k), a view
    patches = patches.permute(0, 1, 2, 4, 5, 3)
    grad = grad.permute(0, 2, 3, 1)  # (B, H', W', O)
    rows = max(1, IM2COL_ELEMENTS // (width * kernel * kernel * dim_in))
    images = max(1, rows // height)
    out = grad.new_zeros(dim_out, kernel * kernel * dim_in)
    for some_patches, some_grad in zip(patches.split(images), grad.split(images)):
        for columns, of in zip(some_patches.split(rows, dim=1), some_grad.split(rows, dim=1)):
            out.addmm_(of.reshape(-1, dim_out).t(), columns.reshape(-1, out.shape[1]))
    return out.unflatten(1, (kernel, kernel, dim_in)).permute(0, 3, 1, 2)
