"""Phases of training on this rank: which one runs now, since when, and how many seconds each has taken."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple, get_args

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
    host issues its work, and where the host has to wait for the GPU, the time of work issued earlier. The phases add
    up to the whole time. `current` is replaced as a whole, so other threads may read it.
    """

    def __init__(self) -> None:
        self.current = Current("start", time.monotonic(), "", 0, 0, True)
        self._entered: set[Phase] = {"start"}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._counted_until = self.current.since

    def begin_stage(self, stage: str) -> None:
        """Begin the phase "engine" of a stage."""
        self._entered = set()
        self._change("engine", stage, 0)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """End the current phase and begin another; `step` where an optimizer step begins."""
        self._change(phase, self.current.stage, self.current.step if step is None else step)

    def take_seconds(self) -> dict[Phase, float]:
        """Seconds by phase since the last call, the current phase so far included; all phases, also those at 0."""
        self._count(time.monotonic())
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _change(self, phase: Phase, stage: str, step: int) -> None:
        now = time.monotonic()
        self._count(now)
        self.current = Current(phase, now, stage, step, self.current.entered + 1, phase not in self._entered)
        self._entered.add(phase)

    def _count(self, now: float) -> None:
        self._seconds[self.current.phase] += now - self._counted_until
        self._counted_until = now
