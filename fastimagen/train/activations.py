"""Memory of a forward and backward pass, measured without computing it: tensors of fake values are counted."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import StageConfig
from ..network_config import LoraConfig
from ..networks.build import build_network
from ..ops.dispatch import meta_is_gpu
from ..sizes import ImageSize
from .flops import example_inputs


class Peaks(NamedTuple):
    """Bytes at the fullest moment of a forward and backward pass, without weights.

    activations: without gradients of the weights, which leave as soon as they are made. with_gradients: with all of
    them, which stay.
    """

    activations: int
    with_gradients: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:  # a new address, or one whose tensor is gone
            self.live[key] = storage.nbytes()
            self.total += self.live[key]
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.total -= self.live.pop(key)

    def known(self, tensor: Tensor) -> None:
        """Do not count a tensor that was made before."""
        self.live[tensor.untyped_storage()._cdata] = 0


def measure(
    stage: StageConfig,
    micro_batch: int,
    dtype: torch.dtype,
    *,
    tokens: int,
    gpu: bool,
    lora: LoraConfig | None = None,
    size: ImageSize | None = None,
) -> Peaks:
    """Peak memory of a micro-batch of the stage's training images in `dtype`.

    size: of the images; None is a crop if the stage trains on crops, or its square. gpu: the ops
    take the path of a GPU with the kernels, and otherwise that of a CPU. lora: train adapters alone.
    """
    images = size or ImageSize.of(stage.crop or stage.size)
    return Peaks(*(_peak(stage, micro_batch, images, dtype, tokens, gpu, lora, keep) for keep in (False, True)))


def _peak(
    stage: StageConfig,
    micro_batch: int,
    size: ImageSize,
    dtype: torch.dtype,
    tokens: int,
    gpu: bool,
    lora: LoraConfig | None,
    keep: bool,
) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode  # reads files when it is imported

    with ExitStack() as stack:
        if gpu:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(meta_is_gpu())
        else:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        unet = build_network(stage.unet, lora)
        if gpu:
            unet.to(dtype)  # on a CPU training is in fp32
        counter = _LiveBytes()
        for parameter in unet.parameters():
            counter.known(parameter)
            if parameter.requires_grad and not keep:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with counter:
            images, arguments = example_inputs(stage.unet, micro_batch, size, tokens)
            noise, x, target = (torch.empty_like(images) for _ in range(3))
            output = unet(x, **arguments)
            prediction = output[:, : target.shape[1]]  # without a variance behind it
            loss = (prediction.float() - target).square().flatten(1).mean(1).mean()
            del prediction
            del output
            loss.backward()
            del noise, images
    return counter.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
