"""What a checkpoint contains beside weights and moments: counters, learning rate schedule, loss scale, step counts."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastimagen.train import engine_state
from fastimagen.train.engine import choose_accelerator


def fake_engine(*, scheduler: str | None = None, lr: float = 1e-3, scaler: Any = None) -> Any:
    """The attributes of a DeepSpeed engine that the counters are read from, with its real schedule and loss scaler."""
    choose_accelerator()
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    params: dict[str, Any] = {"warmup_num_steps": 10, "warmup_max_lr": lr, "warmup_type": "linear"}
    made = None
    if scheduler == "WarmupLR":
        made = lr_schedules.WarmupLR(optimizer, **params)
    elif scheduler == "StepLR":
        made = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    engine = SimpleNamespace(global_steps=0, global_samples=0, skipped_steps=0, micro_steps=0, lr_scheduler=made)
    engine.gradient_accumulation_steps = lambda: 3
    engine.optimizer = SimpleNamespace(param_groups=optimizer.param_groups, loss_scaler=scaler, inner=optimizer)
    return engine


def take_steps(engine: Any, steps: int) -> None:
    for _ in range(steps):
        engine.optimizer.inner.step()
        if engine.lr_scheduler:
            engine.lr_scheduler.step()
        engine.global_steps += 1


def resumed(engine: Any, new: Any) -> Any:
    engine_state._set_counters(new, json.loads(json.dumps(engine_state.counters(engine))))
    return new


@pytest.mark.parametrize("scheduler", ["WarmupLR", "StepLR"])
def test_the_next_step_has_the_rate_of_the_undisturbed_run(scheduler: str) -> None:
    engine = fake_engine(scheduler=scheduler)
    take_steps(engine, 5)
    new = resumed(engine, fake_engine(scheduler=scheduler))
    assert new.global_steps == 5 and new.micro_steps == 15
    for _ in range(4):
        rates = [run.optimizer.param_groups[0]["lr"] for run in (engine, new)]
        assert rates[0] == rates[1] > 0
        take_steps(engine, 1)
        take_steps(new, 1)


def test_a_schedule_acts_with_the_settings_of_this_run_and_from_this_step() -> None:
    engine = fake_engine(scheduler="WarmupLR")
    take_steps(engine, 6)
    doubled = resumed(engine, fake_engine(scheduler="WarmupLR", lr=2e-3))
    assert doubled.optimizer.param_groups[0]["lr"] == pytest.approx(2 * engine.optimizer.param_groups[0]["lr"])
    constant = fake_engine()
    take_steps(constant, 6)
    constant.skipped_steps = 2
    added = resumed(constant, fake_engine(scheduler="WarmupLR"))
    assert added.lr_scheduler.last_batch_iteration == 3  # of 4 steps that were taken, counted from 0


def test_the_loss_scale_goes_on_where_it_was() -> None:
    choose_accelerator()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    def dynamic() -> Any:
        return DynamicLossScaler(2.0**16, 3, 1.0, 2, False, dtype=torch.half)

    scaler = dynamic()
    for _ in range(2):
        scaler.update_scale(False)
    scaler.cur_hysteresis, scaler.cur_scale = 1, 2.0**14
    new = resumed(fake_engine(scaler=scaler), fake_engine(scaler=dynamic())).optimizer.loss_scaler
    assert (new.cur_scale, new.cur_iter, new.cur_hysteresis) == (2.0**14, 2, 1)
    static = resumed(fake_engine(scaler=scaler), fake_engine(scaler=LossScaler(128.0)))
    assert static.optimizer.loss_scaler.loss_scale == 128.0


def test_steps_are_counted_as_the_optimizer_does() -> None:
    """torch's optimizers add to a tensor, DeepSpeed's pass an int to C++; Muon leaves vectors to another optimizer."""
    weight = torch.nn.Parameter(torch.zeros(2))

    def count(inner: Any) -> Any:
        engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner), device=torch.device("meta"))
        return engine_state._number_type(engine)(7.0)

    of_torch = torch.optim.AdamW([weight])
    of_deepspeed = SimpleNamespace(aux_optimizer=None)
    assert count(of_torch).equal(torch.tensor(7.0)) and count(SimpleNamespace(aux_optimizer=of_torch)).item() == 7
    assert count(of_deepspeed) == 7 and type(count(of_deepspeed)) is int
    fused = torch.optim.AdamW([weight], fused=True)
    assert count(fused).device.type == "meta"  # beside the weights
