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

from ..ops.dispatch import autocast_dtype, in_kernels, traced

WIDE_KERNEL = 9  # from this width on, kernels compute blocks of outputs at once
BLOCK_SIZE = 4  # outputs per side of such a block; measured in docs/notes.md
MANY_CHANNELS = 128  # from this number of input and output channels on, the weight gradient is a matrix product
IM2COL_ELEMENTS = 1 << 20  # of the patches in one such product: 4 MiB in fp32, so that they stay in the cache


class MatrixWeights(nn.Module):
    """Base class of convolutions: a bias, and a weight stored as a matrix (O, kH kW I) that is (O, I, kH, kW) seen as
    channels_last.

    DeepSpeed requires contiguous parameters, and its Muon requires matrices. Stored this way, the weight is both, and
    channels_last for the convolution.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(dim_out, kernel * kernel * dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out))
        bound = 0.0 if zero_init else 1 / math.sqrt(dim_in * kernel * kernel)  # PyTorch's default
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class Conv2d(MatrixWeights):
    """Convolution: (B, I, H, W) -> (B, O, H', W')."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int, *, stride: int = 1, padding: int = 0, zero_init: bool = False
    ) -> None:
        super().__init__(dim_in, dim_out, kernel, zero_init=zero_init)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W'); without the bias if what follows adds it."""
        return convolve(x, self.weight, self.bias if add_bias else None, self.kernel, self.stride, self.padding)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, stride: int, padding: int) -> Tensor:
    """F.conv2d with a weight (O, k k I), in the way that trains best on x's device."""
    if torch.is_grad_enabled():
        if x.device.type == "cpu" and kernel >= WIDE_KERNEL and stride == 1:
            return _blocked_conv2d(x, _as_map(weight, kernel), bias, padding)
        if is_partitioned(weight) or _has_fast_product(x, weight, kernel):
            return MatrixConv2d.apply(x, weight, bias, kernel, stride, padding)
    return F.conv2d(x, _as_map(weight, kernel), bias, stride, padding)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 partitions this parameter: DeepSpeed gives it a number."""
    return hasattr(parameter, "ds_id")


class PointwiseConv(MatrixWeights):
    """1x1 convolution of x, or of a skip behind x, as matrix products: (B, I, H, W) -> (B, O, H, W) channels_last."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 1)

    def forward(
        self, x: Tensor, skip: Tensor | None = None, *, skip_scale: float = 1.0, add_bias: bool = True
    ) -> Tensor:
        """The convolution of cat([x, skip * skip_scale], dim=1), which is not made."""
        bias = self.bias if add_bias else None
        if skip is None and convolutions_add_bias(x):
            return convolve(x, self.weight, bias, kernel=1, stride=1, padding=0)  # faster on a CPU
        return PointwiseProduct.apply(x, skip, self.weight, bias, skip_scale)


class OutputConv(MatrixWeights):
    """3x3 convolution of x and a few more channels: (B, I, H, W), (B, J, H, W) -> (B, O, H, W).

    On a GPU each has a convolution of its own: the concatenation would be two more passes over x, and its number of
    channels no multiple of 8, which cuDNN's fast kernels need.
    """

    def __init__(self, dim_in: int, dim_out: int, *, zero_init: bool) -> None:
        super().__init__(dim_in, dim_out, 3, zero_init=zero_init)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        if more is None or convolutions_add_bias(x):
            x = x if more is None else torch.cat([x, more], dim=1)  # (B, I + J, H, W)
            return convolve(x, self.weight, self.bias, kernel=3, stride=1, padding=1)
        parts = _as_map(self.weight, 3).split([x.shape[1], more.shape[1]], dim=1)  # (O, I, 3, 3), (O, J, 3, 3)
        for_x, for_more = (part.contiguous(memory_format=torch.channels_last) for part in parts)
        return F.conv2d(x, for_x, self.bias, padding=1) + F.conv2d(more, for_more, padding=1)


def convolutions_add_bias(x: Tensor) -> bool:
    """Whether convolutions of x should add their bias, and not what follows them.

    On a CPU they add it while they write their output. For those of cuDNN it is a pass of its own, which GroupNorm and
    the residual sum save. In Triton's interpreter it is as on a GPU.
    """
    return not in_kernels(x)


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

    A saved view would keep the weight's memory alive when ZeRO-3 frees the parameter after its use; without ZeRO-3
    PyTorch's own function costs less host time. On a CPU the gradient of a weight of many channels is a matrix product
    of the output's gradient and patches of the input.
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
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        as_product = for_weight and _has_fast_product(x, weight, ctx.kernel)
        weight = _as_map(weight.to(x.dtype), ctx.kernel)  # (O, I, k, k)
        stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
        wanted = [for_x, for_weight and not as_product, for_bias and not as_product]
        grad_x = grad_weight = grad_bias = None
        if any(wanted):
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
                grad_out, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], 1, wanted
            )
        if as_product:
            grad_weight = _weight_gradient(x, grad_out, ctx.kernel, ctx.stride, ctx.padding)
            grad_bias = grad_out.sum((0, 2, 3)) if for_bias else None  # (O,)
        elif grad_weight is not None:
            grad_weight = rearrange(grad_weight, "o i kh kw -> o (kh kw i)")  # (O, k k I), a view if channels_last
        return grad_x, grad_weight, grad_bias, None, None, None


class PointwiseProduct(torch.autograd.Function):
    """bias + W_x x + skip_scale W_skip skip for every pixel; W = [W_x | W_skip] (O, I + J), bias (O,).

    The second product is added to the first in place, and so are no two gradients of one weight. As in MatrixConv2d,
    the weight is saved itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, skip_scale: float) -> Tensor:
        x = _in_autocast_dtype(x)
        skip = None if skip is None else skip.to(x.dtype)
        ctx.save_for_backward(x, skip, weight)
        ctx.skip_scale = skip_scale
        weight, channels = weight.to(x.dtype), x.shape[1]
        out = F.linear(_to_rows(x), weight[:, :channels], None if bias is None else bias.to(x.dtype))  # (B H W, O)
        if skip is not None:
            out.addmm_(_to_rows(skip), weight[:, channels:].T, alpha=skip_scale)  # (B H W, O)
        return _to_map(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, skip, weight = ctx.saved_tensors
        for_x, for_skip, for_weight, for_bias = ctx.needs_input_grad[:4]
        weight, channels = weight.to(x.dtype), x.shape[1]
        rows = _to_rows(grad_out)  # (B H W, O)
        grad_x = grad_skip = grad_weight = grad_bias = None
        if for_x:
            grad_x = _to_map(rows @ weight[:, :channels], x)  # (B, I, H, W)
        if for_skip:
            grad_skip = rows.new_empty(len(rows), skip.shape[1])  # (B H W, J)
            grad_skip.addmm_(rows, weight[:, channels:], beta=0, alpha=ctx.skip_scale)
            grad_skip = _to_map(grad_skip, x)  # (B, J, H, W)
        if for_weight and skip is None:
            grad_weight = rows.T @ _to_rows(x)  # (O, I)
        elif for_weight:
            grad_weight = torch.empty_like(weight)  # (O, I + J)
            grad_weight[:, :channels].addmm_(rows.T, _to_rows(x), beta=0)
            grad_weight[:, channels:].addmm_(rows.T, _to_rows(skip), beta=0, alpha=ctx.skip_scale)
        if for_bias:
            grad_bias = rows.sum(0)  # (O,)
        return grad_x, grad_skip, grad_weight, grad_bias, None


def _to_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C); a view if x is channels_last."""
    return rearrange(x, "b c h w -> (b h w) c")  # (B H W, C)


def _to_map(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W) channels_last, with batch, height and width of `like`."""
    return rearrange(rows, "(b h w) c -> b c h w", h=like.shape[2], w=like.shape[3])  # (B, C, H, W)


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """x as F.conv2d takes it under autocast, which casts inside the operator and leaves float64."""
    return x.to(autocast_dtype(x) or x.dtype)


def _has_fast_product(x: Tensor, weight: Tensor, kernel: int) -> bool:
    """Whether the gradient of a weight (O, k k I) is faster as a matrix product: a sum of several, so not in bf16.

    Not where operators are only looked at: the dry run of a large network would look at thousands of small products.
    """
    full_precision = x.dtype in (torch.float32, torch.float64)
    channels = min(weight.shape[0], weight.shape[1] // kernel**2)
    return x.device.type == "cpu" and full_precision and kernel > 1 and channels >= MANY_CHANNELS and not traced()


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
