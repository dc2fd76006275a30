"""Requests to stop: signals in every phase, agreement between ranks, what a supervisor asks for."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch import nn

from fastimagen.train import engine, preemption
from fastimagen.train.exit_status import STATUS_FILE, STOP_FILE, record
from fastimagen.train.peers import Member, Peers
from fastimagen.train.phases import Phases
from fastimagen.train.preemption import StopRequest, TrainingInterrupted


def training() -> Phases:
    """In the middle of a step."""
    phases = Phases()
    phases.begin_stage("base")
    phases.enter("data", 1)
    return phases


def all_peers(count: int) -> list[Peers]:
    """Several ranks that are this process."""
    store, members = dist.HashStore(), [Member.this(rank) for rank in range(count)]
    return [Peers(store, rank, members, "here:0") for rank in range(count)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_the_run_and_the_old_handlers_are_restored(number: signal.Signals) -> None:
    calls = [0]
    before = {known: signal.signal(known, lambda *_: calls.append(1)) for known in StopRequest.SIGNALS}
    handlers = {known: signal.getsignal(known) for known in StopRequest.SIGNALS}
    try:
        with pytest.raises(RuntimeError), StopRequest(None, training()) as stop:
            assert stop.should_stop() is None
            os.kill(os.getpid(), number)
            assert stop.should_stop() == number.name and calls == [0]
            assert stop.should_stop() == number.name  # until the end
            raise RuntimeError("the run fails")
        assert {known: signal.getsignal(known) for known in StopRequest.SIGNALS} == handlers
        os.kill(os.getpid(), number)
        assert calls == [0, 1]
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def test_an_interrupt_that_the_watchdog_saw_first_is_not_a_second_one() -> None:
    with StopRequest(None, training()) as stop:
        stop.request("SIGINT")  # as `watch` does in the watchdog's thread
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop() == "SIGINT"


def test_a_second_interrupt_exits_immediately() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest(None, training()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("prepare", [lambda phases: None, lambda phases: phases.begin_stage("sr")])
def test_before_training_a_signal_interrupts_at_once(prepare: Callable[[Phases], None]) -> None:
    phases = Phases()
    prepare(phases)
    with pytest.raises(TrainingInterrupted, match=r"SIGUSR1: stopped in .*, before a step"), StopRequest(None, phases):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_while_deepspeed_starts_is_not_called_a_refused_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize, set_optimizer_flags=None))
    with pytest.raises(TrainingInterrupted, match=r"^SIGTERM: stopped in"), StopRequest(None, Phases()):
        engine.make_engine(nn.Linear(1, 1), {}, muon=set())


def test_torchs_public_function_sets_the_time_out_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since torch 2.14: every process would print a warning about the old one."""
    given: list[timedelta] = []
    monkeypatch.setattr(dist, "set_timeout", given.append, raising=False)
    engine._set_timeout(timedelta(seconds=5))
    assert given == [timedelta(seconds=5)]


def test_a_signal_is_noticed_while_the_main_thread_is_in_a_call() -> None:
    """A collective does not return, so Python does not run the handler; its C part has written the number to a pipe."""
    with StopRequest(None, training()) as stop:
        os.write(stop._written, bytes([signal.SIGTERM]))
        thread = threading.Thread(target=stop.watch, args=(5.0,))
        thread.start()
        thread.join(5.0)
        assert stop.reason == "SIGTERM"


def test_the_file_of_the_supervisor_is_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    with StopRequest(None, training()) as stop:
        stop.watch(0.0)
        assert stop.should_stop() is None
        (tmp_path / "stop").touch()
        stop.watch(0.0)
        assert stop.should_stop() == "the supervisor was told to stop"
    assert record(75) == 75 and (tmp_path / "status").read_text() == "75\n"


@pytest.mark.parametrize("told", [0, 1, 2])
def test_all_ranks_stop_after_the_same_step(told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run up to a step ahead of each other, one of which gets a signal in the middle."""
    monkeypatch.setattr(preemption, "AGREEMENT_SECONDS", 1e-4)
    stops = [StopRequest(peers, training()) for peers in all_peers(3)]
    stopped: dict[int, int] = {}
    for step in range(1, 500):
        if step == 100:
            stops[told].request("SIGTERM")
            stops[told].peers.request_stop("SIGTERM (rank 1)")
        if step == 103:  # the others hear of it a little later
            for stop in stops:
                stop.from_other_rank(stop.peers.look([])[1] or "")
        for rank in (0, 2, 1):
            reason = stops[rank].should_stop()
            if reason:
                assert "SIGTERM" in reason
                stopped[rank] = step
        if stopped:
            break
    assert stopped.keys() == {0, 1, 2} and step < 200


def test_the_ranks_agree_rarely_where_steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    (peers,) = all_peers(1)
    stop = StopRequest(peers, training())
    for _ in range(1000):
        now[0] += 0.01
        assert stop.should_stop() is None
    assert stop._agreements < 35 and stop._next_agreement - stop._steps <= 50
