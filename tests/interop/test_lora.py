"""Adapters of DeepFloyd IF's networks in diffusers: the same file, the same output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastimagen.interop.deepfloyd_unet import config_of, weights_of
from fastimagen.network_config import LoraConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.lora import add_lora
from fastimagen.train.adapters import ADAPTER_FILE, write_adapters
from tests.interop.deepfloyd_shapes import SHAPES, scheduler, their_unet
from tests.interop.test_deepfloyd import embeddings

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft", reason="diffusers loads adapters with peft: pip install peft")


@torch.no_grad()
@pytest.mark.parametrize("shape", ["tiny stage I", "tiny stage II"])
def test_diffusers_loads_the_file_and_computes_the_same(shape: str, tmp_path: Path) -> None:
    theirs, lora = their_unet(SHAPES[shape]), LoraConfig(rank=2, alpha=6.0)
    network = build_network(config_of(theirs.config)).eval()
    network.load_state_dict(weights_of(theirs.state_dict()))
    x, time, text = torch.randn(2, 3, 16, 16), torch.tensor([7, 813]), embeddings(2)
    lowres, level = torch.randn(2, 3, 16, 16), torch.tensor([250, 10])
    large = network.config.lowres
    given = {"lowres": lowres, "lowres_time": level} if large else {}
    before = network(x, time, text=text, **given)
    add_lora(network, lora)
    adapters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    for name, weight in adapters.items():
        if ".lora_B." in name:
            weight.normal_(std=0.03)
    expected = network(x, time, text=text, **given)
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()

    settings = {f"train.lora.{key}": value for key, value in lora.model_dump().items()}
    write_adapters(tmp_path / ADAPTER_FILE, {"settings": {**settings, "train.init_from": "if_model"}}, adapters)
    kind = diffusers.IFSuperResolutionPipeline if large else diffusers.IFPipeline
    noising = {"image_noising_scheduler": scheduler("fixed_small")} if large else {}
    pipe = kind(
        unet=theirs,
        scheduler=scheduler(),
        **noising,
        **dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")),
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(tmp_path)
    labels = {"class_labels": level} if large else {}
    inputs = torch.cat([x, lowres], 1) if large else x
    got = pipe.unet(inputs, time, encoder_hidden_states=text.embeds, **labels).sample
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    pipe.unload_lora_weights()
    plain = pipe.unet(inputs, time, encoder_hidden_states=text.embeds, **labels).sample
    assert (plain - before).abs().max() <= 1e-5 * before.abs().max()
