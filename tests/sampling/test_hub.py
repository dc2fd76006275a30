"""Models on the hub: shared, loaded by name and revision, offline. The real huggingface_hub talks to a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastimagen.cli import main
from fastimagen.sampling.pipeline import ImagenPipeline
from tests.conftest import ROOT
from tests.hub_server import Hub, running_hub

huggingface_hub = pytest.importorskip("huggingface_hub")

# Shares a model under two revisions, loads both by name, and loads one again without a network. In a process of its
# own, because huggingface_hub reads the address of the hub when it is imported.
SHARE = """
import json, sys
import torch
from fastimagen import ImagenPipeline

model = sys.argv[1]
pipe = ImagenPipeline.from_pretrained(model)
shown = {"url": pipe.push_to_hub("someone/toy")}
pipe.to(dtype="bfloat16").push_to_hub("someone/toy", private=True, revision="half")

again = ImagenPipeline.from_pretrained("someone/toy")
out = again("a small blue star", seed=3)
shown["source"], shown["recorded"] = again.source, out.record["model"]
torch.save(out.images, sys.argv[2])

half = ImagenPipeline.from_pretrained("someone/toy", revision="half")
shown["half"] = half.source
for name, revision in (("someone/gone", None), ("someone/toy", "nowhere")):
    try:
        ImagenPipeline.from_pretrained(name, revision=revision)
    except ValueError as error:
        shown[f"{name} {revision}"] = str(error)
try:
    pipe.push_to_hub("closed/toy")
except ValueError as error:
    shown["closed"] = str(error)
import huggingface_hub
huggingface_hub.constants.HF_HUB_OFFLINE = True
assert ImagenPipeline.from_pretrained("someone/toy").source == again.source
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def test_a_shared_model_is_loaded_by_its_name_and_samples_the_same(hub: Hub, toy_model: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_token",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    images = tmp_path / "images.pt"
    child = subprocess.run(
        [sys.executable, "-c", SHARE, toy_model, images], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    shown = json.loads(child.stdout.splitlines()[-1])

    branches = hub.repositories["someone/toy"]
    assert shown["url"] == f"{hub.url}/someone/toy/commit/{branches['main']}"
    assert shown["source"] == shown["recorded"] == f"someone/toy@{branches['main']}"
    assert shown["half"] == f"someone/toy@{branches['half']}"
    pushed = hub.commits[branches["main"]]
    expected = {str(path.relative_to(toy_model)): path for path in toy_model.rglob("*") if path.is_file()}
    assert set(pushed) - {".gitattributes"} == set(expected)
    assert pushed["base/config.json"] == expected["base/config.json"].read_bytes()
    assert len(hub.commits[branches["half"]]["base/model.safetensors"]) < 0.7 * len(pushed["base/model.safetensors"])
    own = ImagenPipeline.from_pretrained(toy_model)("a small blue star", seed=3)
    assert torch.equal(torch.load(images), own.images)

    for asked, where in (("someone/gone None", "someone/gone"), ("someone/toy nowhere", 'at revision "nowhere"')):
        assert "there is no folder someone/" in shown[asked] and where in shown[asked] and "\n" not in shown[asked]
    assert shown["closed"].startswith("cannot upload ") and " as closed/toy: 403 " in shown["closed"]


def test_a_folder_is_never_looked_up_on_the_hub(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(toy_model)
    monkeypatch.chdir(tmp_path)
    assert ImagenPipeline.from_pretrained("runs/mine").source == "runs/mine"
    with pytest.raises(ValueError, match=r'^revision "main" is for a model on the hub, but runs/mine is a folder'):
        ImagenPipeline.from_pretrained("runs/mine", revision="main")
    with pytest.raises(ValueError, match=r"^runs/other/model is not a model directory"):
        ImagenPipeline.from_pretrained("runs/other/model")


def test_without_huggingface_hub_the_error_says_what_to_install(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["sample", "--model", "runs/mine", "--captions", "a"]) == 1
    assert main(["push", "--model", str(toy_model), "--to", "someone/toy"]) == 1
    command = "pip install --editable '.[hub]'"
    assert capsys.readouterr().err.splitlines() == [
        f"error: there is no folder runs/mine; a model from the hub needs huggingface_hub: {command}",
        f"error: sharing a model on the hub needs huggingface_hub: {command}",
    ]


def test_without_a_network_the_error_is_one_line(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise huggingface_hub.errors.HTTPError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    assert main(["push", "--model", str(toy_model), "--to", "someone/toy"]) == 1
    expected = f"error: cannot upload {toy_model} as someone/toy: Name or service not known\n"
    assert capsys.readouterr().err == expected


def test_only_model_directories_and_full_names_are_shared(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "--model", str(tmp_path), "--to", "someone/toy"]) == 1
    assert main(["push", "--model", str(toy_model), "--to", "toy"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "is not a model directory" in first and second == "error: toy is no name on the hub: give OWNER/NAME"
