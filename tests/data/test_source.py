"""Configurations whose data and text encoder do not belong together are refused before anything is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastimagen.config import FastimagenConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.source import check_data, embed_all
from fastimagen.train.trainer import Trainer


def own_data(tree: dict[str, Any], toy_data: Path, folder: Path) -> dict[str, Any]:
    """The toy configuration with shards that are not the built-in shapes."""
    for split in ("train", "val"):
        shutil.copytree(toy_data / split, folder / split, ignore=shutil.ignore_patterns("*.safetensors"))
    tree["fastimagen"]["data"] |= {"shards": str(folder / "train"), "validation": str(folder / "val")}
    return tree


def section(tree: dict[str, Any]) -> FastimagenConfig:
    return config_from_dict(tree).fastimagen


def test_the_built_in_shapes_are_accepted_with_and_without_rendering(toy_config: dict[str, Any]) -> None:
    check_data(section(toy_config))
    toy_config["fastimagen"]["data"]["shapes"] = None
    check_data(section(toy_config))


def test_rendering_shapes_with_other_shards_says_what_to_change(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"mine/train contains other shards: set fastimagen.data.shapes to") as raised:
        check_data(section(tree))
    assert "fastimagen.text.encoder to a trained T5 (t5_small ... xxl1.1" in str(raised.value)
    tree["fastimagen"]["data"]["shards"] = [str(tmp_path / "mine/train/00000.tar")]
    with pytest.raises(ValueError, match=r"fastimagen.data.shapes renders FOLDER/train"):
        check_data(section(tree))


def test_the_random_text_encoder_is_refused_for_other_data(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"]["shapes"] = None
    with pytest.raises(
        ValueError, match=r"has random weights and is for the built-in shapes only: set fastimagen.text"
    ):
        embed_all(section(tree), say=print)
    with pytest.raises(ValueError, match="has random weights"):
        Trainer(config_from_dict(tree), tmp_path / "run")  # the dry run too
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "mine").rglob("*.safetensors"))
