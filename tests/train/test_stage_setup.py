"""Which cascade a configuration describes, and which weights its training starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.config import CascadeConfig
from fastimagen.config_file import load_config
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.stage_setup import initial_unet, plan, resolve_cascade
from fastimagen.train.trainer import Trainer
from tests.conftest import toy_cascade, write_toy_encoder, write_toy_model

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage_setup")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


def test_the_dry_run_shows_a_preset_in_full(toy_config: dict[str, Any], write_config: Write) -> None:
    """What it prints is itself a configuration, of the same training."""
    toy_config["fastimagen"]["cascade"] = {"preset": "shapes", "stages": {"base": {"unet": {"dim": 32}}}}
    del toy_config["fastimagen"]["data"]["shapes"]
    lines = Trainer(load_config(write_config(toy_config))).describe()
    described = json.loads(lines[lines.index("{\n") :])
    assert [stage["name"] for stage in described["fastimagen"]["cascade"]["stages"]] == ["base", "sr"]
    assert described["fastimagen"]["cascade"]["stages"][0]["unet"]["dim"] == 32
    assert described["fastimagen"]["cascade"]["stages"][0]["unet"]["text_dim"] == 64  # the encoder's
    assert Trainer(load_config(write_config(described))).describe() == lines


def test_a_model_directory_is_cascade_and_starting_point(
    toy_config: dict[str, Any], write_config: Write, model: Path, tmp_path: Path
) -> None:
    other = write_toy_model(tmp_path / "other")
    toy_config["fastimagen"]["cascade"] = {"model": str(model), "stages": {"sr": {"sampling": {"steps": 9}}}}
    toy_config["fastimagen"]["train"]["stages"] = {"sr": {"init_from": str(other)}}
    resolved = resolve_cascade(load_config(write_config(toy_config))).fastimagen
    assert isinstance(resolved.cascade, CascadeConfig)
    assert [(stage.name, stage.sampling.steps) for stage in resolved.cascade.stages] == [("base", 2), ("sr", 9)]
    assert {name: stage.init_from for name, stage in resolved.train.stages.items()} == {
        "base": str(model),
        "sr": str(other),
    }


def test_a_preset_without_text_needs_no_text_encoder(toy_config: dict[str, Any], write_config: Write) -> None:
    changes = {"unet": {"text_dim": None}, "sampling": {"guidance": 1.0}}
    toy_config["fastimagen"]["cascade"] = {"preset": "shapes", "stages": {"base": changes, "sr": None}}
    del toy_config["fastimagen"]["data"]["shapes"]
    toy_config["fastimagen"] |= {"text": {"encoder": "nowhere/t5"}, "train": {}}
    _, stages = plan(load_config(write_config(toy_config)))
    assert [(stage.name, stage.unet.text_dim) for stage in stages] == [("base", None)]


def test_super_resolution_alone_says_what_it_enlarges(toy_config: dict[str, Any], write_config: Write) -> None:
    """It then trains as the same stage does above a base stage of that size."""
    toy_config["fastimagen"]["train"] = {}
    cascade = {"preset": "shapes", "stages": {"base": None, "sr": {"size": 32, "crop": 16, "lowres_size": 16}}}
    del toy_config["fastimagen"]["data"]["shapes"]
    toy_config["fastimagen"]["cascade"] = cascade
    (alone,) = plan(load_config(write_config(toy_config)))[1]
    images, losses = torch.rand(2, 3, 16, 16), []
    text = TextEmbeddings(torch.randn(2, 3, 64), torch.ones(2, 3, dtype=torch.bool))
    unet = initial_unet(alone, seed=0)
    below = toy_cascade().stages[0].model_copy(update={"size": 16})
    for stage in (Stage(alone), Stage(alone.model_copy(update={"lowres_size": None}), below)):
        losses.append(stage.training_loss(unet, images, text, stage.draw(0, range(2), images)))
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        ({"preset": "shapes", "stages": {"base": None}}, 'stage "sr" enlarges images, but no stage is below it: set'),
        ({"model": "nowhere"}, "nowhere is not a model directory"),
        ({"preset": "papr"}, 'unknown cascade preset "papr"; did you mean "paper"?'),
        ({"preset": "shapes", "stages": {"top": {}}}, 'fastimagen.cascade.stages: no stage "top"'),
    ],
)
def test_a_cascade_that_cannot_be_resolved_is_an_error(
    toy_config: dict[str, Any], write_config: Write, cascade: dict[str, Any], message: str
) -> None:
    toy_config["fastimagen"] |= {"cascade": cascade, "train": {}}
    del toy_config["fastimagen"]["data"]["shapes"]
    with pytest.raises(ValueError) as caught:
        Trainer(load_config(write_config(toy_config)))
    assert str(caught.value).startswith(message)
