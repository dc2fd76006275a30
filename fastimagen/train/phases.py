"""Phases of training on this rank: which one runs now, since when, and how many seconds each has taken."""

from __future__ import annotations

import itertools
import time
from typing import Any, Literal, NamedTuple, get_args

Phase = Literal[
    "start",  # process group, built-in shapes, text embeddings, choice of the checkpoint
    "engine",  # network, DeepSpeed's engine, loading a checkpoint
    "data",  # the next micro-batch
    "forward",
    "backward",
    "step",  # DeepSpeed's step, and EMA after it
    "log",
    "validation",
    "samples",  # preview grid
    "checkpoint",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Current(NamedTuple):
    """What a rank does now."""

    phase: Phase
    since: float
    """time.monotonic() at which the phase began."""
    stage: str
    """Name of the stage in training; "" before the first one."""
    step: int
    """The optimizer step in progress; 0 before the first one."""
    entered: int
    """How many phases have begun so far: at the same point of training the same number on all ranks."""
    first: bool
    """Whether the stage enters this phase for the first time, when kernels and torch.compile may still be compiled."""

    def __str__(self) -> str:
        where = f" of {self.stage} step {self.step}" if self.step else f" of {self.stage}" if self.stage else ""
        return f"{self.phase}{where}"


class Phases:
    """Told by the training loop what begins; asked by the metrics for seconds, by the watchdog for the current phase.

    All times are the host's and cost no host synchronisation. On a GPU a phase therefore holds the time in which the
    host issues its work, and where the host has to wait for the GPU, the time of work issued earlier. After
    `use_device_clock` the seconds are those of the GPU's own clock. The phases add up to the whole time. `current` is
    replaced as a whole, so other threads may read it.
    """

    def __init__(self) -> None:
        self.current = Current("start", time.monotonic(), "", 0, 0, True)
        self._entered: set[Phase] = {"start"}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._counted_until = self.current.since
        self._marks: list[tuple[Phase, Any]] | None = None

    def use_device_clock(self) -> None:
        """From now on `take_seconds` gives the time between the marks that the phases leave in the GPU's queue.

        What the GPU does for the host's phase "forward" then counts as forward, however early the host issued it, and
        "data" is the time in which the GPU has nothing to do because the host waits for data.
        """
        self._marks = []
        self._mark(self.current.phase)

    def begin_stage(self, stage: str) -> None:
        """Begin the phase "engine" of a stage."""
        self._entered = set()
        self._change("engine", stage, 0)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """End the current phase and begin another; `step` where an optimizer step begins."""
        self._change(phase, self.current.stage, self.current.step if step is None else step)

    def take_seconds(self) -> dict[Phase, float]:
        """Seconds by phase since the last call, the current phase so far included; all phases, also those at 0.

        With the device clock this waits for the GPU.
        """
        self._count(time.monotonic())
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken if self._marks is None else self._take_device_seconds()

    def _change(self, phase: Phase, stage: str, step: int) -> None:
        now = time.monotonic()
        self._count(now)
        self.current = Current(phase, now, stage, step, self.current.entered + 1, phase not in self._entered)
        self._entered.add(phase)
        self._mark(phase)

    def _count(self, now: float) -> None:
        self._seconds[self.current.phase] += now - self._counted_until
        self._counted_until = now

    def _mark(self, phase: Phase) -> None:
        if self._marks is not None:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))

    def _take_device_seconds(self) -> dict[Phase, float]:
        self._mark(self.current.phase)
        assert self._marks is not None
        taken, marks = dict.fromkeys(PHASES, 0.0), self._marks
        marks[-1][1].synchronize()
        for (phase, began), (_, ended) in itertools.pairwise(marks):
            taken[phase] += began.elapsed_time(ended) / 1000
        self._marks = marks[-1:]
        return taken
