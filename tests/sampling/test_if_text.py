"""DeepFloyd IF's reading of captions, from the words to the image: lower case, fixed length, the empty caption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastimagen.cascade import Cascade, Stage
from fastimagen.config import CascadeConfig
from fastimagen.sampling.model_directory import write_model
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.t5 import T5Encoder
from tests.conftest import toy_cascade
from tests.networks.test_lora import NETWORKS

TOKENS = 12
CAPTION = "a red circle on a white background"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory, toy_encoder: Path) -> ImagenPipeline:
    """A first stage like IF's and a second one of our own U-Nets, which read the same text."""
    unet = {**NETWORKS["if"].model_dump(), "lowres": False, "max_text_length": TOKENS}
    first = {"name": "base", "size": 8, "unet": unet, "objective": {"prediction": "epsilon"}}
    first |= {"schedule": {"name": "squaredcos", "timesteps": 1000}, "sampling": {"steps": 3, "guidance": 3.0}}
    second = toy_cascade().stages[1].model_dump()
    config = CascadeConfig.model_validate({"stages": [first, second | {"sampling": {"steps": 2, "guidance": 2.0}}]})
    torch.manual_seed(0)
    unets = Cascade(config).unets
    folder = write_model(
        tmp_path_factory.mktemp("if_text") / "model",
        config,
        {name: unet.state_dict() for name, unet in unets.items()},
        text_encoder={
            "name": "text_encoder",
            "revision": None,
            "max_length": TOKENS,
            "encoding": "if",
            "included": True,
        },
        encoder_folder=toy_encoder,
        card="# toy\n",
    )
    return ImagenPipeline.from_pretrained(folder)


@torch.no_grad()
def test_the_encoder_gives_what_t5_gives_for_padded_lower_case(toy_encoder: Path) -> None:
    """Outputs for padding depend on the caption; real tokens attend to real tokens alone."""
    from transformers import AutoTokenizer, T5EncoderModel

    captions = ["A Red circle", "", CAPTION]
    tokenizer, model = AutoTokenizer.from_pretrained(toy_encoder), T5EncoderModel.from_pretrained(toy_encoder).eval()
    lower = [caption.lower() for caption in captions]
    given = tokenizer(lower, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    expected = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    text = T5Encoder(toy_encoder, max_length=TOKENS, encoding="if").encode(captions)
    assert text.embeds.shape == (3, TOKENS, 64) and text.mask.all()
    torch.testing.assert_close(text.embeds, expected)
    padding = text.embeds[:2, -1]
    assert (padding[0] - padding[1]).abs().max() > 1e-3


def test_the_pipeline_guides_against_the_empty_caption(pipe: ImagenPipeline) -> None:
    images = pipe(CAPTION, seed=3).images
    assert torch.equal(pipe(CAPTION.upper(), seed=3).images, images)
    assert not torch.equal(pipe(CAPTION, seed=3, negative="a blue star").images, images)
    base = pipe(CAPTION, seed=3, stop_at="base").images
    assert torch.equal(pipe(CAPTION, seed=3, stop_at="base", negative="").images, base)
    text, empty = pipe.encode([CAPTION]), pipe.encode([""])
    stage = Stage(pipe.cascade.config.stages[0], empty_text=empty)
    expected = stage.sample(pipe.cascade.unets["base"], text, [3])  # type: ignore[arg-type]
    torch.testing.assert_close(base, expected)
    assert not torch.equal(pipe(CAPTION, seed=3, stop_at="base", guidance=1.0).images, base)
