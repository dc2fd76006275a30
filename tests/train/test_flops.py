"""FLOPs counted from the U-Net, and the peak rates of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagen import ops
from fastimagen.network_config import UNetConfig
from fastimagen.networks import attention as attention_modules
from fastimagen.networks.convolution import MatrixWeights
from fastimagen.networks.unet import UNet
from fastimagen.presets import paper
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.devices import DEVICES, device_by_cuda_name
from fastimagen.train.flops import stage_flops, unet_flops

TOKENS = 5
REGULAR = UNetConfig(
    text_dim=12, dim=16, dim_mults=(1, 2), heads=2, head_dim=16, middle_attention=True, text_in_self_attention=True
)
EFFICIENT = UNetConfig(
    lowres=True,
    text_dim=12,
    dim=16,
    dim_mults=(1, 2),
    downsample_first=True,
    full_resolution="extra_block",
    stem_kernels=(3,),
    heads=2,
    head_dim=16,
)


def counted_in_a_run(config: UNetConfig, side: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """FLOPs of a forward pass that is really computed: from the shapes that layers and attention see."""
    total = 0

    def layer(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output.numel() // len(weight)  # pixels or tokens
        total += 2 * weight.numel() * positions

    real_attention = ops.attention

    def attention(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **keys: Any) -> Tensor:
        nonlocal total
        sources = [x.shape[1] for x in (k, keys.get("context_k")) if x is not None]
        count = sum(sources) + (keys.get("null_k") is not None)
        total += 2 * 2 * q.numel() * count  # scores, and the weighted sum of values
        return real_attention(q, k, v, **keys)

    monkeypatch.setattr(attention_modules.ops, "attention", attention)
    unet = UNet(config)
    for module in unet.modules():
        if isinstance(module, (nn.Linear, MatrixWeights)):
            module.register_forward_hook(layer)
    x, time = torch.zeros(1, 3, side, side), torch.zeros(1)
    text = TextEmbeddings(torch.zeros(1, TOKENS, 12), torch.ones(1, TOKENS, dtype=torch.bool))
    lowres = {"lowres": x, "lowres_time": time} if config.lowres else {}
    with torch.no_grad():
        unet(x, time, text=text, **lowres)
    return total


@pytest.mark.parametrize("config", [REGULAR, EFFICIENT], ids=["regular", "efficient"])
def test_forward_flops_are_those_of_all_layers_and_attentions(
    config: UNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = unet_flops(config, 16, TOKENS)
    mean_of_tokens = 2 * TOKENS * config.dim  # the only product outside of layers and attention
    assert found.forward == counted_in_a_run(config, 16, monkeypatch) + mean_of_tokens
    assert 2.9 < found.training / found.forward <= 3  # no gradient for the images
    assert found.recomputed == 0


def test_recomputation_is_counted_beside_the_training_flops() -> None:
    plain = unet_flops(REGULAR, 16, TOKENS)
    found = unet_flops(REGULAR.model_copy(update={"checkpoint_levels": (0, 1)}), 16, TOKENS)
    assert (found.forward, found.training) == (plain.forward, plain.training)
    assert 0.3 * plain.forward < found.recomputed < plain.forward


def test_the_papers_last_stage_needs_its_flops_on_crops() -> None:
    forward, training, _ = stage_flops(paper().stages[2])
    assert forward == pytest.approx(0.6486e12, rel=1e-3)
    assert training == pytest.approx(3 * forward, rel=1e-3)


def test_the_backend_of_the_ops_stays_as_it_was() -> None:
    before = ops.backend()
    unet_flops(REGULAR, 16, TOKENS)
    assert ops.backend() == before


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_found_by_the_name_that_cuda_reports(name: str, key: str | None) -> None:
    assert device_by_cuda_name(name) == (DEVICES[key] if key else None)


def test_peak_rates_are_dense() -> None:
    assert DEVICES["h100"].peak("bf16") == 989e12
    assert DEVICES["a100"].peak("fp32") == 156e12
