"""metrics.jsonl, the console line and DeepSpeed's monitors: one record, shown three ways."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Metrics:
    """Writes records on rank 0; on other ranks it does nothing.

    A resumed run first drops the lines of its stage that lie beyond the checkpoint, so that no step stands twice.
    """

    def __init__(self, run_dir: Path, *, stage: str, steps: int, start: int, rank: int, monitor: Any) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.stage, self.steps, self.rank, self.monitor = stage, steps, rank, monitor
        self.bar = None
        if rank == 0:
            _drop_after(self.path, stage, start)
            self.file = open(self.path, "a")
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)

    def write(self, step: int, **values: Any) -> None:
        """One record of `step`: {"stage", "step", "time", **values}."""
        if self.rank:
            return
        record = {"stage": self.stage, "step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        if self.monitor.enabled:
            self.monitor.write_events([(f"{self.stage}/{key}", value, step) for key, value in numbers.items()])
        self.say(f"{self.stage} {step}/{self.steps}  " + "  ".join(_show(key, value) for key, value in numbers.items()))

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if self.rank == 0:
            self.bar.write(line) if self.bar else print(line, flush=True)

    def advance(self) -> None:
        """One step done."""
        if self.bar:
            self.bar.update()

    def close(self) -> None:
        """Flush and close; the object is of no use afterwards."""
        if self.rank == 0:
            self.file.close()
            if self.bar:
                self.bar.close()


def _show(key: str, value: float) -> str:
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def _drop_after(path: Path, stage: str, start: int) -> None:
    """Keep the lines of other stages and those up to step `start`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut in two: its step is beyond the checkpoint
        if record["stage"] != stage or record["step"] <= start:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept))
    os.replace(aside, path)


class MetricAverager:
    """Sums since the last record: loss on the device, without waiting for it, and time spent waiting for data.

    A checkpoint keeps the sums of all processes, so that the next record of a resumed run is what it would have been.
    """

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0) -> None:
        self.loss = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self.steps = steps
        self.images, self.data_wait, self.since = 0, 0.0, time.perf_counter()

    @classmethod
    def resume(cls, device: torch.device, state: dict[str, Any], rank: int) -> MetricAverager:
        """The window that `state()` described, as this process had it."""
        return cls(device, state["loss_sums"][rank], state["steps"])

    def add(self, loss: Tensor, images: int, data_wait: float) -> None:
        """One optimizer step: mean loss over its images on this process."""
        self.loss += loss.detach().double()
        self.steps += 1
        self.images += images
        self.data_wait += data_wait

    def state(self) -> dict[str, Any]:
        """The sums of all processes, by rank. Every process calls it."""
        sums: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(sums, self.loss.item())
        return {"loss_sums": sums, "steps": self.steps}
