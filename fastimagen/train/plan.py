"""What a run will need, known before it is paid for: parameters, FLOPs, memory, traffic and time of each stage."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..config import StageConfig
from ..network_config import LoraConfig
from ..networks.build import build_network
from ..networks.parameters import muon_parameters
from ..sizes import ImageSize
from ..text.embeddings import LENGTH_MULTIPLE
from ..words import counted
from .activations import measure
from .devices import DEVICES, Device, Precision
from .flops import Flops, stage_flops
from .memory import AVERAGES, Memory, accumulates_apart, moments_per_weight, process_memory, weight_bytes
from .power_average import TRACKED
from .snapshots import MAX_SNAPSHOTS

GIB = 2**30
UTILISATION = 0.4
"""Share of a GPU's peak rate that the estimated time assumes. Not measured: benchmarks/ has the step of your GPU."""
GPUS_PER_NODE = 8
NODE_LINK, PCIE, ETHERNET = 350.0, 25.0, 12.5
"""GB/s for the collectives of a GPU: between nodes with a 400 Gbit/s adapter for each GPU; inside a node without
NVLink; between such nodes, with one adapter of 100 Gbit/s."""
UPDATE_BYTES = 28 + 12 * AVERAGES
"""Memory traffic of an optimizer step for each weight: read and write master and moments, and read the gradient; for
each average read the weight, and read and write the average."""

Resolve = Callable[[StageConfig, int, str], tuple[dict[str, Any], list[str]]]
"""resolve(stage, processes, "cuda" or "cpu"): the stage's DeepSpeed configuration, and a line for each decision."""


class Target(NamedTuple):
    """The processes of a run, and the GPU of each; None is a CPU, or a GPU that is not in the table."""

    processes: int
    device: str
    gpu: Device | None = None


def this_machine() -> Target:
    """The processes that the launcher started, on what this machine has."""
    return Target(int(os.environ.get("WORLD_SIZE", "1")), "cuda" if torch.cuda.is_available() else "cpu")


def target(gpus: int | None, gpu: str | None) -> Target:
    """The target of --gpus and --gpu. Raises ValueError for a GPU that is not in the table, and for less than one."""
    if gpus is not None and gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if gpu is None:
        raise ValueError(f"--gpus needs --gpu: {', '.join(DEVICES)}, or cpu")
    if gpu == "cpu":
        return Target(gpus or 1, "cpu")
    if gpu not in DEVICES:
        raise ValueError(f'--gpu "{gpu}" is not in the table: {", ".join(DEVICES)}, or cpu')
    return Target(gpus or 1, "cuda", DEVICES[gpu])


class StagePlan(NamedTuple):
    """What a stage needs. trained: parameters that are not frozen. reduced, gathered: bytes that a process sends in a
    step, to reduce gradients and to gather weights.

    checkpoint, snapshots: bytes on the disk, of one checkpoint and of all snapshots. seconds: of a step, None without
    rates of the device.
    """

    name: str
    parameters: int
    trained: int
    flops: Flops
    steps: int
    deepspeed: dict[str, Any]
    memory: Memory
    reduced: int
    gathered: int
    checkpoint: int
    snapshots: int
    seconds: float | None


def plan_stage(
    stage: StageConfig,
    deepspeed: dict[str, Any],
    steps: int,
    where: Target,
    lora: LoraConfig | None = None,
    buckets: Sequence[ImageSize] = (),
) -> StagePlan:
    """Count and measure a stage, of which `lora` trains adapters alone. Seconds for the largest U-Nets; nothing is
    computed.

    buckets: sizes of the images, of which the largest is counted and measured, unless the stage trains on crops."""
    with torch.device("meta"):
        unet = build_network(stage.unet, lora)
    sizes = {name: weight.numel() for name, weight in unet.named_parameters() if weight.requires_grad}
    parameters, muon = sum(sizes.values()), sum(sizes[name] for name in muon_parameters(unet))
    frozen = sum(weight.numel() for weight in unet.parameters() if not weight.requires_grad)
    tokens = min(LENGTH_MULTIPLE, stage.unet.max_text_length)
    width, gpu = weight_bytes(deepspeed), where.device == "cuda"
    dtype = torch.bfloat16 if width == 2 else torch.float32
    size = max(buckets, key=math.prod) if buckets and stage.crop is None else None
    micro_batch = deepspeed["train_micro_batch_size_per_gpu"]
    peaks = measure(stage, micro_batch, dtype, tokens=tokens, gpu=gpu, lora=lora, size=size)
    memory = process_memory(deepspeed, parameters, muon, peaks, processes=where.processes, gpu=gpu, frozen=frozen)
    sent = (where.processes - 1) / where.processes  # of a ring, for each byte
    accumulation, zero_stage = deepspeed["gradient_accumulation_steps"], deepspeed["zero_optimization"]["stage"]
    reductions = accumulation if zero_stage > 1 else 1
    gathers = 2 * accumulation if zero_stage == 3 else 1
    reduced = round((4 if accumulates_apart(deepspeed) else width) * parameters * reductions * sent)
    gathered = round(width * (parameters + (frozen if zero_stage == 3 else 0)) * gathers * sent)
    snapshots = 4 * parameters * len(TRACKED) * MAX_SNAPSHOTS
    checkpoint = round(4 * parameters * (1 + AVERAGES + moments_per_weight(deepspeed, parameters, muon)))
    flops = stage_flops(stage, tokens, lora, size)
    seconds = _step_seconds(flops, deepspeed, parameters, reduced, gathered, where)
    return StagePlan(
        stage.name,
        parameters + frozen,
        parameters,
        flops,
        steps,
        deepspeed,
        memory,
        reduced,
        gathered,
        checkpoint,
        snapshots,
        seconds,
    )


def _step_seconds(
    flops: Flops, deepspeed: dict[str, Any], parameters: int, reduced: int, gathered: int, where: Target
) -> float | None:
    """Gradients are reduced during the backward pass; gathering the weights and the update come after it."""
    if where.gpu is None:
        return None
    precision: Precision = "bf16" if weight_bytes(deepspeed) == 2 else "fp32"
    images = deepspeed["train_batch_size"] / where.processes
    computing = images * (flops.training + flops.recomputed) / (where.gpu.peak(precision) * UTILISATION)
    rate = 1e9 * _link(where)
    update = UPDATE_BYTES * parameters / where.processes / (1e9 * where.gpu.memory_rate)
    return max(computing, reduced / rate) + gathered / rate + update


def _link(where: Target) -> float:
    assert where.gpu is not None
    if where.processes <= GPUS_PER_NODE:
        return where.gpu.link or PCIE
    return min(NODE_LINK, where.gpu.link) if where.gpu.link else ETHERNET


# ---- output


def describe(
    stages: list[StageConfig],
    where: Target,
    resolve: Resolve,
    steps: Callable,
    lora: Callable[[StageConfig], LoraConfig | None],
    buckets: Callable[[StageConfig], Sequence[ImageSize]],
) -> list[str]:
    """The lines of a dry run before the configuration: each stage with what is decided, and what it needs.

    steps(stage, processes): the stage's optimizer steps. lora(stage): its adapters. buckets(stage): sizes.
    """
    lines, plans = [], []
    for stage in stages:
        deepspeed, notices = resolve(stage, where.processes, where.device)
        sizes = buckets(stage)
        found = plan_stage(stage, deepspeed, steps(stage, where.processes), where, lora(stage), sizes)
        plans.append(found)
        counts = found.parameters, found.trained
        lines.append(headline(stage, counts, found.steps, deepspeed, where.processes, where.device, sizes))
        lines += [f"{stage.name}: {notice}" for notice in notices]
        lines.append(f"{stage.name}: DeepSpeed {json.dumps(deepspeed)}")
    return [*lines, "", *table(plans, where), ""]


def headline(
    stage: StageConfig,
    counts: tuple[int, int],
    steps: int,
    deepspeed: dict[str, Any],
    processes: int,
    device: str,
    buckets: Sequence[ImageSize] = (),
) -> str:
    """A stage in one line. counts: of its parameters, and of those that are trained. buckets: sizes of its images."""
    parameters, trained = counts
    sizes = ", ".join(map(str, buckets or [ImageSize.of(stage.size)]))
    adapters = "" if trained == parameters else f" ({trained / 1e6:.2f} M of them in adapters, which alone are trained)"
    return (
        f"{stage.name}: {sizes}, {parameters / 1e6:.2f} M parameters{adapters}, "
        f"{counted(steps, 'step')} of "
        f"{counted(deepspeed['train_batch_size'], 'image')} on {processes} x {device}"
    )


def table(plans: list[StagePlan], where: Target) -> list[str]:
    """What the stages need, one column each, and what the estimate assumes."""
    name = where.gpu.name if where.gpu else where.device
    rows: list[tuple[str, list[str]]] = [(f"{where.processes} x {name}", [plan.name for plan in plans])]

    def row(label: str, cells: Callable[[StagePlan], str]) -> None:
        rows.append((label, [cells(plan) for plan in plans]))

    row("parameters", lambda plan: f"{plan.parameters / 1e6:.1f} M")
    if any(plan.trained < plan.parameters for plan in plans):
        row("  trained", lambda plan: f"{plan.trained / 1e6:.1f} M")
    row("TFLOP per image, forward", lambda plan: f"{plan.flops.forward / 1e12:.4g}")
    row("  training", lambda plan: f"{plan.flops.training / 1e12:.4g}")
    if any(plan.flops.recomputed for plan in plans):
        row("  recomputed activations", lambda plan: f"{plan.flops.recomputed / 1e12:.4g}")
    row("images per step", lambda plan: f"{plan.deepspeed['train_batch_size']}")
    row("  micro-batch x accumulation", _micro_batches)
    row("ZeRO stage", lambda plan: str(plan.deepspeed["zero_optimization"]["stage"]))
    row("GiB per process: weights", lambda plan: _gib(plan.memory.weights))
    row("  fp32 master weights", lambda plan: _gib(plan.memory.master))
    row("  optimizer moments", lambda plan: _gib(plan.memory.moments))
    row("  EMA and power averages", lambda plan: _gib(plan.memory.ema))
    row("  buffers", lambda plan: _gib(plan.memory.buffers))
    row("  activations and gradients", lambda plan: _gib(plan.memory.backward))
    row("  or the optimizer's step", lambda plan: _gib(plan.memory.step))
    if any(plan.memory.host for plan in plans):
        row("  on the host instead", lambda plan: _gib(plan.memory.host))
    limit = f", of {where.gpu.memory:g}" if where.gpu else ""
    row(f"  at most{limit}", lambda plan: _gib(plan.memory.peak))
    row("GB sent per step, gradients", lambda plan: f"{plan.reduced / 1e9:.3g}")
    row("  weights", lambda plan: f"{plan.gathered / 1e9:.3g}")
    row("GB per checkpoint", lambda plan: f"{plan.checkpoint / 1e9:.3g}")
    row("GB of averages, at most", lambda plan: f"{plan.snapshots / 1e9:.3g}")
    if where.gpu:
        row("ms per step", lambda plan: f"{1e3 * (plan.seconds or 0):.3g}")
        row("images/s", lambda plan: f"{plan.deepspeed['train_batch_size'] / (plan.seconds or 1):.4g}")
        row("hours for all steps", lambda plan: f"{plan.steps * (plan.seconds or 0) / 3600:.3g}")
    return [*_aligned(rows), *_notes(plans, where)]


def _notes(plans: list[StagePlan], where: Target) -> list[str]:
    """What the numbers assume, and which stage does not fit."""
    notes = []
    if where.gpu:
        peak = where.gpu.peak("bf16") / 1e12
        notes.append(
            f"Time is an estimate: {UTILISATION:.0%} of the peak rate ({peak:g} TFLOP/s in bf16), and {_link(where):g} "
            f"GB/s for collectives; it leaves out data, validation and checkpoints. Memory leaves out CUDA's context "
            f"and fragmentation, 1 to 2 GiB."
        )
        for plan in plans:
            if plan.memory.peak > where.gpu.memory * GIB:
                notes.append(
                    f"{plan.name} does not fit into {where.gpu.memory:g} GiB: lower train_micro_batch_size_per_gpu, "
                    f"set checkpoint_levels in its unet, or raise zero_optimization.stage"
                )
    return notes


def _micro_batches(plan: StagePlan) -> str:
    return f"{plan.deepspeed['train_micro_batch_size_per_gpu']} x {plan.deepspeed['gradient_accumulation_steps']}"


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}" if size < 0.1 * GIB else f"{size / GIB:.2f}"


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    left = max(len(label) for label, _ in rows)
    widths = [max(len(cells[index]) for _, cells in rows) for index in range(len(rows[0][1]))]
    return [
        "  ".join([label.ljust(left), *(cell.rjust(width) for cell, width in zip(cells, widths))])
        for label, cells in rows
    ]
