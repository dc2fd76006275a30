"""A cascade of pixel transformers from training loss to images: what surrounds a network works for every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.config import CascadeConfig, DistillConfig
from fastimagen.networks.build import build_network
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.distillation import distillations, student_cascade
from fastimagen.train.flops import unet_flops
from tests.conftest import TOY_STAGES, TOY_TRANSFORMER, write_toy_model

TEXT = TextEmbeddings.from_list([torch.randn(5, 64), torch.randn(3, 64)])


def cascade(**base: Any) -> CascadeConfig:
    """Text as tokens in the base stage, which predicts x0; rotary positions alone in super-resolution, on crops."""
    stages = [
        {
            **TOY_STAGES[0],
            "objective": {"prediction": "x0"},
            "unet": {**TOY_TRANSFORMER, "text_reading": "tokens", "positional_encoding": True, **base},
        },
        {**TOY_STAGES[1], "unet": {**TOY_TRANSFORMER, "lowres": True}},
    ]
    return CascadeConfig.model_validate({"stages": stages})


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> ImagenPipeline:
    return ImagenPipeline.from_pretrained(
        write_toy_model(tmp_path_factory.mktemp("transformers") / "m", None, cascade())
    )


def test_an_image_depends_on_its_caption_and_seed_only(pipe: ImagenPipeline) -> None:
    both = pipe(text=TEXT, seed=5).images
    assert both.shape == (2, 3, 16, 16) and both.isfinite().all()
    torch.testing.assert_close(pipe(text=TEXT[1:], seed=6).images, both[1:], rtol=0, atol=1e-5)
    assert not torch.allclose(pipe(text=TEXT, seed=7).images[1], both[1])
    unguided = pipe(text=TEXT, seed=5, guidance=1.0).images
    assert not torch.allclose(unguided, both)


@pytest.mark.parametrize("name", ["base", "sr"])
def test_a_student_of_four_steps_learns_from_a_transformer(name: str, pipe: ImagenPipeline, tmp_path: Path) -> None:
    """It is asked for what its teacher does with guidance, learns in every parameter, and is called four times."""
    config = student_cascade(cascade(), 4)
    student, network = Stage(config.stage(name), config.below(name)), build_network(config.stage(name).unet)
    with torch.no_grad():  # films begin as zeros, through which time and pooled text get no gradient
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    settings = DistillConfig(model=str(write_toy_model(tmp_path / "teacher", None, cascade())), substeps=2)
    objective = distillations(student, settings, 1, torch.device("cpu"), torch.float32)(1)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    objective.training_loss(network, images, TEXT, student.draw(0, [0, 1], images)).mean().backward()
    unused = {"text.null_tokens", "text.null_vector"}  # captions are never dropped
    learned = {
        key for key, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert learned == {key for key, _ in network.named_parameters()} - unused
    calls: list[int] = []
    network.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    lowres = images if name == "sr" else None
    assert student.sample(network, TEXT, [0, 1], lowres=lowres).isfinite().all()
    assert calls == [2] * 4


def test_tiles_where_positions_allow_them() -> None:
    config = CascadeConfig.model_validate(
        {"stages": [TOY_STAGES[0], {**TOY_STAGES[1], "size": 32, "unet": {**TOY_TRANSFORMER, "lowres": True}}]}
    )
    stage = Stage(config.stages[1], config.stages[0])
    sampling, network = stage.config.sampling, build_network(stage.config.unet)
    lowres = torch.rand(2, 3, 8, 8) * 2 - 1
    whole, tiled = (
        stage.sample(network, TEXT, [5, 6], lowres=lowres, sampling=sampling.model_copy(update={"tile": tile}))
        for tile in (None, 16)
    )
    assert 0 < (whole - tiled).abs().mean() < 0.2
    unet = cascade().stages[0].unet.model_dump()
    with pytest.raises(ValueError, match="positional encoding of the whole image"):
        CascadeConfig.model_validate({"stages": [{**TOY_STAGES[0], "size": 16, "crop": 8, "unet": unet}]})


@pytest.mark.parametrize("index", [0, 1])
def test_the_training_loss_reaches_every_parameter(index: int) -> None:
    config = cascade()
    stage = Stage(config.stages[index], config.below(config.stages[index].name))
    network, size = build_network(stage.config.unet), stage.config.size
    images = torch.rand(2, 3, size, size) * 2 - 1
    stage.training_loss(network, images, TEXT, stage.draw(0, range(2), images)).mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_flops_count_matrices_and_attention_over_all_tokens() -> None:
    config = cascade().stages[0].unet
    dim, tokens, text, hidden = config.dim, 4, 5, config.hidden_dim
    found = unet_flops(config, 8, text)
    n = tokens + text
    per_block = 2 * n * (4 * dim * dim + 3 * dim * hidden) + 4 * n * n * dim + 2 * 6 * dim * dim
    assert found.forward == pytest.approx(config.depth * per_block, rel=0.35)
    assert found.forward > config.depth * per_block
    assert 2.8 < found.training / found.forward <= 3
    recomputing = unet_flops(config.model_copy(update={"checkpoint_levels": (0, 1)}), 8, text)
    assert recomputing[:2] == found[:2] and 0 < recomputing.recomputed < found.forward


def test_a_kind_of_network_that_there_is_not_is_an_error_with_the_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='kind must be "unet", "pixel_transformer" or "if"'):
        cascade(kind="transformer")
