"""README's recipe for the user's own images works as printed, from a folder of images to a sampled image.

The commands are taken from README.md and run in an empty folder. Only the size of the networks and the number of steps
in the recipe's configuration are reduced, and the Hugging Face cache holds a small model under the name of the encoder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

TOY_UNET = {
    "dim": 8,
    "dim_mults": [1, 2],
    "groups": 4,
    "num_blocks": 0,
    "heads": 1,
    "head_dim": 16,
    "cond_dim": 16,
    "self_attention": False,
    "cross_attention": [False, True],
}
TOY_SIZES = {"base64": {"size": 8}, "sr256": {"size": 32, "crop": 16}}


def recipe() -> list[list[str]]:
    """The commands of README's section on own images, as words, without the installation."""
    section = re.search(r"^## Train on your own images\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.M)
    assert section, "README.md has no section on own images"
    block = re.search(r"^```bash\n(.*?)^```$", section[1], re.DOTALL | re.M)
    assert block
    commands = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    return [words for words in commands if words and words[0] not in ("source", "pip")]


def option(command: list[str], name: str) -> str:
    """The value of an option of a command."""
    return command[command.index(name) + 1]


def test_the_recipe_reads_the_users_images() -> None:
    """Every command that reads a configuration names one file, which reads what `shards folder` packs."""
    commands = recipe()
    packed = next(Path(option(words, "--out")) for words in commands if words[1:3] == ["shards", "folder"])
    configs = {option(words, "--config") for words in commands if "--config" in words}
    assert len(configs) == 1
    settings = json.loads((ROOT / configs.pop()).read_text())["fastimagen"]
    assert settings["data"]["shapes"] is None
    assert (Path(settings["data"]["shards"]), Path(settings["data"]["validation"])) == (
        packed / "train",
        packed / "val",
    )
    assert not Path(settings["text"]["encoder"]).parts[1:], "the encoder is named as on the hub, not a local folder"
    assert not any("--set" in words for words in commands)


@pytest.mark.slow
def test_the_recipe_goes_from_a_folder_of_images_to_a_sampled_image(tmp_path: Path) -> None:
    captions = write_images(tmp_path / "my_images", count=40)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (config_path,) = {option(words, "--config") for words in recipe() if "--config" in words}
    reduce_sizes(tmp_path / config_path)
    write_hub_encoder(tmp_path / "huggingface", captions)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for words in recipe():
        child = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, f"{shlex.join(words)}\n{child.stdout}\n{child.stderr}"
        printed.append(child.stdout + child.stderr)

    assert not (tmp_path / "data/shapes").exists()
    assert len(list((tmp_path / "data/mine/train").glob("*.tar"))) == 1
    assert len(list((tmp_path / "data/mine/val").glob("*.tar"))) == 1
    assert "40 captions" in printed[1]
    image = Image.open(tmp_path / "samples/images/000000.png")
    assert image.size == (32, 32)
    losses = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in losses if "val_loss" in record} == {"base64", "sr256"}


def write_images(folder: Path, count: int) -> list[str]:
    """JPEG and PNG images of several sizes in subfolders, with captions beside them; returns the captions."""
    generator = np.random.default_rng(0)
    captions = []
    for index in range(count):
        path = folder / f"album {index % 3}" / f"photo-{index:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(32, 90, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".jpg" if index % 2 else ".png"))
        captions.append(f"a photo of cat number {index}, outdoors")
        path.with_suffix(".txt").write_text(captions[-1])
    return captions


def reduce_sizes(path: Path) -> None:
    """Make the recipe's configuration trainable within seconds; data, text encoder and run directory stay."""
    tree: dict[str, Any] = json.loads(path.read_text())
    tree["train_batch_size"] = 4
    settings = tree["fastimagen"]
    for stage in settings["cascade"]["stages"]:
        kept = {key: stage["unet"][key] for key in ("text_dim", "lowres", "downsample_first") if key in stage["unet"]}
        stage |= {**TOY_SIZES[stage["name"]], "unet": TOY_UNET | kept}
        stage["sampling"]["steps"] = 2
        settings["train"]["stages"][stage["name"]]["steps"] = 2
    path.write_text(json.dumps(tree))


def write_hub_encoder(home: Path, captions: list[str]) -> None:
    """A Hugging Face cache in which the recipe's encoder is a small T5 of the right width."""
    from fastimagen.text.t5 import T5_NAMES
    from fastimagen.text.tiny_t5 import build_tiny_t5

    (config_path,) = {option(words, "--config") for words in recipe() if "--config" in words}
    name, width = T5_NAMES[json.loads((ROOT / config_path).read_text())["fastimagen"]["text"]["encoder"]]
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "c0ffee" + 34 * "0"
    snapshot = build_tiny_t5(repository / "snapshots" / commit, captions, dim=width, layers=1)
    (snapshot / "README.md").unlink()
    config = json.loads((snapshot / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("fastimagen")}
    (snapshot / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
