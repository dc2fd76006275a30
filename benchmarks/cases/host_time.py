"""Host time of the fused ops: what a call costs the CPU, whatever the GPU does meanwhile. Letters: B batch, S side.

On a GPU launches are real, and nothing waits for them. On a CPU they are stubbed in two places, a provider each:

    ours, no launches   in place of Triton: what is left is this project's and PyTorch's
    ours, no driver     in place of the driver: Triton binds the arguments and finds the kernel, compiled for sm_90

The networks of small batches, and sampling, run no faster than the host launches their kernels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastimagen import ops
from fastimagen.ops import dispatch

from ..harness.measure import Bench, ProviderUnavailable
from ..harness.timing import Times, Work, time_interleaved

CALLS = 20  # of a sample: few enough for a GPU's queue of launches (1024)
SAMPLES = 100  # on a GPU
TRAINING = "forward and backward"
Call = Callable[[], object]


def run(bench: Bench, *, seconds: float | None = None) -> None:
    """A row for every op, in milliseconds of host time a call. `seconds` (by default the bench's) for each."""
    seconds = bench.seconds if seconds is None else seconds
    for (shape, mode), make in CASES.items():
        names = {"op": "host time", "shape": shape, "dtype": "bfloat16", "mode": mode}
        for provider, launching in PROVIDERS[bench.device.type].items():
            if not bench.in_time():
                print(f"out of time before {shape}, {provider}: the rest is not measured", flush=True)
                return
            with bench.missing_on_error(provider, **names), launching():
                times = host_times(make(bench.device), bench.device, seconds)
                bench.add(**names, provider=provider, ms=times[:3], timer=times.timer)


def host_times(call: Call, device: torch.device, seconds: float) -> Times:
    """Milliseconds of host time of a call, which may launch kernels but not wait for them."""

    def calls(_unused: object) -> None:
        for _ in range(CALLS):
            call()

    if device.type == "cpu":
        times = time_interleaved({"": Work(calls)}, seconds=seconds)[""]
        return Times(times.p20 / CALLS, times.p50 / CALLS, times.p80 / CALLS, times.timer)
    samples: list[float] = []
    calls(None)  # compiles
    until = time.monotonic() + seconds
    while len(samples) < 3 or (len(samples) < SAMPLES and time.monotonic() < until):
        torch.cuda.synchronize()  # the queue is empty: no launch waits for its turn
        begin = time.perf_counter()
        calls(None)
        samples.append(1000 * (time.perf_counter() - begin) / CALLS)
    torch.cuda.synchronize()
    return Times.of(samples, f"wall clock of the host, {CALLS} calls enqueued")


# ---- launches


@contextmanager
def real_launches() -> Iterator[None]:
    """The kernels, as "auto" uses them on a GPU, for all dtypes."""
    before = ops.backend()
    ops.set_backend("triton")
    try:
        yield
    finally:
        ops.set_backend(before)


@contextmanager
def stubbed(*, bound: bool) -> Iterator[None]:
    """The path to the kernels with CPU tensors, as if they were on an sm_90; nothing is launched or interpreted.

    With `bound`, Triton prepares every launch, up to the call of the driver, and compiles at the first.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ProviderUnavailable("TRITON_INTERPRET=1 replaces Triton's launches")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError:
        raise ProviderUnavailable("triton is not installed") from None

    run, target = JITFunction.run, GPUTarget("cuda", 90, 32)
    stub = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: "cuda:90", get_current_stream=lambda device: 0
    )

    def prepare(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        run(kernel, *arguments, warmup=True, **options)

    def nothing(kernel: Any, *arguments: Any, **options: Any) -> None:
        pass

    with (
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(JITFunction, "run", prepare if bound else nothing),
        _on_cpu_tensors(dispatch),
        real_launches(),
    ):
        yield


@contextmanager
def _on_cpu_tensors(module: ModuleType) -> Iterator[None]:
    """Let the kernels take CPU tensors, which only the interpreter does otherwise."""

    def interpreting() -> bool:  # functions: a Mock's call would take longer than a whole op
        return True

    def no_triton() -> None:
        return None

    with mock.patch.object(module, "interpreting", interpreting), mock.patch.object(module, "no_triton", no_triton):
        yield


PROVIDERS: dict[str, dict[str, Callable[[], Any]]] = {
    "cpu": {"ours, no launches": partial(stubbed, bound=False), "ours, no driver": partial(stubbed, bound=True)},
    "cuda": {"ours, triton": real_launches},
}


# ---- calls, at the smallest sizes of a network: those of the samples do not matter


def training(function: Callable[..., Tensor], arguments: tuple, keywords: dict[str, Any]) -> Call:
    """Forward and backward, with gradients of all floating-point tensors."""
    leaves = [
        x.requires_grad_() for x in (*arguments, *keywords.values()) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    dout = torch.ones_like(function(*arguments, **keywords))
    return lambda: torch.autograd.grad(function(*arguments, **keywords), leaves, dout)


def forward(function: Callable[..., object], arguments: tuple, keywords: dict[str, Any]) -> Call:
    """Forward alone, as a sampler runs it."""
    return torch.no_grad()(partial(function, *arguments, **keywords))


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def attention_arguments(device: torch.device, *, cross: bool) -> tuple[Callable[..., Tensor], tuple, dict[str, Any]]:
    """8 x 8 image tokens, 64 text tokens, the null key; multi-query, or cross-attention with two time tokens."""
    batch, heads, width, keys, key_heads = 2, 8, 64, 2 if cross else 64, 8 if cross else 1
    kv = normal(device, batch, keys, 2, key_heads, width)  # as one linear layer makes both
    text = normal(device, batch, 64, 2, key_heads, width)
    null = normal(device, 2, width, dtype=torch.float32)
    keywords = {
        "null_k": null[0].detach(),
        "null_v": null[1].detach(),
        "context_k": text[:, :, 0].detach(),
        "context_v": text[:, :, 1].detach(),
        "context_lengths": torch.tensor([64, 9], device=device),
    }
    return (
        ops.attention,
        (normal(device, batch, 64, heads, width), kv[:, :, 0].detach(), kv[:, :, 1].detach()),
        keywords,
    )


def group_norm_arguments(
    device: torch.device, side: int, *, film: bool
) -> tuple[Callable[..., Tensor], tuple, dict[str, Any]]:
    """256 channels_last channels in 8 groups, with FiLM or without."""
    x = normal(device, 2, 256, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = (normal(device, 256, dtype=torch.float32) for _ in range(2))
    scale, shift = normal(device, 2, 512).chunk(2, dim=1)  # (B, C) each
    film_vectors = {"scale": scale.detach(), "shift": shift.detach()} if film else {}
    return ops.group_norm_silu, (x, weight, bias, 8), film_vectors


def modulated_norm_arguments(device: torch.device) -> tuple[Callable[..., Tensor], tuple, dict[str, Any]]:
    """64 tokens of 768 channels; scale and shift are parts of one tensor, as in the transformer."""
    scale, shift, _ = normal(device, 2, 3 * 768).chunk(3, dim=1)  # (B, C) each
    return ops.modulated_norm, (normal(device, 2, 64, 768), scale.detach(), shift.detach()), {}


def step_arguments(device: torch.device, threshold: str) -> tuple[Callable[..., object], tuple, dict[str, Any]]:
    """A guided step from a U-Net's output in bf16."""
    output, x = normal(device, 4, 3, 64, 64), normal(device, 2, 3, 64, 64, dtype=torch.float32)
    return ops.sampler_step, (output, x, (0.7, -0.7), (0.6, 0.4, 0.0, 0.0)), {"guidance": 5.0, "threshold": threshold}


CASES: dict[tuple[str, str], Callable[[torch.device], Call]] = {
    ("self-attention B2 8x8", TRAINING): lambda device: training(*attention_arguments(device, cross=False)),
    ("cross-attention B2 8x8", TRAINING): lambda device: training(*attention_arguments(device, cross=True)),
    ("self-attention B2 8x8", "forward"): lambda device: forward(*attention_arguments(device, cross=False)),
    ("group_norm_silu B2 8x8, one pass", TRAINING): lambda device: training(
        *group_norm_arguments(device, 8, film=True)
    ),
    ("group_norm_silu B2 64x64", TRAINING): lambda device: training(*group_norm_arguments(device, 64, film=True)),
    ("group_norm_silu B2 64x64", "forward"): lambda device: forward(*group_norm_arguments(device, 64, film=True)),
    ("modulated_norm B2 N64", TRAINING): lambda device: training(*modulated_norm_arguments(device)),
    ("modulated_norm B2 N64", "forward"): lambda device: forward(*modulated_norm_arguments(device)),
    ("sampler step B2 64x64", "forward"): lambda device: forward(*step_arguments(device, "static")),
    ("sampler step B2 64x64, dynamic", "forward"): lambda device: forward(*step_arguments(device, "dynamic")),
    ("dynamic_threshold B2 64x64", "forward"): lambda device: forward(
        ops.dynamic_threshold, (normal(device, 2, 3, 64, 64, dtype=torch.float32), 0.995), {}
    ),
}
