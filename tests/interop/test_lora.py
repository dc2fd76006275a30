"""Adapters of DeepFloyd IF's networks in diffusers, both ways: the same file, the same output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastimagen.config import CascadeConfig, StageConfig
from fastimagen.diffusion_config import ScheduleConfig
from fastimagen.interop.deepfloyd_unet import config_of, weights_of
from fastimagen.network_config import LoraConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.lora import add_lora
from fastimagen.sampling.adapters import ADAPTER_FILE
from fastimagen.sampling.model_directory import write_model
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.train.adapters import write_adapters
from tests.interop.deepfloyd_shapes import SHAPES, scheduler, their_unet
from tests.interop.test_deepfloyd import embeddings

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft", reason="diffusers loads adapters with peft: pip install peft")


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


@torch.no_grad()
@pytest.mark.parametrize("converted", [False, True], ids=["PEFT's names", "names of diffusers' scripts"])
def test_a_file_of_diffusers_is_put_on_the_imported_model(converted: bool, tmp_path: Path) -> None:
    """As its pipelines write it after training, with alpha and rank in the metadata."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    theirs = their_unet(SHAPES["tiny stage I"])
    config = config_of(theirs.config)
    stage = StageConfig(name="base64", size=16, unet=config, schedule=ScheduleConfig(name="squaredcos", timesteps=1000))
    weights = {"base64": weights_of(theirs.state_dict())}
    model = write_model(
        tmp_path / "model", CascadeConfig(stages=(stage,)), weights, text_encoder=None, encoder_folder=None, card="#"
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    theirs.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.1)
    state = peft.utils.get_peft_model_state_dict(theirs)
    diffusers.IFPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=convert_state_dict_to_diffusers(state) if converted else state,
        **_collate_lora_metadata({"unet": theirs}),
    )
    ours = ImagenPipeline.from_pretrained(model, lora={tmp_path / "theirs": 0.5}).cascade.unets["base64"]
    theirs.set_adapters("default", 0.5)
    x, time, text = torch.randn(2, 3, 16, 16), torch.tensor([7, 813]), embeddings(2)
    expected = theirs(x, time, encoder_hidden_states=text.embeds).sample
    assert (ours(x, time, text=text) - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs.disable_adapters()
    plain = theirs(x, time, encoder_hidden_states=text.embeds).sample
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
