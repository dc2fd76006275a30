"""`fastimagen init`: what it sees in the images, what it proposes for them and for a machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastimagen.cli import main
from fastimagen.config import StageConfig
from fastimagen.config_file import config_from_dict, load_config
from fastimagen.data.packing.folder import pack_folder
from fastimagen.data.survey import Survey, survey
from fastimagen.presets import minimagen_test
from fastimagen.train.activations import Peaks
from fastimagen.train.plan import Target, plan_stage
from fastimagen.train.proposal import DEEPSPEED, SIZES, USABLE_SHARE, Machine, micro_batch, propose, stage_sizes
from fastimagen.train.stage_setup import plan
from tests.page_checks import WRITTEN_BY_INIT

CPU = Machine(0)


def write_images(
    folder: Path, sizes: list[tuple[int, int]], *, grey: bool, caption: str = "a house by the sea"
) -> Path:
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 1 if grey else 3), dtype=np.uint8)
        Image.fromarray(pixels.repeat(3, axis=2) if grey else pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def seen(**changes: Any) -> Survey:
    figures: dict[str, Any] = dict(
        packed=False,
        count=50_000,
        uncaptioned=0,
        shorter_sides=(1200,) * 100,
        square_share=0.5,
        kept_area=0.8,
        grey=False,
        caption="a house",
        most_words=20,
        foreign_letters=0.0,
    )
    return Survey(**figures | changes)


def pretend_activations(patch: Any, size: Callable[[StageConfig], int]) -> None:
    """Have init take size(stage) bytes for the activations of an image, without measuring the large networks."""
    patch.setattr("fastimagen.train.proposal.measure", lambda stage, *_, **__: Peaks(size(stage), 0))


def test_a_folder_its_manifest_and_its_shards_look_alike(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [(40, 20), (20, 20), (30, 60), (80, 80)], grey=True)
    (folder / "alone.jpg").write_bytes((folder / "0.png").read_bytes())
    found = survey(folder)
    assert (found.count, found.uncaptioned, found.shorter_sides) == (4, 1, (20, 20, 30, 80))
    assert (found.square_share, found.kept_area, found.grey, found.most_words) == (0.5, 0.75, True, 5)
    lines = [json.dumps({"image": f"images/{n}.png", "caption": "a house by the sea"}) for n in range(4)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    pack_folder(folder, tmp_path / "shards")
    for source in (tmp_path / "list.jsonl", tmp_path / "shards"):
        other = survey(source)
        assert other.packed == (source.name == "shards")
        assert (other.count, other.shorter_sides, other.grey) == (4, found.shorter_sides, True)
    assert not survey(write_images(tmp_path / "colour", [(64, 64)], grey=False)).grey


def test_captions_that_t5_cannot_read_are_said(tmp_path: Path) -> None:
    found = survey(write_images(tmp_path / "images", [(64, 64)], grey=False, caption="海辺の家, a house"))
    assert 0.3 < found.foreign_letters < 0.5
    reasons = propose(found, CPU, shards="s", run="r").reasons
    assert any("letters in captions are not Latin" in reason for _, reason in reasons)


@pytest.mark.parametrize("machine", [CPU, Machine(1, 11.6, "A"), Machine(6, 24, "B"), Machine(8, 79, "C")], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_proposal_is_a_configuration_that_trains(machine: Machine, size: int, monkeypatch: Any) -> None:
    pretend_activations(monkeypatch, lambda stage: stage.size * 2**20)
    proposal = propose(seen(), machine, shards="data/mine", run="runs/mine", size=size)
    cascade, _ = plan(config_from_dict(proposal.content))
    assert [stage.size for stage in cascade.stages] == stage_sizes(size)
    train = proposal.content["fastimagen"]["train"]
    assert train["steps"] > 0
    assert set(train.get("stages", {})) == ({stage.name for stage in cascade.stages} if machine.gpus else set())
    for name, settings in train.get("stages", {}).items():
        assert set(settings) == {"deepspeed"}, "steps of a stage would hide --set fastimagen.train.steps"
        micro = settings["deepspeed"]["train_micro_batch_size_per_gpu"]
        assert proposal.content["train_batch_size"] % (micro * machine.gpus) == 0, name


def test_sizes_fit_the_images_and_the_machine(monkeypatch: Any) -> None:
    def final(found: Survey, machine: Machine) -> int:
        with monkeypatch.context() as patch:
            pretend_activations(patch, lambda stage: 1)
            content = propose(found, machine, shards="s", run="r").content
        return content["fastimagen"]["cascade"]["stages"][-1]["size"]

    assert final(seen(shorter_sides=(100,) * 9), CPU) == 64
    assert final(seen(shorter_sides=(10, 20, 40, 700)), CPU) == 32
    assert final(seen(shorter_sides=(200,) * 9), Machine(1, 24)) == 128
    assert final(seen(), Machine(1, 24)) == 256
    pretend_activations(monkeypatch, lambda stage: stage.size * 2**20)
    small, large = (propose(seen(), Machine(1, gib), shards="s", run="r", size=256) for gib in (3, 80))
    batches = [
        [
            stage["deepspeed"]["train_micro_batch_size_per_gpu"]
            for stage in p.content["fastimagen"]["train"]["stages"].values()
        ]
        for p in (small, large)
    ]
    assert all(fewer < more for fewer, more in zip(*batches))


def test_the_images_at_a_time_fit_by_the_estimate_of_the_dry_run() -> None:
    stage = minimagen_test(64).stages[0]

    def peak(micro: int) -> int:
        deepspeed = DEEPSPEED | {"train_micro_batch_size_per_gpu": micro, "train_batch_size": 2 * micro}
        return plan_stage(stage, deepspeed, 1, Target(1, "cuda")).memory.peak

    usable = USABLE_SHARE * 4 * 2**30
    micro = micro_batch(stage, 4.0, 1024)
    assert 1 < micro < 1024 and peak(micro) <= usable < peak(2 * micro)


def test_the_command_writes_configuration_and_reasons(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("my images"), [(90, 70), (70, 70)], grey=False)
    assert main(["init", "my images"]) == 0
    printed, notes = capsys.readouterr().out, Path("mine.md").read_text()
    assert "fastimagen shards folder 'my images' --out data/mine" in printed and "--dry-run" in printed
    assert "--captions 'a house by the sea'" in notes and "`dim_mults`: Channels of each" in notes
    settings = load_config(WRITTEN_BY_INIT).fastimagen
    assert settings.data.shards == "data/mine" and settings.data.validation.count == 1
    assert '"dim_mults": [1, 1]' in Path("mine.json").read_text()
    for arguments, message in (
        (["my images"], "mine.json exists: choose another file with --out"),
        (
            ["my images", "--out", "other.json", "--size", "100"],
            "--size must be one of 32, 64, 128, 256, 512, 1024, got 100",
        ),
        (["nowhere", "--out", "other.json"], "nowhere is not a tar, folder"),
    ):
        assert main(["init", *arguments]) == 1
        assert message in capsys.readouterr().err
    Path("my images/0.txt").unlink()
    Path("my images/1.txt").write_text(" ")
    assert main(["init", "my images", "--out", "other.json"]) == 1
    assert "found 2 images, but none has a caption" in capsys.readouterr().err
    assert not Path("other.json").exists()
