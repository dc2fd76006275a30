"""Losses, validation and preview grids of images that are not square. tests/drills/buckets.py has whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fastimagen.cascade import Stage
from fastimagen.config_file import config_from_dict
from fastimagen.networks.build import build_network
from fastimagen.seeds import mix_seed
from fastimagen.train.activations import measure
from fastimagen.train.run import Run
from fastimagen.train.validation import sample_grid, validation_loss
from tests.data.test_buckets import make_tar


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(toy_config: dict[str, Any], tmp_path: Path) -> Run:
    """A base of 8 pixels, and 16 above it, without text, on images of three shapes."""
    (tmp_path / "own").mkdir()
    make_tar(tmp_path / "own/0.tar", [0, 1, 2, 1] * 8)
    for stage in toy_config["fastimagen"]["cascade"]["stages"]:
        stage["unet"] |= {"text_dim": None, "cross_attention": False, "zero_init": False}
        stage["sampling"] = {"guidance": 1.0, "steps": 1}
    toy_config["fastimagen"]["cascade"]["stages"][1]["crop"] = None
    data = {"shards": str(tmp_path / "own"), "validation": {"count": 6}, "buckets": ["12x6", "8x8", "6x12"]}
    toy_config["fastimagen"]["data"] = data
    return Run(config_from_dict(toy_config), tmp_path / "run", "all")


@pytest.mark.parametrize("number", [0, 1])
def test_validation_loss_is_the_mean_over_images_of_all_sizes(run: Run, number: int, one_process: None) -> None:
    config, section = run.stages[number], run.config.fastimagen
    stage = Stage(config, run.cascade.below(config.name))
    unet, (_, validation) = build_network(config.unet), run.data
    assert validation is not None
    losses, sizes = [], set()
    for indices, bucket in validation.in_chunks(6, 1, run.sizes(config)):
        size = run.sizes(config)[bucket]
        batch = validation.fixed_batch(section, indices, size=size, crop=None)
        images = batch.images_for(torch.device("cpu"))
        draws = stage.draw(mix_seed(section.train.seed, "validation"), indices, images)
        losses.append(stage.training_loss(unet, images, None, draws, drop_captions=False))
        sizes.add(tuple(images.shape[2:]))
    found = validation_loss(stage, stage, unet, validation, run.config)
    assert len(sizes) > 1 and found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_previews_have_the_size_of_the_first_bucket(run: Run, number: int, one_process: None, tmp_path: Path) -> None:
    config = run.stages[number]
    stage, path = Stage(config, run.cascade.below(config.name)), tmp_path / "grid.png"
    assert sample_grid(stage, build_network(config.unet), run.data[0], run.config, path) is None
    width, height = Image.open(path).size
    assert width > 1.5 * height


def test_the_dry_run_plans_for_the_largest_bucket(run: Run) -> None:
    (wide, square, _), stage = run.sizes(run.stages[0]), run.stages[0]
    peaks = [measure(stage, 4, torch.float32, tokens=8, gpu=False, size=size).activations for size in (wide, square)]
    assert peaks[0] > peaks[1]
