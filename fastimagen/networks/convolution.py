"""The convolution of the U-Net, with faster weight gradients on a CPU.

oneDNN computes the weight gradient of a channels_last convolution at a third to a half of the rate of the forward pass,
and for wide kernels over few channels at a hundredth (docs/notes.md). Both cases have an implementation here. H' and W'
are the size of the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
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

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W'); without the bias if what follows adds it."""
        bias = self.bias if add_bias else None
        if not torch.is_grad_enabled():
            return F.conv2d(x, _as_map(self.weight, self.kernel), bias, self.stride, self.padding)
        if x.device.type == "cpu" and self.kernel >= WIDE_KERNEL and self.stride == 1:
            return _blocked_conv2d(x, _as_map(self.weight, self.kernel), bias, self.padding)
        return MatrixConv2d.apply(x, self.weight, bias, self.kernel, self.stride, self.padding)


def _as_map(weight: Tensor, kernel: int) -> Tensor:
    """A weight (O, k k I) as a convolution takes it: a channels_last view."""
    return rearrange(weight, "o (kh kw i) -> o i kh kw", kh=kernel, kw=kernel)  # (O, I, k, k)


def _blocked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """F.conv2d of stride 1 as one of stride r = BLOCK_SIZE: r x r shifted kernels compute a block of outputs."""
    r = BLOCK_SIZE
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % r, 0, -height % r))  # (B, I, H', W'), multiples of r
    shifts = [(j, r - 1 - j, i, r - 1 - i) for i in range(r) for j in range(r)]  # left, right, top, bottom
    weight = torch.stack([F.pad(weight, shift) for shift in shifts], dim=1)  # (O, r r, I, kH + r - 1, kW + r - 1)
    weight = weight.flatten(0, 1)  # (O r r, I, kH + r - 1, kW + r - 1)
    if bias is not None:
        bias = bias.repeat_interleave(r**2)  # (O r r,)
    out = F.conv2d(x, weight, bias, r, padding)  # (B, O r r, H' / r, W' / r)
    out = F.pixel_shuffle(out, r)[..., :height, :width]  # (B, O, H, W)
    return out.contiguous(memory_format=torch.channels_last)


class MatrixConv2d(torch.autograd.Function):
    """F.conv2d with a weight (O, k k I), which is saved itself for the backward pass.

    A saved view would keep the weight's memory alive when ZeRO-3 frees the parameter after its use. On a CPU the weight
    gradient of many channels is a matrix product of the output's gradient and patches of the input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int
    ) -> Tensor:
        x = _in_autocast_dtype(x)
        ctx.save_for_backward(x, weight)
        ctx.kernel, ctx.stride, ctx.padding = kernel, stride, padding
        return F.conv2d(x, _as_map(weight, kernel), bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight = _as_map(weight.to(x.dtype), ctx.kernel)  # (O, I, k, k)
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        as_product = for_weight and _has_fast_product(x, weight)
        stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
        wanted = [for_x, for_weight and not as_product, for_bias and not as_product]
        grad_x = grad_weight = grad_bias = None
        if any(wanted):
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_out, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], 1, wanted
            )
        if as_product:
            grad_weight = _weight_gradient(x, grad_out, ctx.kernel, ctx.stride, ctx.padding)
            grad_bias = grad_out.sum((0, 2, 3)) if for_bias else None  # (O,)
        elif grad_weight is not None:
            grad_weight = rearrange(grad_weight, "o i kh kw -> o (kh kw i)")  # (O, k k I), a view if channels_last
        return grad_x, grad_weight, grad_bias, None, None, None


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """x as F.conv2d takes it under autocast, which casts inside the operator and leaves float64."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _has_fast_product(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight gradient is faster as a matrix product: a sum of several, so not in bf16 and fp16."""
    full_precision = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and full_precision and weight.shape[2] > 1 and min(weight.shape[:2]) >= MANY_CHANNELS


def _weight_gradient(x: Tensor, grad_out: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """x (B, I, H, W) and grad_out (B, O, H', W') -> (O, k k I)."""
    dim_in, (_, dim_out, height, width) = x.shape[1], grad_out.shape
    x = rearrange(x, "b i h w -> b h w i")  # (B, H, W, I)
    x = F.pad(x, (0, 0, padding, padding, padding, padding))  # (B, H + 2 padding, W + 2 padding, I)
    patches = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B, H', W', I, k, k), a view
    patches = rearrange(patches, "b h w i kh kw -> b h w kh kw i")  # (B, H', W', k, k, I), a view
    grad_out = rearrange(grad_out, "b o h w -> b h w o")  # (B, H', W', O)
    max_rows = max(1, IM2COL_ELEMENTS // (width * kernel * kernel * dim_in))  # image rows of one product
    max_images = max(1, max_rows // height)
    grad_weight = grad_out.new_zeros(dim_out, kernel * kernel * dim_in)
    for image_patches, image_grads in zip(patches.split(max_images), grad_out.split(max_images)):
        for row_patches, row_grads in zip(image_patches.split(max_rows, dim=1), image_grads.split(max_rows, dim=1)):
            columns = rearrange(row_patches, "b h w kh kw i -> (b h w) (kh kw i)")  # (B H' W', k k I), a copy
            grads = rearrange(row_grads, "b h w o -> (b h w) o")  # (B H' W', O)
            grad_weight.addmm_(grads.T, columns)  # (O, k k I)
    return grad_weight
