"""The curves of a run from its metrics.jsonl: a column for each stage, a row for each kind of number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import import_extra
from .averages import NOISE_BINS, TRAINING

Record = dict[str, Any]
Series = tuple[list[int], list[float]]
"""Steps and values."""

MAX_POINTS = 500
"""Points of a curve; of more records, groups are averaged."""
TIMES = (*TRAINING, "other")
WIDTH, HEIGHT = 6.0, 2.1  # inches of a panel


def read_records(run: Path) -> dict[str, list[Record]]:
    """The records of each stage, in the order of their steps. Raises ValueError if there are none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl: it is not a run directory, or has not begun to train")
    stages: dict[str, list[Record]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed, or that is writing it now
        stages.setdefault(record["stage"], []).append(record)
    if not stages:
        raise ValueError(f"{path} has no records yet")
    return {stage: sorted(records, key=lambda record: record["step"]) for stage, records in stages.items()}


def draw_curves(run: Path, out: Path) -> list[str]:
    """Draw the curves of all stages into a PNG. Returns the names of the rows that had nothing to show.

    Raises ValueError as `read_records`, ImportError if matplotlib is missing, OSError if `out` cannot be written.
    """
    stages = read_records(run)
    import_extra("matplotlib", user="fastimagen plot", extra="plot")
    from matplotlib.figure import Figure

    rows = [(name, draw) for name, draw in ROWS.items() if any(_has(records, name) for records in stages.values())]
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl has no numbers to draw")
    size = (WIDTH * len(stages) + 1.6, HEIGHT * len(rows) + 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(f"Training of {run.resolve().name}", fontsize=13)
    panels = figure.subplots(len(rows), len(stages), squeeze=False, sharex="col")
    for column, (stage, records) in enumerate(stages.items()):
        for row, (name, draw) in enumerate(rows):
            panel = panels[row][column]
            draw(panel, records)
            panel.grid(True, color="0.9")
            panel.margins(x=0.01)
            if column == 0:
                panel.set_ylabel(name)
            if row == 0:
                panel.set_title(f'stage "{stage}", {records[-1]["step"]} steps', fontsize=11)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
            if not panel.has_data():
                panel.text(0.5, 0.5, "no records", ha="center", va="center", transform=panel.transAxes, color="0.5")
        panels[-1][column].set_xlabel("step")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return [name for name in ROWS if name not in dict(rows)]


# ---- rows


def _losses(panel: Any, records: Sequence[Record]) -> None:
    _curve(panel, _series(records, "loss"), "training", color="tab:blue")
    _curve(panel, _series(records, "val_loss"), "validation (EMA)", color="tab:orange", marker=".")
    skipped = [record["step"] for record in records if "skipped" in record]
    if skipped:
        at_bottom = {"transform": panel.get_xaxis_transform(), "color": "tab:red"}
        panel.plot(skipped, [0.03] * len(skipped), "|", label=f"skipped steps ({len(skipped)})", **at_bottom)
    _set_log(panel)


def _losses_by_noise(panel: Any, records: Sequence[Record]) -> None:
    for number, name in enumerate(NOISE_BINS):
        shade = 0.85 * number / (len(NOISE_BINS) - 1)
        _curve(panel, _series(records, f"loss/noise_{name}"), f"noise {name}", color=_viridis(shade))
    _set_log(panel)


def _time(panel: Any, records: Sequence[Record]) -> None:
    series = [_series(records, f"time/{name}") for name in TIMES]
    if series[0][0]:
        shares = [[100 * value for value in values] for _, values in series]
        colors = ("tab:red", "tab:blue", "tab:cyan", "tab:green", "0.8")
        panel.stackplot(series[0][0], *shares, labels=TIMES, colors=colors)
        panel.set_ylim(0, 100)


def _single(key: str, *, log: bool = False) -> Callable[[Any, Sequence[Record]], None]:
    """A row with one curve."""

    def draw(panel: Any, records: Sequence[Record]) -> None:
        _curve(panel, _series(records, key), None, color="tab:blue")
        if log:
            _set_log(panel)
        elif panel.has_data():
            panel.set_ylim(bottom=0)

    return draw


ROWS: Mapping[str, Callable[[Any, Sequence[Record]], None]] = {
    "loss": _losses,
    "loss by\nnoise level": _losses_by_noise,
    "gradient norm": _single("grad_norm", log=True),
    "learning rate": _single("lr"),
    "images / s": _single("images_per_s"),
    "share of\nthe peak rate": _single("mfu"),
    "time, %": _time,
}
"""Label -> what draws it."""
KEYS = {
    "loss": "loss",
    "loss by\nnoise level": "loss/noise_",
    "gradient norm": "grad_norm",
    "learning rate": "lr",
    "images / s": "images_per_s",
    "share of\nthe peak rate": "mfu",
    "time, %": "time/",
}
"""What the keys of a row begin with."""


def _has(records: Sequence[Record], row: str) -> bool:
    return any(key.startswith(KEYS[row]) for record in records for key in record)


def _series(records: Sequence[Record], key: str) -> Series:
    """The values of a key, averaged in groups if there are more than MAX_POINTS. Null is left out."""
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    size = -(-len(found) // MAX_POINTS) or 1
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [group[-1][0] for group in groups], [sum(value for _, value in group) / len(group) for group in groups]


def _curve(panel: Any, series: Series, label: str | None, **style: Any) -> None:
    steps, values = series
    if steps:
        style = {"marker": "." if len(steps) < 30 else "", "linewidth": 1.2, **style}
        panel.plot(steps, values, label=label, **style)


def _set_log(panel: Any) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib import ticker

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def _viridis(position: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](position)
