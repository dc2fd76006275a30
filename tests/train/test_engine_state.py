"""What a checkpoint contains beside weights and moments: counters, loss scale, steps of the optimizer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch

from fastimagen.train import engine_state
from fastimagen.train.engine import choose_accelerator


def fake_engine(scaler: Any, *, steps: int = 0, skipped: int = 0) -> Any:
    """The attributes of a DeepSpeed engine that the counters are read from."""
    return SimpleNamespace(
        global_steps=steps,
        global_samples=8 * steps,
        skipped_steps=skipped,
        micro_steps=3 * steps,
        gradient_accumulation_steps=lambda: 3,
        optimizer=SimpleNamespace(loss_scaler=scaler),
    )


def resumed(engine: Any, new: Any) -> Any:
    engine_state._set_counters(new, json.loads(json.dumps(engine_state.counters(engine))))
    return new


def test_counters_and_loss_scale_go_on_where_they_were() -> None:
    choose_accelerator()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    def dynamic() -> Any:
        return DynamicLossScaler(2.0**16, 3, 1.0, 2, False, dtype=torch.half)

    scaler = dynamic()
    for _ in range(2):
        scaler.update_scale(False)
    scaler.cur_hysteresis, scaler.cur_scale = 1, 2.0**14
    new = resumed(fake_engine(scaler, steps=5, skipped=2), fake_engine(dynamic()))
    assert (new.global_steps, new.global_samples, new.skipped_steps, new.micro_steps) == (5, 40, 2, 15)
    restored = new.optimizer.loss_scaler
    assert (restored.cur_scale, restored.cur_iter, restored.cur_hysteresis) == (2.0**14, 2, 1)
    static = resumed(fake_engine(scaler), fake_engine(LossScaler(128.0)))
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
