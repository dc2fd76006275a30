"""Metrics: each record goes to metrics.jsonl, to the console and to DeepSpeed's monitors."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from .monitors import Monitors
from .record_file import RecordFile

MIN_LAG = 0.05
"""A rank that costs a smaller share of the time than this is not worth a word on the console."""


class Metrics:
    """Writes records on rank 0 and does nothing on other ranks.

    monitor: the engine's. A resumed run first calls `drop_later_records`.
    """

    def __init__(self, run_dir: Path, *, stage: str, steps: int, start: int, rank: int, monitor: Any) -> None:
        self.stage, self.steps, self.start, self.rank = stage, steps, start, rank
        self.bar = None
        self._paced: tuple[int, float] | None = None  # step and time of the first record: later ones give the pace
        if rank == 0:
            self.file = RecordFile(run_dir / "metrics.jsonl", self.say)
            self.monitors = Monitors(monitor, f"{run_dir.name}/{stage}", self.say)
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)

    def drop_later_records(self, *, keep_validation: bool = True) -> None:
        """Remove the records of the stage that are later than the step it starts from, so that no step is recorded
        twice; without keep_validation also the validation of that step. Rank 0 calls it. Raises OSError."""
        self.file.drop_after(self.stage, self.start, keep_validation=keep_validation)

    def write(self, step: int, **values: Any) -> None:
        """Write one record: {"stage", "step", "time", **values}. Numbers that are not finite become null."""
        if self.rank:
            return
        values = {key: None if _not_finite(value) else value for key, value in values.items()}
        self.file.append({"stage": self.stage, "step": step, "time": round(time.time(), 3), **values})
        numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
        self.monitors.write({f"{self.stage}/{key}": value for key, value in numbers.items()}, step)
        self.say(console_line(f"{self.stage} {step}/{self.steps}", values))

    def show_grid(self, step: int, path: Path) -> None:
        """Give a preview grid to the monitors that take images."""
        if self.rank == 0:
            self.monitors.write_image(f"{self.stage}/samples", path, step)

    def seconds_left(self, step: int) -> dict[str, float]:
        """{"eta_s": seconds that the rest of the stage will take}; {} for the first record, which has the time of
        compiling in it. Everything is counted: validation, preview grids and checkpoints too."""
        now = time.monotonic()
        if self._paced is None:
            self._paced = (step, now)
            return {}
        first, since = self._paced
        return {"eta_s": round((now - since) / (step - first) * (self.steps - step), 1)}

    def say(self, line: str) -> None:
        """Print a line on the console, above the progress bar if there is one."""
        if self.rank == 0:
            self.bar.write(line) if self.bar else print(line, flush=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.bar:
            self.bar.update()

    def close(self) -> None:
        """Close the monitors and the progress bar."""
        if self.rank == 0:
            self.file.close()
            self.monitors.close()
            if self.bar:
                self.bar.close()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


# ---- the console


def console_line(head: str, values: dict[str, Any]) -> str:
    """One line of a record for a reader: what changes from record to record, and what is not as it should be."""
    if "skipped" in values:
        named = f": {', '.join(values['samples'])}" if values.get("samples") else ""
        scale = f", loss scale {values['loss_scale']:g}" if "loss_scale" in values else ""
        return f"{head}  step skipped: {values['skipped']}{scale}{named}"
    parts = [head]
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("val_loss", "val_loss {:.5f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad {:.3g}"),
        ("images_per_s", "{:.4g} images/s"),
        ("mfu", "{:.0%} of peak"),
        ("time/data", "data {:.0%}"),
        ("memory_gib", "{:.1f} GiB"),
    ):
        if values.get(key) is not None:
            parts.append(text.format(values[key]))
    shares = [(key.removeprefix("share/"), share) for key, share in values.items() if key.startswith("share/")]
    if shares:
        parts.append(", ".join(f"{name} {share:.0%}" for name, share in shares))
    if "eta_s" in values:
        parts.append(f"{duration(values['eta_s'])} left")
    if values.get("slowest_rank_lag", 0) >= MIN_LAG:
        parts.append(f"waits {values['slowest_rank_lag']:.0%} for rank {values['slowest_rank']}")
    for key in ("bad", "skipped_steps", "checkpoint_failures"):
        if values.get(key):
            parts.append(f"{key} {values[key]}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """59 s, 12 min, 3 h 25 min, 4 d 7 h."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
