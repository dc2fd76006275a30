"""Toy data, a toy model and toy configurations, shared by all tests. Session fixtures must not be modified."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastimagen.config import CascadeConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run several processes on few cores: idle threads would spin
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent

TOY_UNET = dict(
    dim=8,
    dim_mults=[1, 2],
    groups=4,
    heads=1,
    head_dim=16,
    stem_kernels=[3],
    text_dim=64,
    cond_dim=16,
    self_attention=[False, True],
    cross_attention=[False, True],
)
TOY_TRANSFORMER = dict(
    kind="pixel_transformer", patch=4, dim=32, depth=2, heads=2, text_dim=64, rotary_range=4, zero_init=False
)
TOY_STAGES = [
    {"name": "base", "size": 8, "unet": TOY_UNET, "sampling": {"steps": 2, "guidance": 2.0}},
    {
        "name": "sr",
        "size": 16,
        "crop": 8,
        "unet": {**TOY_UNET, "lowres": True, "downsample_first": True},
        "augmentation": {"train_range": [0.0, 0.5]},
        "sampling": {"steps": 2, "guidance": 1.0},
    },
]


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 16x16 shapes, their text encoder and their embedding cache."""
    from fastimagen.config import FastimagenConfig
    from fastimagen.data.embedding import embed_all
    from fastimagen.data.prepare import prepare_shapes

    folder = tmp_path_factory.mktemp("toy") / "shapes"
    config = FastimagenConfig.model_validate(toy_tree(folder)["fastimagen"])
    prepare_shapes(config, say=lambda line: None)
    embed_all(config, say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def toy_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built-in text encoder."""
    return write_toy_encoder(tmp_path_factory.mktemp("encoder") / "text_encoder")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, toy_encoder: Path) -> Path:
    """A model directory with random weights that contains its text encoder."""
    return write_toy_model(tmp_path_factory.mktemp("toy_model") / "model", toy_encoder)


def toy_tree(data: Path) -> dict[str, Any]:
    """The content of a ds.json that trains in seconds on a CPU. data: the folder of `toy_data`."""
    return copy.deepcopy(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 1e-3}},
            "gradient_clipping": 1.0,
            "fastimagen": {
                "cascade": {"stages": TOY_STAGES},
                "data": {
                    "shards": str(data / "train"),
                    "validation": str(data / "val"),
                    "shapes": {"count": 64, "size": 16},
                },
                "text": {"encoder": str(data / "text_encoder")},
                "train": {
                    "steps": 6,
                    "log_every": 1,
                    "checkpoint_every": 2,
                    "validate_every": 3,
                    "validation_samples": 16,
                    "sample_every": 6,
                    "sample_count": 2,
                    "stages": {"base": {"deepspeed": {"optimizer": {"type": "Muon"}, "gradient_clipping": 0.0}}},
                },
            },
        }
    )


@pytest.fixture
def toy_config(toy_data: Path) -> dict[str, Any]:
    return toy_tree(toy_data)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A function that writes a ds.json and returns its path."""

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(tree))
        return path

    return write


def toy_cascade(**base: Any) -> CascadeConfig:
    """The toy cascade without zero initialization, so that an untrained output depends on the input.

    base: changes to the first stage.
    """
    from fastimagen.config import CascadeConfig

    stages = copy.deepcopy(TOY_STAGES)
    for stage in stages:
        stage["unet"]["zero_init"] = False
    stages[0] |= base
    return CascadeConfig.model_validate({"stages": stages})


def one_level_cascade() -> CascadeConfig:
    """The toy cascade with one level, one block and both attentions a network: torch.compile traces it in seconds."""
    from fastimagen.config import CascadeConfig

    level = {"dim_mults": [1], "num_blocks": 0, "self_attention": True, "cross_attention": True}
    stages = [{**stage, "unet": {**stage["unet"], **level, "zero_init": False}} for stage in TOY_STAGES]
    return CascadeConfig.model_validate({"stages": stages})


def write_toy_model(path: Path, encoder: Path | None = None, config: CascadeConfig | None = None) -> Path:
    """Write a model directory with random weights, the same every time, and a copy of the text encoder if given."""
    import torch

    from fastimagen.cascade import Cascade
    from fastimagen.sampling.model_directory import write_model

    config = config or toy_cascade()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unets = Cascade(config).unets
    reference = encoder and {"name": "text_encoder", "revision": None, "max_length": 32, "included": True}
    return write_model(
        path,
        config,
        {name: unet.state_dict() for name, unet in unets.items()},
        text_encoder=reference,
        encoder_folder=encoder,
        card="# toy\n",
    )


def write_toy_encoder(path: Path) -> Path:
    """Write the built-in text encoder with a tokenizer for the quickstart's captions."""
    from fastimagen.text.tiny_t5 import build_tiny_t5

    return build_tiny_t5(path, (ROOT / "launch/captions.txt").read_text().splitlines())
