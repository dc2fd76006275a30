"""A trace of a few training steps for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..words import counted

WARM_UP = 5
"""Steps before the trace: the first ones compile kernels and choose algorithms."""


class StepProfiler:
    """Traces `count` steps of this process, after WARM_UP others, into the folder `profile` of the run directory.

    count 0: traces nothing. Call `step` after every training step.
    """

    def __init__(self, run_dir: Path, stage: str, count: int, say: Callable[[str], None]) -> None:
        self.folder, self.stage, self.count, self.say = run_dir / "profile", stage, count, say
        self._done = self._last = 0
        self._profile: torch.profiler.profile | None = None

    def step(self, step: int) -> None:
        """Start the trace after the last warm-up step, and write it after the last traced one. `step`: just ended."""
        if not self.count:
            return
        self._done, self._last = self._done + 1, step
        if self._done == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        elif self._profile and self._done == WARM_UP + self.count:
            self._write()

    def close(self) -> None:
        """Write the trace of a stage that ends too early; say so if it ends before the trace begins."""
        if self._profile:
            self._write()
        elif self.count and self._done < WARM_UP:
            self.say(f"{self.stage}: no trace, because it begins after {WARM_UP} steps")

    def _write(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        traced = self._done - WARM_UP
        path = self.folder / f"{self.stage}-step-{self._last - traced + 1:08d}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
            self.say(f"{self.stage}: trace of {counted(traced, 'step')} in {path}; open it in ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            self.say(f"{self.stage}: cannot write the trace {path}: {error}")
        self._profile = None
