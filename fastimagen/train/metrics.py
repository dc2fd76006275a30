"""Metrics: each record goes to metrics.jsonl, to the console and to DeepSpeed's monitors."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..files import atomic_file
from .run_lock import shared_lock


class Metrics:
    """Writes records on rank 0 and does nothing on other ranks.

    A resumed run first removes the records of its stage that are later than the checkpoint, so that no step is recorded
    twice.
    """

    def __init__(self, run_dir: Path, *, stage: str, steps: int, start: int, rank: int, monitor: Any) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.stage, self.steps, self.rank, self.monitor = stage, steps, rank, monitor
        self.bar = None
        if rank == 0:
            with shared_lock(run_dir, "metrics"):
                _drop_after(self.path, stage, start)
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)

    def write(self, step: int, **values: Any) -> None:
        """Write one record: {"stage", "step", "time", **values}."""
        if self.rank:
            return
        record = {"stage": self.stage, "step": step, "time": round(time.time(), 3), **values}
        with shared_lock(self.path.parent, "metrics"), open(self.path, "a") as file:  # another stage may replace it
            file.write(json.dumps(record) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        if self.monitor.enabled:
            self.monitor.write_events([(f"{self.stage}/{key}", value, step) for key, value in numbers.items()])
        self.say(f"{self.stage} {step}/{self.steps}  " + "  ".join(_show(key, value) for key, value in numbers.items()))

    def say(self, line: str) -> None:
        """Print a line on the console, above the progress bar if there is one."""
        if self.rank == 0:
            self.bar.write(line) if self.bar else print(line, flush=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.bar:
            self.bar.update()

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar:
            self.bar.close()


def _show(key: str, value: float) -> str:
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def _drop_after(path: Path, stage: str, start: int) -> None:
    """Keep the records of other stages and those up to step `start`; remove an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a kill interrupted its write, so its step is later than the checkpoint
        if record["stage"] != stage or record["step"] <= start:
            kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept))


class MetricAverager:
    """Averages since the last record: the loss, summed on the device without host synchronisation, and the data wait.

    A checkpoint contains the sums of all ranks, so that the next record of a resumed run is that of an uninterrupted
    one."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0) -> None:
        self.loss = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self.steps = steps
        self.images, self.data_wait, self.since = 0, 0.0, time.perf_counter()

    @classmethod
    def resume(cls, device: torch.device, state: dict[str, Any], rank: int) -> MetricAverager:
        """The averager of this rank from `state()`. Ranks of another number each get the mean of the sums."""
        sums = state["loss_sums"]
        own = sums[rank] if len(sums) == dist.get_world_size() else sum(sums) / len(sums)
        return cls(device, own, state["steps"])

    def add(self, loss: Tensor, images: int, data_wait: float) -> None:
        """Add an optimizer step: mean loss of this rank, images of all ranks, seconds spent waiting for data."""
        self.loss += loss.detach().double()
        self.steps += 1
        self.images += images
        self.data_wait += data_wait

    def state(self) -> dict[str, Any]:
        """The sums of all ranks. All ranks call it."""
        sums: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(sums, self.loss.item())
        return {"loss_sums": sums, "steps": self.steps}
