"""Low-rank adaptation (Hu et al. 2021): a frozen network learns through small matrices beside its linear layers.

An adapted layer computes W x + (alpha / rank) B A x. W keeps its name; A (rank, I) and B (O, rank) are `lora_A.weight`
and `lora_B.weight` under the name of the layer, as PEFT calls them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..network_config import LoraConfig
from . import attention, if_unet, pixel_transformer

ATTENTION = (
    attention.TextAttention,
    if_unet.Attention,
    pixel_transformer.PatchAttention,
    pixel_transformer.TextAttention,
)
"""Modules whose linear layers have adapters by default: in DeepFloyd IF's networks they are those of diffusers'
training scripts."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. `weight` and `bias` are those of the layer that it replaces."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        device, dtype = layer.weight.device, layer.weight.dtype
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)  # PEFT's "gaussian"
        nn.init.zeros_(self.lora_B.weight)  # the first output is that of the layer alone

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(network: nn.Module, config: LoraConfig) -> None:
    """Freeze a network and put adapters on its target layers, whose A are drawn from PyTorch's random numbers.

    Raises ValueError for targets that no linear layer is called.
    """
    network.requires_grad_(False)
    for name in target_layers(network, config.targets):
        parent, _, leaf = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(network.get_submodule(parent), leaf, LoraLinear(layer, config.rank, config.scale))


def target_layers(network: nn.Module, targets: Iterable[str] | None) -> list[str]:
    """The names of the linear layers that get adapters. Raises ValueError as `add_lora`.

    A target is the end of a layer's name: "to_q" means all layers of that name, "mid_block.attentions.0.to_q" one.
    """
    layers = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    if targets is None:
        inside = [name for name, module in network.named_modules() if isinstance(module, ATTENTION)]
        found = [layer for layer in layers if layer.startswith(tuple(f"{name}." for name in inside))]
        if not found:
            raise ValueError(f"the network has no attention: name layers in targets, of {_endings(layers)}")
        return found
    found = []
    for target in targets:
        matching = [layer for layer in layers if layer == target or layer.endswith(f".{target}")]
        if not matching:
            raise ValueError(f'targets: no linear layer is called "{target}"; there are {_endings(layers)}')
        found += matching
    return list(dict.fromkeys(found))


def _endings(layers: list[str]) -> str:
    """The last parts of layers' names, with the part before where the last one is a number."""
    endings = set()
    for layer in layers:
        parts = layer.split(".")
        endings.add(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]))
    return ", ".join(sorted(endings))


def adapted_layers(adapters: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers whose A and B are in `adapters`."""
    return [name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)]


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of a network without adapters that computes the same: W + scale B A in fp32, the others unchanged.

    Raises ValueError for adapters of layers that the network does not have.
    """
    merged = dict(weights)
    for layer in adapted_layers(adapters):
        down, up = adapters[layer + DOWN].float(), adapters[layer + UP].float()  # (rank, I), (O, rank)
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != (len(up), down.shape[1]):
            raise ValueError(f"the adapter of {layer} belongs to another network")
        merged[f"{layer}.weight"] = torch.addmm(weight.float(), up, down, alpha=scale)  # (O, I)
    return merged
