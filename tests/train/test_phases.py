"""Phases of training: what runs now, and the seconds of each phase."""

from __future__ import annotations

import pytest

from fastimagen.train import phases
from fastimagen.train.phases import Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only element; the test moves it."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    return now


def test_phases_add_up_to_the_whole_time(clock: list[float]) -> None:
    running = Phases()
    for phase, seconds in (("data", 1.0), ("forward", 2.0), ("data", 0.5), ("checkpoint", 4.0)):
        clock[0] += 0.25  # still in the phase before
        running.enter(phase)
        clock[0] += seconds
    taken = running.take_seconds()
    assert (taken["start"], taken["data"], taken["forward"], taken["checkpoint"]) == (0.25, 2.0, 2.25, 4.0)
    assert sum(taken.values()) == clock[0] - 100.0
    clock[0] += 3.0
    assert running.take_seconds() == dict.fromkeys(phases.PHASES, 0.0) | {"checkpoint": 3.0}


def test_the_current_phase_says_where_and_since_when(clock: list[float]) -> None:
    running = Phases()
    assert str(running.current) == "start"
    running.begin_stage("base")
    assert str(running.current) == "engine of base"
    clock[0] += 5.0
    running.enter("data", 7)
    clock[0] += 1.0
    running.take_seconds()  # counting does not restart the phase, or a watchdog would wait anew
    assert str(running.current) == "data of base step 7" and running.current.since == 105.0


def test_a_stage_enters_each_phase_once_for_the_first_time() -> None:
    running = Phases()
    running.begin_stage("base")
    running.enter("forward", 1)
    assert running.current.first
    running.enter("forward")
    assert not running.current.first
    running.begin_stage("sr")
    running.enter("forward", 1)
    assert running.current.first
