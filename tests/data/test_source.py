"""Configurations whose data and text encoder do not belong together are refused before anything is written."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastimagen.config import FastimagenConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.embedding import embed_all
from fastimagen.data.prepare import check_data, encoder_width, prepare_encoder, prepare_shapes
from fastimagen.data.source import open_split
from fastimagen.train.trainer import Trainer


def own_data(tree: dict[str, Any], toy_data: Path, folder: Path) -> dict[str, Any]:
    """The toy configuration with shards that are not the built-in shapes."""
    for split in ("train", "val"):
        shutil.copytree(toy_data / split, folder / split, ignore=shutil.ignore_patterns("*.safetensors"))
    tree["fastimagen"]["data"] |= {"shards": str(folder / "train"), "validation": str(folder / "val")}
    return tree


def section(tree: dict[str, Any]) -> FastimagenConfig:
    return config_from_dict(tree).fastimagen


def refused(tree: dict[str, Any], run_dir: Path, *parts: str) -> None:
    """Assert that embedding and training, with its dry run, are refused in one line that contains `parts`."""
    for command in (
        lambda: embed_all(section(tree), say=print),
        lambda: prepare_shapes(section(tree), say=print) or embed_all(section(tree), say=print),
        lambda: Trainer(config_from_dict(tree), run_dir),
    ):
        with pytest.raises(ValueError) as raised:
            command()
        assert "\n" not in str(raised.value)
        for part in parts:
            assert part in str(raised.value)
    assert not run_dir.exists()


def test_the_built_in_shapes_are_accepted_with_and_without_rendering(toy_config: dict[str, Any]) -> None:
    check_data(section(toy_config))
    data = toy_config["fastimagen"]["data"]
    data["shapes"] = None
    check_data(section(toy_config))
    data["shards"], data["validation"] = [f"{data['shards']}/*.tar"], f"{data['validation']}/{{00000..00000}}.tar"
    check_data(section(toy_config))


def test_shapes_and_encoder_that_are_not_written_yet_are_accepted(toy_config: dict[str, Any], tmp_path: Path) -> None:
    settings = toy_config["fastimagen"]
    settings["data"] |= {"shards": str(tmp_path / "new/train"), "validation": str(tmp_path / "new/val")}
    settings["text"]["encoder"] = str(tmp_path / "new/text_encoder")
    check_data(section(toy_config))
    assert encoder_width(section(toy_config)) == 64
    assert list(tmp_path.iterdir()) == []


def test_a_trained_encoder_is_accepted_for_any_data_and_not_replaced(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy_config["fastimagen"]["text"]["encoder"] = "t5_small"
    assert encoder_width(section(toy_config)) == 512
    prepare_shapes(section(toy_config), say=print)
    assert list(tmp_path.iterdir()) == []  # no built-in encoder of that name
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"]["shapes"] = None
    check_data(section(tree))


def test_rendering_shapes_with_other_shards_says_what_to_change(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    advice = "set fastimagen.data.shapes to null and fastimagen.text.encoder to a trained T5 (t5_small ... xxl1.1, or"
    refused(tree, tmp_path / "run", f"but {tmp_path}/mine/train contains other shards: {advice}")
    tree["fastimagen"]["data"]["shards"] = [str(tmp_path / "mine/train/00000.tar")]
    refused(tree, tmp_path / "run", "renders the built-in shapes into FOLDER/train, but fastimagen.data.shards", advice)


@pytest.mark.parametrize("changed", ["shards", "validation"])
def test_the_random_text_encoder_is_refused_for_other_data(
    changed: str, toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    kept = "validation" if changed == "shards" else "shards"
    shapes = toy_config["fastimagen"]["data"][kept]
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"] |= {"shapes": None, kept: shapes}
    source = tree["fastimagen"]["data"][changed]
    message = (
        f"has random weights and works with the built-in shapes only, not with {source}: set fastimagen.text.encoder"
    )
    refused(tree, tmp_path / "run", message, "t5_small ... xxl1.1")
    assert not list((tmp_path / "mine").rglob("*.safetensors"))


def test_a_missing_text_encoder_names_the_key_and_the_allowed_names(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"]["shapes"] = None
    del tree["fastimagen"]["text"]  # the default
    missing = (
        "fastimagen.text.encoder: there is no folder data/shapes/text_encoder: set it to a trained T5 (t5_small ..."
    )
    refused(tree, tmp_path / "run", missing)


def test_a_cascade_without_text_needs_no_text_encoder(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"]["shapes"] = None
    tree["fastimagen"]["text"]["encoder"] = "./missing"
    for stage in tree["fastimagen"]["cascade"]["stages"]:
        stage["unet"] |= {"text_dim": None, "cross_attention": False}
        stage["sampling"] |= {"guidance": 1.0}
    check_data(section(tree))
    with pytest.raises(ValueError, match=r"fastimagen.text.encoder: there is no folder ./missing"):
        embed_all(section(tree), say=print)


def test_missing_shards_name_the_key_and_the_command_that_packs_them(
    toy_config: dict[str, Any], tmp_path: Path
) -> None:
    data = toy_config["fastimagen"]["data"]
    train, data["shapes"], data["validation"] = data["shards"], None, str(tmp_path.parent / "none/val")
    with pytest.raises(
        ValueError, match=r"fastimagen.data.validation: no shards: .*none/val .*; set it to null to train"
    ):
        open_split(section(toy_config).data.data_sets[1], section(toy_config), with_text=True)
    data["shards"], data["validation"] = str(tmp_path / "none"), train
    with pytest.raises(
        ValueError, match=r"fastimagen.data.shards: no shards: .*; pack .* with: fastimagen shards folder"
    ):
        open_split(section(toy_config).data.data_sets[0], section(toy_config), with_text=False)


def test_random_weights_are_built_from_own_captions_and_refuse_what_they_cannot_read(
    toy_config: dict[str, Any], toy_data: Path, tmp_path: Path
) -> None:
    tree = own_data(toy_config, toy_data, tmp_path / "mine")
    tree["fastimagen"]["data"] |= {"shapes": None, "validation": None}
    tree["fastimagen"]["text"] = {"encoder": str(tmp_path / "encoder"), "random_weights": True}
    said: list[str] = []
    prepare_encoder(section(tree), say=said.append)
    prepare_encoder(section(tree), say=said.append)  # it is there
    assert len(said) == 1 and "building a text encoder from 64 captions (random weights)" in said[0]
    report = embed_all(section(tree), say=said.append)
    assert report.captions == 64 and report.unknown == 0
    Trainer(config_from_dict(tree), tmp_path / "run")
    with tarfile.open(tmp_path / "mine/train/other.tar", "w") as tar:
        for name, content in (("a.png", b"rubbish"), ("a.txt", "ein roter Kreis, 象".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(
        ValueError, match=r"no tokens for characters of 1 of 65 captions, such as 'ein roter Kreis, 象'"
    ):
        embed_all(section(tree), say=said.append)
