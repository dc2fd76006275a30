"""Floating-point operations of a network, counted from the model itself. Nothing is computed, and no GPU is needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import ops
from ..config import StageConfig
from ..network_config import LoraConfig, NetworkConfig
from ..networks.build import build_network
from ..sizes import ImageSize
from ..text.embeddings import LENGTH_MULTIPLE, TextEmbeddings


class Flops(NamedTuple):
    """Of one image: matrix products, convolutions and attention, 2 for a multiplication and an addition.

    training: forward and backward, the FLOPs that count for the share of a device's peak rate. recomputed: what
    activation checkpointing computes a second time, beside `training`.
    """

    forward: int
    training: int
    recomputed: int


def stage_flops(
    stage: StageConfig,
    tokens: int = LENGTH_MULTIPLE,
    lora: LoraConfig | None = None,
    size: ImageSize | None = None,
) -> Flops:
    """The FLOPs of a stage for one training image of `size` with `tokens` text tokens. size: by default a crop if the
    stage trains on crops, or its square. lora: train adapters alone, without gradients of the other weights.
    """
    return unet_flops(stage.unet, size or stage.crop or stage.size, tokens, lora)


def unet_flops(
    config: NetworkConfig, size: int | ImageSize, tokens: int = LENGTH_MULTIPLE, lora: LoraConfig | None = None
) -> Flops:
    """The FLOPs of a network for one image, a square if `size` is a number."""
    forward, training = _count(config.model_copy(update={"checkpoint_levels": ()}), size, tokens, lora)
    recomputed = _count(config, size, tokens, lora)[1] - training if config.checkpoint_levels else 0
    return Flops(forward, training, recomputed)


def _count(config: NetworkConfig, size: int | ImageSize, tokens: int, lora: LoraConfig | None) -> tuple[int, int]:
    """FLOPs of the forward pass, and of forward and backward together as they would run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # these two read files when they are imported
    from torch.utils.flop_counter import FlopCounterMode

    backend = ops.backend()
    ops.set_backend("torch")  # the counter knows the products of PyTorch's attention, and not the kernels'
    try:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
            unet = build_network(config, lora)
            x, arguments = example_inputs(config, 1, size, tokens)
            with FlopCounterMode(display=False) as counter:
                output = unet(x, **arguments)
                forward = counter.get_total_flops()
                output.sum().backward()
        return forward, counter.get_total_flops()
    finally:
        ops.set_backend(backend)


def example_inputs(
    config: NetworkConfig, batch: int, size: int | ImageSize, tokens: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """x (B, C, H, W) and the other arguments of `Network.forward` in training, without values, on PyTorch's device."""
    x, time = torch.empty(batch, config.channels, *ImageSize.of(size)), torch.empty(batch)
    arguments: dict[str, Any] = {"time": time}
    if config.lowres:
        arguments |= {"lowres": torch.empty_like(x), "lowres_time": time}
    if config.text_dim:
        tokens = tokens if config.has_null_text else config.max_text_length
        mask = torch.empty(batch, tokens, dtype=torch.bool)
        # Without checking the mask: on the device "meta" it has no values.
        arguments["text"] = TextEmbeddings._derive(torch.empty(batch, tokens, config.text_dim), mask)
        if config.has_null_text:
            arguments["keep_text"] = torch.empty(batch, dtype=torch.bool)
    return x, arguments
