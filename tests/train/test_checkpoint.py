"""Checkpoints as folders: damage, retention, saves in a thread, agreement. test_two_ranks.py has two processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastimagen.train import checkpoint, checkpoint_writer, snapshots
from fastimagen.train.agreement import agree_on_checkpoint, agree_on_run_directory, on_first_rank
from fastimagen.train.checkpoint_writer import CheckpointWriter

AVERAGE = {"a.weight": torch.arange(12.0).view(3, 4), "b.bias": torch.arange(3.0) / 7}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_checkpoint(folder: Path, step: int, average: dict[str, Tensor] = AVERAGE, **state: Any) -> Path:
    """A checkpoint with averages alone, by two ranks with a part of every parameter each."""
    incomplete = folder / checkpoint.incomplete_name(step, "token")
    for rank in range(2):
        fragments = {}
        for name, weight in average.items():
            first, last = (weight.numel() * part // 2 for part in (rank, rank + 1))
            for quantity in ("ema", "ema_0.05"):
                fragments[f"{quantity}/{name}/{first}"] = weight.flatten()[first:last]
        checkpoint.write_rank(incomplete, rank, fragments)
    shapes = {name: list(weight.shape) for name, weight in average.items()}
    return checkpoint.complete(incomplete, 2, {"parameters": shapes}, {"step": step, **state})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- damage


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a rank's file is missing": lambda path: (path / "rank-00001.safetensors").unlink(),
    "a rank's file is truncated": lambda path: cut(path / "rank-00001.safetensors", 100),
    "a rank's file is empty": lambda path: cut(path / "rank-00000.safetensors", 0),
    "a bit of a weight is altered": lambda path: flip(path / "rank-00001.safetensors", -3),
    "a bit of the header is altered": lambda path: flip(path / "rank-00000.safetensors", 200),
    "a bit of a power-function average is altered": lambda path: flip(path / "rank-00000.averages.safetensors", -9),
    "a rank's power-function averages are missing": lambda path: (path / "rank-00001.averages.safetensors").unlink(),
    "a rank's file is that of another step": lambda path: shutil.copy(
        path.with_name("step-00000002") / "rank-00000.safetensors", path
    ),
    "the state is missing": lambda path: (path / "state.json").unlink(),
    "a bit of the state is altered": lambda path: flip(path / "state.json", 87),
    "the state of the engine is truncated": lambda path: cut(path / "engine.json", 20),
    "the index is missing": lambda path: (path / "index.json").unlink(),
    "the index is empty": lambda path: cut(path / "index.json", 0),
    "the index is truncated": lambda path: cut(path / "index.json", 200),
    "a bit of a checksum is altered": lambda path: flip(
        path / "index.json", 8 * (path / "index.json").read_text().index('"sha256": "') + 8 * 15
    ),
    "the folder is empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(name: str, tmp_path: Path) -> None:
    older, newer = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4, {"a.weight": -AVERAGE["a.weight"]})
    assert agree_on_checkpoint(tmp_path) == (newer, [])
    DAMAGES[name](newer)
    found, (line,) = agree_on_checkpoint(tmp_path)
    assert found == older
    assert line.startswith("step-00000004 is damaged: ") and "damaged-step-00000004" in line and "\n" not in line
    assert names(tmp_path) == ["damaged-step-00000004", "step-00000002"]
    assert agree_on_checkpoint(tmp_path) == (older, [])  # the next start
    write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path, 6)
    snapshots.rotate(tmp_path, 2, None)
    assert names(tmp_path) == ["damaged-step-00000004", "snapshot-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("file", ["index.json", "state.json", "engine.json", "rank-00000.safetensors"])
def test_no_bit_of_any_file_can_change_unseen(file: str, tmp_path: Path) -> None:
    """Except those of the index that mean the same in JSON: they change no name, size or checksum."""
    path = write_checkpoint(tmp_path, 2, {"a": torch.ones(3)}) / file
    content, index = path.read_bytes(), json.loads((path.parent / "index.json").read_text())
    for bit in range(0, 8 * len(content), 29):
        flip(path, bit)
        if checkpoint.damage(path.parent) is None:
            assert file == "index.json" and json.loads(path.read_text()) == index, bit
        path.write_bytes(content)


def test_a_run_without_an_intact_checkpoint_does_not_start_over(tmp_path: Path) -> None:
    for step in (2, 4):
        cut(write_checkpoint(tmp_path, step) / "rank-00000.safetensors", 10)
    for _ in range(2):  # nor does the next one
        with pytest.raises(ValueError, match=r"no checkpoint in .* is intact \(step-00000004: .*; step-0") as raised:
            agree_on_checkpoint(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_checkpoint_of_an_earlier_format_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "step-00000002/deepspeed").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"by an earlier fastimagen.*export it with that version"):
        agree_on_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000002"]
    index = write_checkpoint(tmp_path, 4) / "index.json"
    index.write_text(index.read_text().replace(checkpoint.FORMAT, "fastimagen.checkpoint.1"))
    with pytest.raises(ValueError, match=r"step-00000004 was written by an earlier fastimagen"):
        agree_on_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_whole_parameters_are_put_together_from_the_fragments(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2)
    found = checkpoint.read_average(path)
    assert found.keys() == AVERAGE.keys() and all(found[name].equal(AVERAGE[name]) for name in AVERAGE)
    engine = {"parameters": {"a.weight": [3, 5]}}
    (path / "engine.json").write_text(json.dumps(engine))
    with pytest.raises(ValueError, match=r"lacks 3 values of ema of a\.weight"):
        checkpoint.read_average(path)


# ---- retention


def test_the_last_every_nth_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {100: 0.5, 200: float("nan"), 300: 0.2, 400: 0.3, 500: None, 600: 0.4, 700: 0.4}
    for step, loss in losses.items():
        write_checkpoint(tmp_path, step, val_loss=loss)
        snapshots.rotate(tmp_path, 2, 400)
    left = [f"snapshot-{step:08d}" for step in (100, 200, 500)]
    assert names(tmp_path) == [*left, *(f"step-{step:08d}" for step in (300, 400, 600, 700))]
    best = checkpoint.best(tmp_path)
    assert best is not None and best.name == "step-00000300"


# ---- saves in a thread


class Saver(CheckpointWriter):
    """Saves the numbers 0, 1, 2 ... of one shard in place of an engine's state."""

    def save_numbers(self, step: int, size: int = 1000) -> None:
        from fastimagen.train.engine_state import Quantity
        from fastimagen.train.fragments import Fragment

        values = Quantity("ema", torch.arange(float(size)), [Fragment("a", 0, size, 0)])
        engine = SimpleNamespace(global_steps=step, global_samples=step, skipped_steps=0, optimizer=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_writer, "take", lambda *_: [values])
            self.save(engine, SimpleNamespace(shapes={"a": (size,)}), None, {"step": step})  # type: ignore[arg-type]


def test_a_save_that_fails_does_not_end_training_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, "token", keep=1, keep_every=None)
    saver.save_numbers(1)
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(checkpoint, "write_rank", lambda *_: (_ for _ in ()).throw(full))
        saver._join()
        saver.save_numbers(2)
        saver._join()
    line = saver.failure()
    assert line is not None and saver.failure() is None and saver.failures == 1
    assert "step 2" in line and "No space left on device" in line and "training continues" in line
    saver.save_numbers(3)
    saver.finish()
    assert names(tmp_path) == ["snapshot-00000001", "step-00000003"]
    assert checkpoint.read_average(tmp_path / "step-00000003")["a"].equal(torch.arange(1000.0))


def test_the_last_save_must_succeed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    saver = Saver(tmp_path / "file", "token", keep=1, keep_every=None)
    saver.save_numbers(1)
    with pytest.raises(OSError, match=r"cannot write the checkpoint of step 1 .* resume from the checkpoint before"):
        saver.finish()


def test_rank_0_gives_up_when_another_rank_never_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PATIENCE", 0.2)
    saver = Saver(tmp_path, "token", keep=1, keep_every=None)
    saver.world_size = 3
    saver.save_numbers(1)
    with pytest.raises(OSError, match=r"no report of ranks \[1, 2\]"):
        saver.finish()
    assert names(tmp_path) == []


# ---- agreement


def test_an_error_on_the_first_rank_is_raised(tmp_path: Path) -> None:
    assert on_first_rank(lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        on_first_rank((tmp_path / "missing").read_text)


def test_the_run_directory_is_left_as_it_was(tmp_path: Path) -> None:
    assert agree_on_run_directory(tmp_path) != agree_on_run_directory(tmp_path)
    assert names(tmp_path) == []
