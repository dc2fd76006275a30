"""Networks and ops on meta tensors along the path that they take on a GPU: through the launchers of our kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastimagen.network_config import UNetConfig
from fastimagen.ops import dispatch
from fastimagen.text.embeddings import TextEmbeddings

from .networks import TOKENS


class _AsOnAGPU(TorchDispatchMode):
    """Convolutions return channels_last, as cuDNN does for our weights."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            return _channels_last(out)
        if name == "convolution_backward":
            return *(None if gradient is None else _channels_last(gradient) for gradient in out[:2]), out[2]
        return out


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last) if x.dim() == 4 else x


def _yes(*_: object, **__: object) -> bool:
    return True


def _no(*_: object, **__: object) -> bool:
    return False


CHOICES = {"use_triton": _yes, "in_kernels": _yes, "traced": _no}
"""Functions of ops.dispatch that lead to the kernels; outside of torch.compile nothing is traced."""


@contextmanager
def on_the_kernels_path() -> Iterator[None]:
    """Inside, our ops on meta tensors call the launchers; what a launch does is up to the caller."""
    with ExitStack() as patches:
        # So that set_backend takes "triton" without a GPU.
        patches.enter_context(mock.patch.object(dispatch, "no_triton", return_value=None))
        patches.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))  # meta has none
        for name, module in list(sys.modules.items()):
            for choice, answer in CHOICES.items():
                if name.startswith("fastimagen.") and hasattr(module, choice):
                    patches.enter_context(mock.patch.object(module, choice, answer))
        patches.enter_context(_AsOnAGPU())
        yield


def unet_inputs(config: UNetConfig, batch: int, side: int) -> tuple[dict[str, Any], Tensor]:
    """On meta: the arguments of a U-Net besides the images, and the images (B, C, side, side)."""
    with torch.device("meta"):
        x, time = torch.empty(batch, config.channels, side, side), torch.empty(batch)
        given: dict[str, Any] = {"time": time}
        if config.text_dim:
            embeds = torch.empty(batch, TOKENS, config.text_dim, dtype=torch.bfloat16)  # (B, L, E)
            # The constructor looks at the mask's values, which meta tensors do not have.
            text = TextEmbeddings._derive(embeds, torch.empty(batch, TOKENS, dtype=torch.bool))
            given |= {"text": text, "keep_text": torch.empty(batch, dtype=torch.bool)}
        if config.lowres:
            given |= {"lowres": x, "lowres_time": time}
    return given, x
