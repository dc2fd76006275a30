"""What the dry run says about memory, traffic and time; the study dry_run_memory compares it with measured peaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import fake_tensor

from fastimagen.cli import main
from fastimagen.config import StageConfig
from fastimagen.network_config import UNetConfig
from fastimagen.train import plan
from fastimagen.train.activations import Peaks, measure
from fastimagen.train.devices import DEVICES
from fastimagen.train.flops import Flops
from fastimagen.train.memory import process_memory
from fastimagen.train.plan import Target, plan_stage, target
from tests.conftest import ROOT

UNET = UNetConfig(text_dim=12, dim=16, dim_mults=(1, 2), heads=1, head_dim=16, stem_kernels=(3,))
STAGE = StageConfig(name="base", size=16, unet=UNET)
P, N = 1_000_000_000, 8  # parameters, processes
NO_PEAKS = Peaks(0, 0)


def deepspeed(stage: int = 1, kind: str = "AdamW", **keys: Any) -> dict[str, Any]:
    """A resolved configuration of four images per process in bf16."""
    zero = {"stage": stage, "reduce_bucket_size": 50_000_000, "overlap_comm": True, **keys.pop("zero", {})}
    return {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": kind, "params": {}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        **keys,
    }


def test_zero_shards_what_its_stage_says() -> None:
    """Rajbhandari et al. 2020, section 5: stage 1 shards 12 of 16 bytes per parameter, stage 3 all; each of
    three averages is 4 more."""
    for stage in (1, 2, 3):
        found = process_memory(deepspeed(stage), P, 0, NO_PEAKS, processes=N, gpu=True)
        assert found.master + found.moments + found.ema == (12 + 3 * 4) * P // N
    assert process_memory(deepspeed(1), P, 0, NO_PEAKS, processes=N, gpu=True).weights == 2 * P
    limited = deepspeed(3, zero={"stage3_max_live_parameters": 0})
    assert process_memory(limited, P, 0, NO_PEAKS, processes=N, gpu=True).weights == 2 * P // N


def test_offloading_leaves_weights_and_activations_on_the_gpu() -> None:
    here = process_memory(deepspeed(2), P, 0, Peaks(10**9, 2 * 10**9), processes=N, gpu=True)
    offloading = deepspeed(2, zero={"offload_optimizer": {"device": "cpu"}})
    there = process_memory(
        offloading,
        P,
        0,
        Peaks(10**9, 2 * 10**9),
        processes=N,
        gpu=True,
    )
    assert here.peak - there.peak == (12 + 3 * 4) * P // N
    assert there.host >= 16 * P // N and here.host == 0


def test_fp32_sums_of_bf16_gradients_are_whole_on_every_process() -> None:
    summed = deepspeed(1, gradient_accumulation_steps=4, data_types={"grad_accum_dtype": "fp32"})
    assert process_memory(summed, P, 0, NO_PEAKS, processes=N, gpu=True).backward >= 4 * P


def test_activations_grow_with_the_batch_and_shrink_with_recomputation() -> None:
    one, two = (measure(STAGE, batch, torch.bfloat16, tokens=8, gpu=True) for batch in (2, 4))
    assert one.activations == pytest.approx(two.activations / 2, rel=0.05)
    assert one.with_gradients > one.activations
    recomputing = STAGE.model_copy(update={"unet": UNET.model_copy(update={"checkpoint_levels": (0, 1)})})
    assert measure(recomputing, 4, torch.bfloat16, tokens=8, gpu=True).activations < 0.7 * two.activations


def test_activations_of_a_cpu_are_those_of_a_real_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counter around a pass that is computed."""
    planned = measure(STAGE, 2, torch.float32, tokens=8, gpu=False)
    monkeypatch.setattr(fake_tensor, "FakeTensorMode", lambda **_: nullcontext())
    monkeypatch.setattr(torch, "empty", torch.zeros)  # real numbers, of which a length is none
    assert measure(STAGE, 2, torch.float32, tokens=8, gpu=False) == planned


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs and activations as constants."""
    monkeypatch.setattr(plan, "measure", lambda *_, **__: Peaks(10**8, 10**9))
    monkeypatch.setattr(plan, "stage_flops", lambda *_: Flops(10**12, 3 * 10**12, 10**11))


def test_traffic_and_time_follow_zero_and_the_gpu(counted: None) -> None:
    h100, l4 = target(N, "h100"), target(N, "l4")
    plans = {stage: plan_stage(STAGE, deepspeed(stage), 100, h100) for stage in (1, 3)}
    weights = 2 * plans[1].parameters * (N - 1) / N
    assert plans[1].reduced == pytest.approx(weights) and plans[1].gathered == pytest.approx(weights, abs=1)
    assert plans[3].gathered == pytest.approx(2 * weights, abs=1)  # for the forward and for the backward pass
    assert plans[1].checkpoint == 24 * plans[1].parameters
    seconds = plan_stage(STAGE, deepspeed(1), 100, l4).seconds
    assert seconds is not None and plans[1].seconds is not None and seconds > plans[1].seconds
    assert plans[1].seconds == pytest.approx(4 * 3.1e12 / (0.4 * 989e12), rel=0.01)  # with what is recomputed


def test_a_gpu_that_is_not_known_is_refused_with_the_table() -> None:
    with pytest.raises(ValueError, match=r'--gpu "h1000" is not in the table: a100, .*h100.*, or cpu'):
        target(8, "h1000")
    with pytest.raises(ValueError, match="--gpus needs --gpu: a100"):
        target(8, None)
    with pytest.raises(ValueError, match="--gpus must be at least 1, got 0"):
        target(0, "h100")
    assert target(2, "cpu") == Target(2, "cpu")


def test_the_dry_run_prints_the_table(
    toy_config: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(write_config({**toy_config, "train_batch_size": 64}))]
    assert main([*arguments, "--dry-run", "--gpus", "16", "--gpu", "h100"]) == 0
    output = capsys.readouterr().out
    table = output.partition("16 x H100 SXM")[2]
    assert table.split("\n", 1)[0].split() == ["base", "sr"]
    for label in (
        "parameters",
        "TFLOP per image, forward",
        "EMA and power averages",
        "at most, of 79.1",
        "GB sent",
        "ms per step",
    ):
        assert label in table
    assert "40% of the peak rate" in table
    assert main([*arguments, "--gpu", "h100"]) != 0
    assert "--gpu and --gpus are for --dry-run" in capsys.readouterr().err


def test_a_stage_that_does_not_fit_is_named(counted: None) -> None:
    where = Target(1, "cuda", DEVICES["h100"]._replace(memory=0.001))
    lines = plan.table([plan_stage(STAGE, deepspeed(1, train_batch_size=4), 100, where)], where)
    assert lines[-1].startswith("base does not fit into 0.001 GiB: lower train_micro_batch_size_per_gpu")


def test_measured_peaks_are_within_a_tenth() -> None:
    """Of the committed result of benchmarks/studies/dry_run_memory.py."""
    rows = json.loads((ROOT / "benchmarks/results/dry_run_memory.json").read_text())["rows"]
    assert rows
    assert all(abs(row["difference"]) <= 0.1 for row in rows)
