"""README's recipe for the user's own images works as printed, from a folder of images to a sampled image.

The commands are taken from README.md and run in an empty folder, with grey images. Only the number of steps in the
configuration that `fastimagen init` writes is reduced, and the Hugging Face cache holds a small model under the name of
the encoder.
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

COMMIT = "c0ffee" + 34 * "0"
"""Of the encoder in the hub's cache: a run and its model name it, because a branch of the hub can change."""


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


@pytest.mark.slow
def test_the_recipe_goes_from_a_folder_of_grey_images_to_a_sampled_image(tmp_path: Path) -> None:
    captions = write_images(tmp_path / "my_images", count=40)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # init sizes the configuration for the machine
    }
    printed = {}
    for words in recipe():
        child = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, f"{shlex.join(words)}\n{child.stdout}\n{child.stderr}"
        printed[words[1]] = child.stdout + child.stderr
        if words[1] == "init":
            settings = shorten_training(tmp_path / option(words, "--out"))
            write_hub_encoder(tmp_path / "huggingface", settings["text"]["encoder"], captions)

    assert not (tmp_path / "data/shapes").exists()
    packed = next(option(words, "--out") for words in recipe() if words[1:3] == ["shards", "folder"])
    assert settings["data"] == {"shards": packed, "validation": {"count": 4}}
    assert [stage["size"] for stage in settings["cascade"]["stages"]] == [32, 64]
    assert "1, all images are grey" in printed["init"] and "not square" in printed["init"]
    assert "40 captions" in printed["embed"]
    image = Image.open(tmp_path / "samples/images/000000.png")
    assert image.size == (64, 64) and image.mode == "L"
    config, index = (
        json.loads((tmp_path / file).read_text()) for file in ("runs/mine/config.json", "my_model/model_index.json")
    )
    assert config["fastimagen"]["text"]["revision"] == index["text_encoder"]["revision"] == COMMIT
    losses = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in losses if "val_loss" in record} == {"base32", "sr64"}


def write_images(folder: Path, count: int) -> list[str]:
    """Grey JPEG and PNG images of several sizes in subfolders, with captions beside them; returns the captions."""
    generator = np.random.default_rng(0)
    captions = []
    for index in range(count):
        path = folder / f"album {index % 3}" / f"photo-{index:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(64, 120, 2)
        pixels = generator.integers(0, 256, (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".jpg" if index % 2 else ".png"))
        captions.append(f"a photo of cat number {index}, outdoors")
        path.with_suffix(".txt").write_text(captions[-1])
    return captions


def shorten_training(path: Path) -> dict[str, Any]:
    """Let the configuration train for two steps, and return its fastimagen section; everything else stays."""
    tree: dict[str, Any] = json.loads(path.read_text())
    tree["train_batch_size"] = 4
    settings = tree["fastimagen"]
    for stage in settings["cascade"]["stages"]:
        stage["sampling"]["steps"] = 2
    settings["train"]["steps"] = 2
    path.write_text(json.dumps(tree))
    return settings


def write_hub_encoder(home: Path, encoder: str, captions: list[str]) -> None:
    """A Hugging Face cache in which the encoder, a short name, is a small T5 of the right width."""
    from fastimagen.text.t5 import T5_NAMES
    from fastimagen.text.tiny_t5 import build_tiny_t5

    name, width = T5_NAMES[encoder]
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = build_tiny_t5(repository / "snapshots" / COMMIT, captions, dim=width, layers=1)
    (snapshot / "README.md").unlink()
    config = json.loads((snapshot / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("fastimagen")}
    (snapshot / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
