"""Averages of any length after training, and the snapshots that they are made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastimagen.config import EMAConfig
from fastimagen.train import checkpoint, power_average, snapshots
from fastimagen.train.ema import EMA
from fastimagen.train.reconstruct import average_of_length

SIZE, STEPS, EVERY, SKIPPED = 64, 600, 20, 3


class Training:
    """Weights that approach a goal with noise, averaged and saved as training does: two ranks, and skipped steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        goal, self.weights = torch.randn(2, SIZE, generator=generator)
        self.ema = EMA([self.weights], EMAConfig())
        self.history = []
        for step in range(1, STEPS + SKIPPED + 1):
            if step > SKIPPED:
                noise = torch.randn(SIZE, generator=generator)
                self.weights += 0.02 * (goal - self.weights) + 0.05 * noise
                self.history.append(self.weights.double())
                self.ema.update(step - SKIPPED)
            if step % EVERY == 0 or step == STEPS + SKIPPED:
                self.save(step)
                assert snapshots.rotate(folder, 2, None) == []

    def save(self, step: int) -> None:
        incomplete, half = self.folder / checkpoint.incomplete_name(step, "token"), SIZE // 2
        for rank in range(2):
            own = slice(half * rank, half * (rank + 1))
            values = {"weights": self.weights, **{name: shards[0] for name, shards in self.ema.powers.items()}}
            fragments = {f"{name}/w/{own.start}": value[own] for name, value in values.items()}
            checkpoint.write_rank(incomplete, rank, fragments)
        engine = {"parameters": {"w": [SIZE]}, "skipped_steps": SKIPPED}
        checkpoint.complete(incomplete, 2, engine, {"step": step})

    def tracked(self, sigma_rel: float, updates: int = STEPS) -> Tensor:
        """The average of this length over the first updates, float64: update s has the integral of (gamma + 1) x^gamma
        over [(s - 1) / n, s / n]."""
        power = power_average.gamma(sigma_rel) + 1
        edges = (torch.arange(updates + 1, dtype=torch.float64) / updates) ** power
        return (edges.diff()[:, None] * torch.stack(self.history[:updates])).sum(dim=0)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("stage"))


def newest(training: Training) -> Path:
    path = checkpoint.newest(training.folder)
    assert path is not None
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_the_two_tracked_averages_are_those_of_the_power_function(training: Training) -> None:
    for sigma_rel, name in power_average.QUANTITIES.items():
        (average,) = training.ema.powers[name]
        assert relative(average, training.tracked(sigma_rel)) < 1e-6
        weights, _ = average_of_length(newest(training), sigma_rel, pytest.fail)
        assert weights["w"].equal(average)


def test_the_length_is_the_standard_deviation_of_the_density() -> None:
    x = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for sigma_rel in (0.03, 0.1, 0.25):
        density = x ** power_average.gamma(sigma_rel)
        density /= density.sum()
        mean = (density * x).sum()
        assert (density * (x - mean) ** 2).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize(("sigma_rel", "accuracy"), [(0.07, 1e-3), (0.12, 1e-3), (0.04, 2e-3), (0.15, 4e-3)])
def test_any_length_is_made_of_the_snapshots(training: Training, sigma_rel: float, accuracy: float) -> None:
    """Next to the wrong lengths that a user could have kept instead, the error is small."""
    weights, how = average_of_length(newest(training), sigma_rel, pytest.fail)
    error, expected = relative(weights["w"], training.tracked(sigma_rel)), training.tracked(sigma_rel)
    others = min(relative(training.tracked(length), expected) for length in power_average.TRACKED)
    assert weights["w"].dtype == torch.float32 and "10 snapshots" in how
    assert error < accuracy and error < others / 5


def test_the_average_of_an_earlier_checkpoint_uses_nothing_later(training: Training) -> None:
    earlier = checkpoint.checkpoints(training.folder)[0]
    updates = snapshots.step_of(earlier) - SKIPPED
    weights, how = average_of_length(earlier, 0.07, pytest.fail)
    assert relative(weights["w"], training.tracked(0.07, updates)) < 1e-3 and "9 snapshots" in how


def test_lengths_that_the_snapshots_cannot_give_are_refused(training: Training) -> None:
    with pytest.raises(ValueError, match=r"length 0\.01 cannot be made of 10 snapshots.*length from 0\.03 to 0\.2"):
        average_of_length(newest(training), 0.01, pytest.fail)
    with pytest.raises(ValueError, match=r"between 0 and 0\.289, got 0\.3"):
        average_of_length(newest(training), 0.3, pytest.fail)


def test_snapshots_are_few_and_spread_over_the_training(training: Training) -> None:
    """They have the averages alone."""
    found = [snapshots.step_of(path) for path in snapshots.snapshots(training.folder)]
    assert len(found) == snapshots.MAX_SNAPSHOTS
    gaps = [after - before for before, after in zip([0, *found], [*found, STEPS])]
    assert max(gaps) <= 2 * STEPS / snapshots.MAX_SNAPSHOTS
    for path in snapshots.snapshots(training.folder):
        assert checkpoint.damage(path) is None
        assert sorted(file.name for file in path.iterdir()) == [
            "engine.json",
            "index.json",
            "rank-00000.averages.safetensors",
            "rank-00001.averages.safetensors",
            "state.json",
        ]


def test_a_damaged_snapshot_is_named_and_left_out(training: Training, tmp_path: Path) -> None:
    copy = tmp_path / "stage"
    shutil.copytree(training.folder, copy)
    broken = snapshots.snapshots(copy)[-2]
    file = broken / "rank-00001.averages.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    lines: list[str] = []
    weights, how = average_of_length(copy / newest(training).name, 0.07, lines.append)
    assert len(lines) == 1 and broken.name in lines[0] and "left out" in lines[0] and "9 snapshots" in how
    assert relative(weights["w"], training.tracked(0.07)) < 3e-3


def test_a_kill_while_a_checkpoint_becomes_a_snapshot_loses_nothing(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    copy = tmp_path / "stage"
    shutil.copytree(training.folder, copy)
    before = snapshots.snapshots(copy)
    removed = 0

    def unlink(path: Path) -> None:
        nonlocal removed
        removed += 1
        if removed == 2:
            raise Killed
        path.rename(tmp_path / f"{removed}")

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink)
        snapshots.rotate(copy, 1, None)
    assert snapshots.snapshots(copy) == before
    snapshots.clean(copy)
    assert len(snapshots.snapshots(copy)) == len(before) + 1
    assert not any(checkpoint.damage(path) for path in snapshots.snapshots(copy))
    assert not list(copy.glob(".*"))


def test_a_run_that_resumes_from_an_older_checkpoint_drops_later_snapshots(training: Training, tmp_path: Path) -> None:
    copy = tmp_path / "stage"
    shutil.copytree(training.folder, copy)
    last = snapshots.snapshots(copy)[-1]
    snapshots.remove_later(copy, snapshots.step_of(last))
    assert len(snapshots.snapshots(copy)) == snapshots.MAX_SNAPSHOTS
    snapshots.remove_later(copy, snapshots.step_of(last) - 1)
    assert len(snapshots.snapshots(copy)) == snapshots.MAX_SNAPSHOTS - 1 and not last.exists()
    snapshots.remove_later(copy, 0)
    assert snapshots.snapshots(copy) == []
