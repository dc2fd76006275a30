"""The learning rate of each optimizer step, set before the step: a function of the configuration and the step's number.

DeepSpeed 0.19.8 advances a scheduler after each step, starting two iterations early: the first two steps of a warm-up
from 0 would run at 0, and the rate that it reports after a step is that of the next one.
"""

from __future__ import annotations

from typing import Any


def set_learning_rate(engine: Any, update: int) -> float:
    """Set and return the rate of optimizer step `update`, counted from 1 without skipped steps: that of the first
    parameter group (with Muon, the matrices').

    The warm-up runs at iterations 1, 2, ... of the scheduler, because its iteration 0 is a rate of 0; what follows it
    one iteration behind, because a linear decay ends in a rate of 0 after its last step.
    """
    scheduler = engine.lr_scheduler
    if scheduler is not None:
        warmup_steps = getattr(scheduler, "warmup_num_steps", 0)
        scheduler.step(update if update <= warmup_steps else update - 1)
    return engine.get_lr()[0]
