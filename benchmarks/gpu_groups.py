"""What gpu_check measures, group by group, at the sizes of a GPU and at toy sizes; and the kernels behind it.

The groups come in the order of their importance to somebody who would buy the GPU hours: training steps first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .harness.measure import Bench, Case
    from .harness.networks import Network


@dataclass(frozen=True)
class Group:
    """A group of measurements, in a process of its own.

    seconds: the most that it may take. estimate: what it should take on an H100, start of the process included (see
    docs/benchmarks.md). ops: whose tests must pass, or it is not measured.
    """

    seconds: float
    estimate: float
    ops: tuple[str, ...] = ("attention", "group_norm", "residual")


GROUPS = {
    "engine": Group(100, 80),
    "step": Group(80, 63),
    "attention": Group(50, 45, ("attention",)),
    "group_norm": Group(40, 35, ("group_norm", "modulated_norm")),
    "threshold": Group(20, 15, ("threshold", "sampler_step")),
    "host_time": Group(15, 12, ("attention", "group_norm", "threshold", "sampler_step")),
    "sampling": Group(45, 35, ("attention", "group_norm", "residual", "threshold", "sampler_step")),
    "networks": Group(80, 70),
    "compilers": Group(45, 40, ()),
    "compiled_step": Group(120, 100),
}


@dataclass(frozen=True)
class Sizes:
    """The networks, batches and shapes of a run."""

    step: list[Network]
    networks: list[Network]
    sampling: list[Network]
    sampling_batch: int
    engine_batches: tuple[int, ...]
    """Micro-batches of the sweep; the first is that of all other settings."""
    attention: dict[str, Any] = field(default_factory=dict)
    group_norm: dict[str, Any] = field(default_factory=dict)
    modulated_norm: dict[str, Any] = field(default_factory=dict)
    threshold: dict[str, Any] = field(default_factory=dict)
    compilers: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    """Arguments of GroupNorm's and of attention's cases for torch.compile."""


def sizes(*, toys: bool) -> Sizes:
    """Those of a GPU, or for a moment on a CPU."""
    from .cases import group_norm
    from .harness import networks

    if toys:
        few: dict[str, Any] = {"sides": (4,), "batches": (2,)}
        return Sizes(
            [networks.TOY],
            [networks.TOY_SUPER],
            [networks.TOY_SUPER],
            2,
            (2, 1),
            few,
            {"shapes": ((2, 16, 4),)},
            {"shapes": ((2, 4, 16),)},
            {"shapes": ((2, 8),)},
            ({"shapes": ((2, 16, 4),)}, {"sides": (32,), "batches": (1,)}),
        )
    return Sizes(
        [networks.BASE64],
        [networks.SUPER256, *networks.PAPER, *networks.TRANSFORMERS],
        [networks.BASE64, networks.SUPER256],
        16,
        (32, 1, 8, 16, 64),
        compilers=({"shapes": group_norm.SHAPES[:4]}, {}),
    )


def measurements(bench: Bench, *, toys: bool) -> dict[str, Callable[[], object]]:
    """What each group measures."""
    from .cases import (
        attention,
        dynamic_threshold,
        engine_step,
        group_norm,
        host_time,
        modulated_norm,
        sampling,
        step,
    )

    size, device = sizes(toys=toys), bench.device
    group_norm_compiled, attention_compiled = size.compilers
    return {
        "engine": lambda: [engine_step.run(bench, network, size.engine_batches) for network in size.step],
        "step": lambda: step.run(bench, size.step, step.EAGER),
        "attention": lambda: bench.run(attention.cases(device, **size.attention)),
        "group_norm": lambda: (
            bench.run(group_norm.cases(device, **size.group_norm)),
            bench.run(modulated_norm.cases(device, **size.modulated_norm)),
        ),
        "threshold": lambda: bench.run(dynamic_threshold.cases(device, **size.threshold)),
        "host_time": lambda: host_time.run(bench),
        "sampling": lambda: sampling.run(bench, size.sampling, ("triton", "torch"), batch=size.sampling_batch),
        "networks": lambda: step.run(bench, size.networks, step.EAGER),
        "compilers": lambda: (
            bench.run(group_norm.cases(device, **group_norm_compiled, compilers=True)),
            bench.run(attention.cases(device, **attention_compiled, compilers=True)),
        ),
        "compiled_step": lambda: step.run(bench, size.step, step.COMPILED),
    }


# ---- the kernels of a group, for harness/kernel_cache.py


def launches(group: str, *, toys: bool) -> Iterator[Callable[[], object]]:
    """Calls on meta tensors that launch what the group launches on a GPU; none where others' kernels are measured."""
    from .cases import attention, dynamic_threshold, group_norm, host_time, modulated_norm

    size, meta = sizes(toys=toys), torch.device("meta")
    dtype = torch.bfloat16
    if group == "engine":
        for network in size.step:
            for batch in size.engine_batches:
                yield partial(_train, network, batch)
    elif group in ("step", "compiled_step"):
        yield from (partial(_train, network, network.batch) for network in size.step)
    elif group == "networks":
        yield from (partial(_train, network, network.batch) for network in size.networks)
    elif group == "attention":
        yield from _of_cases(attention.cases(meta, **size.attention, dtype=dtype))
    elif group == "group_norm":
        yield from _of_cases(group_norm.cases(meta, **size.group_norm, dtype=dtype))
        yield from _of_cases(modulated_norm.cases(meta, **size.modulated_norm, dtype=dtype))
    elif group == "threshold":
        yield from _of_cases(dynamic_threshold.cases(meta, **size.threshold, dtype=dtype))
    elif group == "host_time":
        yield from (partial(_call, make, meta) for make in host_time.CASES.values())
    elif group == "sampling":
        for network in size.sampling:
            yield partial(_sample, network, size.sampling_batch)


def _of_cases(cases: Iterator[Case]) -> Iterator[Callable[[], object]]:
    for case in cases:
        if provider := case.providers.get("ours, triton"):
            yield partial(_run_case, case, provider)


def _run_case(case: Case, provider: Callable[..., Any]) -> None:
    work = case.work(provider)
    work.call(work.setup())


def _call(make: Callable[[torch.device], Callable[[], object]], device: torch.device) -> None:
    make(device)()


def _unet(network: Network, batch: int) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """The U-Net in bf16, images (B, C, H, W) of the side it trains on, and its other arguments, all on meta."""
    from fastimagen.networks.build import build_network

    from .harness.on_meta import unet_inputs

    config = network.stage().config.unet
    with torch.device("meta"):
        unet = build_network(config).to(torch.bfloat16)
    given, x = unet_inputs(config, batch, network.side)
    return unet, x, given


def _train(network: Network, batch: int) -> None:
    unet, x, given = _unet(network, batch)
    unet(x, **given).float().square().mean().backward()


@torch.no_grad()
def _sample(network: Network, batch: int) -> None:
    """The U-Net with guidance, which has two rows for an image; one call for each of them; and the sampler's step."""
    from fastimagen import ops

    ops.set_backend("triton")
    for rows in (2 * batch, batch):
        unet, x, given = _unet(network, rows)
        output = unet(x, **given)
        x = x[:batch]
        for previous in (None, x):
            ops.sampler_step(
                output,
                x,
                (1.0, -1.0),
                (0.5, 0.5, 0.1, 0.0),
                guidance=3.0 if rows > batch else None,
                threshold="dynamic",
                previous=previous,
            )
