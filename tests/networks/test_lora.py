"""Low-rank adapters: what they compute, which layers have them, what stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastimagen.network_config import IFUNetConfig, LoraConfig, NetworkConfig, PixelTransformerConfig, UNetConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.lora import adapted_layers, merge, target_layers
from fastimagen.networks.network import Network
from fastimagen.networks.parameters import muon_parameters
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import TOY_TRANSFORMER, TOY_UNET

NETWORKS: dict[str, NetworkConfig] = {
    "unet": UNetConfig(**{**TOY_UNET, "text_in_self_attention": True, "zero_init": False}),
    "pixel_transformer": PixelTransformerConfig(**TOY_TRANSFORMER),
    "if": IFUNetConfig(
        kind="if",
        lowres=True,
        dims=(16, 32),
        num_blocks=1,
        attention=(False, True),
        head_dim=16,
        pool_heads=4,
        text_dim=64,
        max_text_length=5,
        groups=8,
        zero_init=False,
    ),
}


def output(network: Network) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, lowres = torch.randn(2, 2, 3, 8, 8, generator=generator)
    text = TextEmbeddings(torch.randn(2, 5, 64, generator=generator), torch.ones(2, 5, dtype=torch.bool))
    given: dict[str, Any] = {"lowres": lowres, "lowres_time": torch.tensor([9.0, 3.0])} if network.config.lowres else {}
    return network(x, torch.tensor([7.0, 500.0]), text=text, **given)


def adapted(config: NetworkConfig, lora: LoraConfig) -> Network:
    """A network whose adapters are past their first step: B is not zero any more."""
    torch.manual_seed(0)
    network = build_network(config, lora)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return network


@pytest.mark.parametrize("kind", NETWORKS)
def test_merged_equals_unmerged_and_the_base_stays(kind: str) -> None:
    config, lora = NETWORKS[kind], LoraConfig(rank=2, alpha=6.0)
    network = adapted(config, lora)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    expected = output(network)
    expected.square().sum().backward()
    torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad], lr=0.1).step()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert all(".lora_" in name and weight.grad is not None and weight.grad.any() for name, weight in trained.items())
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in trained), name

    base = {name: weight for name, weight in before.items() if name not in trained}
    plain = build_network(config)
    plain.load_state_dict(base)
    adapters = {name: before[name] for name in trained}
    assert (output(plain) - expected).abs().max() > 1e-2 * expected.abs().max()
    plain.load_state_dict(merge(base, adapters, lora.scale))
    assert (output(plain) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", NETWORKS)
def test_new_adapters_change_nothing(kind: str) -> None:
    torch.manual_seed(0)
    plain = build_network(NETWORKS[kind])
    torch.manual_seed(0)
    expected = output(plain)
    difference = output(build_network(NETWORKS[kind], LoraConfig())) - expected
    assert difference.abs().max() <= 1e-6 * expected.abs().max()  # layers whose weights are frozen round differently


def test_all_of_attention_has_adapters_by_default() -> None:
    with torch.device("meta"):
        networks = {kind: build_network(config) for kind, config in NETWORKS.items()}
    endings = {
        kind: {layer.rpartition(".")[2] for layer in target_layers(network, None)} for kind, network in networks.items()
    }
    assert endings["if"] == {"to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "0"}  # to_out.0
    assert endings["unet"] == {"to_q", "to_kv", "to_out", "1"}  # text_to_kv.1
    assert endings["pixel_transformer"] == {"to_qkv", "to_q", "text_to_kv", "to_out"}


def test_targets_are_ends_of_names() -> None:
    with torch.device("meta"):
        network = build_network(NETWORKS["if"], LoraConfig(targets=("mid_block.attentions.0.to_q", "proj")))
    state = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert sorted(adapted_layers(state)) == ["add_embedding.proj", "mid_block.attentions.0.to_q"]
    assert {name.rpartition(".lora_")[0] for name in muon_parameters(network)} <= set(adapted_layers(state))
    with pytest.raises(
        ValueError, match=r'no linear layer is called "conv1"; there are add_k_proj, .*, to_out.0, to_q'
    ):
        build_network(NETWORKS["if"], LoraConfig(targets=("to_q", "conv1")))


def test_adapters_of_another_network_are_refused() -> None:
    adapters = {"a.lora_A.weight": torch.zeros(2, 3), "a.lora_B.weight": torch.zeros(5, 2)}
    for weights in ({}, {"a.weight": torch.zeros(5, 4)}):
        with pytest.raises(ValueError, match="the adapter of a belongs to another network"):
            merge(weights, adapters, 1.0)
