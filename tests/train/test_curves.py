"""`fastimagen plot`: what its image shows, and what it says where there is nothing to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastimagen.cli import main
from fastimagen.train import curves
from fastimagen.train.averages import NOISE_BINS


def run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def training(stage: str, step: int, **values: Any) -> dict[str, Any]:
    shares = {f"time/{name}": 0.2 for name in curves.TIMES}
    losses = {"loss": 1 / step, **{f"loss/noise_{name}": 2 / step for name in NOISE_BINS}}
    numbers = {"grad_norm": 0.5, "lr": 1e-4, "images_per_s": 100.0}
    return {"stage": stage, "step": step, **losses, **numbers, **shares, **values}


class Panels:
    """Records what the figure's panels are given, while matplotlib draws them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.axes import Axes

        self.labels: list[str] = []
        self.points: dict[str, int] = {}
        plot = Axes.plot

        def remember(axes: Any, steps: Any, values: Any, *rest: Any, **style: Any) -> Any:
            self.labels.append(style.get("label"))
            self.points[style.get("label")] = len(steps)
            return plot(axes, steps, values, *rest, **style)

        monkeypatch.setattr(Axes, "plot", remember)


def test_all_stages_are_drawn_into_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    panels = Panels(monkeypatch)
    records = [training(stage, step) for stage in ("base", "sr") for step in range(1, 1201)]
    records += [{"stage": "base", "step": 600, "val_loss": 0.1}, {"stage": "sr", "step": 7, "skipped": "a reason"}]
    records[3]["grad_norm"] = None
    folder = run(tmp_path / "runs/mine", records)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ba')  # training writes it now
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/curves.png\nno records of: share of the peak rate\n"
    assert {"training", "validation (EMA)", "skipped steps (1)", "noise 0.98-1.00"} <= set(panels.labels)
    assert panels.points["training"] == 400, "1200 records are averaged in threes"
    with Image.open(folder / "curves.png") as image:
        assert image.width > 1200 and image.height > 800 and len(image.getcolors(1 << 20) or []) > 100


def test_an_older_or_partial_run_is_drawn_with_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", [{"stage": "base", "step": 5, "loss": 1.0, "lr": 0.0}])
    assert main(["plot", str(folder), "--out", str(tmp_path / "new/plot.png")]) == 0
    assert "no records of: loss by noise level, gradient norm, images / s," in capsys.readouterr().out
    assert (tmp_path / "new/plot.png").exists()


def test_points_are_means_of_groups() -> None:
    records = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    steps, values = curves._series(records, "loss")
    assert steps[:2] == [2, 4] and values[:2] == [1.5, 3.5] and len(steps) == 500


def test_nothing_to_draw_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for records, message in (
        (None, f"{tmp_path}/none has no metrics.jsonl: it is not a run directory, or has not begun to train"),
        ([], f"{tmp_path}/empty/metrics.jsonl has no records yet"),
        ([{"stage": "base", "step": 1, "read": 4}], f"{tmp_path}/bare/metrics.jsonl has no numbers to draw"),
    ):
        folder = Path(message.split(" ")[0].removesuffix("/metrics.jsonl"))
        if records is not None:
            run(folder, records)
        assert main(["plot", str(folder)]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"


def test_without_matplotlib_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(run(tmp_path / "run", [training("base", 1)]))]) == 1
    error = capsys.readouterr().err
    assert "fastimagen plot needs matplotlib: " in error and "pip install" in error and "plot" in error
