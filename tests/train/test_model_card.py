"""The model card of an export: the hub reads its front matter, and its command samples from the model."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastimagen.cli import parser
from fastimagen.config import CascadeConfig, FastimagenConfig
from fastimagen.sizes import ImageSize
from fastimagen.train.model_card import StageFacts, example_captions, model_card
from tests.conftest import TOY_STAGES, toy_tree

ModelCard = pytest.importorskip("huggingface_hub").ModelCard

UNCONDITIONAL = {"text_dim": None, "cross_attention": False}


def card_of(
    data: Path, stages: list[dict[str, Any]], *, encoder: str | None = None, grid: bool = False, **shards: Any
) -> str:
    """The card of a cascade that was trained on the toy data."""
    tree = toy_tree(data)["fastimagen"]
    tree["cascade"] = {"stages": stages}
    tree["train"]["stages"] = {}
    tree["data"] |= shards
    if encoder is not None:
        tree["text"] = {"encoder": encoder}
    config = FastimagenConfig.model_validate(tree)
    assert isinstance(config.cascade, CascadeConfig)
    facts = [
        StageFacts(stage.name, [ImageSize.of(stage.size)], 1_500_000, 20, "decay 0.5")
        for stage in config.cascade.stages
    ]
    return model_card("mine", config, config.cascade, facts, includes_encoder=encoder is None, has_grid=grid)


def stage(number: int, **unet: Any) -> dict[str, Any]:
    chosen = copy.deepcopy(TOY_STAGES[number])
    chosen["unet"] |= unet
    if chosen["unet"]["text_dim"] is None:
        chosen["sampling"] = chosen.get("sampling", {}) | {"guidance": 1.0}
    return chosen


CASCADES = {
    "text": (TOY_STAGES, "text-to-image"),
    "one grey stage": ([stage(0, channels=1)], "text-to-image"),
    "unconditional": ([stage(0, **UNCONDITIONAL), stage(1, **UNCONDITIONAL)], "unconditional-image-generation"),
    "super-resolution": ([stage(1) | {"lowres_size": 8}], "image-to-image"),
    "super-resolution without text": ([stage(1, **UNCONDITIONAL) | {"lowres_size": 8}], "image-to-image"),
}


@pytest.mark.parametrize(("stages", "task"), CASCADES.values(), ids=CASCADES)
@pytest.mark.parametrize("grid", [True, False])
def test_the_card_says_what_is_true_of_any_cascade(
    stages: list[dict[str, Any]], task: str, grid: bool, toy_data: Path
) -> None:
    text = card_of(toy_data, stages, grid=grid)
    card = ModelCard(text)
    front = card.data.to_dict()
    assert (front["library_name"], front["pipeline_tag"], front["license"]) == ("fastimagen", task, "unknown")
    assert task in front["tags"] and text.count("\n---\n") == 1
    assert ("samples.png" in text) == grid and ("widget" in front) == grid
    for one in stages:
        assert f"| {one['name']} | {one['size']}x{one['size']} | 1.50 M | 20 |" in text
    assert "`train` (the built-in captioned shapes)" in text and str(toy_data.parent) not in text
    (command,) = re.findall(r"^fastimagen (.*)$", text, re.MULTILINE)
    options = parser().parse_args(shlex.split(command))
    reads_text = any(one["unet"]["text_dim"] is not None for one in stages)
    captions = example_captions(FastimagenConfig.model_validate(toy_tree(toy_data)["fastimagen"]).data)
    assert options.captions == (captions[:1] if reads_text else None)
    assert len(set(captions)) == len(captions) == 4 and all((f"* {line}\n" in text) == reads_text for line in captions)
    assert (options.lowres is not None) == ("lowres" in stages[0]["unet"])
    assert ("none, it reads no captions" in text) == (not reads_text)


def test_an_encoder_of_the_hub_is_named_in_full_and_private_sources_are_not(toy_data: Path) -> None:
    shards = ["/home/me/secret place/cats", "pipe:cat key | fetch", "https://me:word@host.example/a/{0..9}.tar?token=1"]
    text = card_of(toy_data, TOY_STAGES, encoder="base1.1", shards=shards, validation=None, shapes=None)
    assert "`google/t5-v1_1-base` from the Hugging Face hub" in text
    assert "captioned images from `cats`, `a command`, `https://host.example/a/{0..9}.tar`." in text
    assert "fastimagen sample --model . --captions 'a photo'\n" in text and "Captions of its data" not in text
