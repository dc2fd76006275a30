"""Timing.

On a GPU: CUDA events with a cold L2 cache, inside a CUDA graph if the work can be captured, so that neither caches
nor the launch overhead of Python distort the comparison. On a CPU: CPU seconds of one thread, with the works
interleaved, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_WARMUPS = 3  # the first call compiles and plans, the second fills the allocator
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU
MAX_ROUNDS = 100  # on a CPU
MIN_SAMPLES, MAX_SAMPLES = 10, 200  # on a GPU, if time allows


class Work(NamedTuple):
    """A call(setup()) to time; the time of `setup` does not count."""

    call: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None


class Times(NamedTuple):
    """Percentiles of the repetitions in milliseconds, how they were timed, and the share of kernel (system) time."""

    p20: float
    p50: float
    p80: float
    timer: str
    system_share: float | None = None

    @classmethod
    def of(cls, samples: list[float], timer: str, system_share: float | None = None) -> Times:
        ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(samples, dtype=torch.float64).quantile(ranks).tolist(), timer, system_share)


def time_cuda(work: Work, *, seconds: float = 0.2, in_graph: bool = True) -> Times:
    """Times of one work on the current GPU, in about `seconds` besides warming up."""
    for _ in range(NUM_WARMUPS):
        work.call(work.setup())
    torch.cuda.synchronize()
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    run, timer = None, "events"
    if in_graph:
        try:
            run, timer = _captured(work, buffer), "events in a CUDA graph, cold L2"
        except RuntimeError as error:  # it synchronizes with the host, or allocates outside of PyTorch
            timer = f"events, no graph: {first_line(error)}"
            torch.cuda.synchronize()
    run = run or _uncaptured(work, buffer)
    samples, until = [run()], time.monotonic() + seconds
    while len(samples) < MIN_SAMPLES or (len(samples) < MAX_SAMPLES and time.monotonic() < until):
        samples.append(run())
        if len(samples) >= 3 and time.monotonic() > until + 10 * seconds:  # very slow: three samples are enough
            break
    return Times.of(samples, timer)


def _captured(work: Work, buffer: Tensor) -> Callable[[], float]:
    """One replay of flush, event, call, event; events inside a graph are the GPU's own, free of launch gaps."""
    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = work.setup()
        buffer.zero_()
        start.record()
        work.call(state)
        end.record()

    def run() -> float:
        graph.replay()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    run()  # the first replay uploads the graph
    return run


def _uncaptured(work: Work, buffer: Tensor) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        state = work.setup()
        buffer.zero_()
        start.record()
        work.call(state)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return run


def time_interleaved(works: Mapping[str, Work], *, seconds: float) -> dict[str, Times]:
    """Times of several works on the CPU, which alternate, one repetition a round, after a warm-up round.

    Takes about `seconds` in all and at least three rounds, or two if a round takes longer than 20 seconds. With one
    thread it measures CPU time (user and system), which other processes hardly affect; with more threads, wall-clock
    time."""
    alone = torch.get_num_threads() == 1
    clock, timer = (
        (time.process_time, "CPU seconds of 1 thread, interleaved")
        if alone
        else (time.perf_counter, f"wall clock, {torch.get_num_threads()} threads, interleaved")
    )
    samples: dict[str, list[float]] = {name: [] for name in works}
    user, system = dict.fromkeys(works, 0.0), dict.fromkeys(works, 0.0)
    for work in works.values():
        work.call(work.setup())
    begin = time.monotonic()
    for round_number in range(MAX_ROUNDS):
        spent = time.monotonic() - begin
        if spent > seconds and round_number >= (2 if spent > 20 * round_number else 3):
            break
        for name, work in works.items():
            state = work.setup()
            before, begun = os.times(), clock()
            work.call(state)
            samples[name].append(1000 * (clock() - begun))
            after = os.times()
            user[name] += after.user - before.user
            system[name] += after.system - before.system
    shares = {name: system[name] / max(user[name] + system[name], 1e-9) for name in works}
    return {name: Times.of(taken, timer, shares[name]) for name, taken in samples.items()}


def peak_bytes(work: Work) -> int | None:
    """Peak GPU memory of the work beyond what was allocated before it; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.call(work.setup())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_work(device: torch.device) -> tuple[Work, float]:
    """A copy much larger than any cache, and the bytes it reads and writes."""
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(count, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return Work(lambda _: target.copy_(source)), 2.0 * count


def matrix_work(device: torch.device) -> tuple[Work, float]:
    """A large matrix product (bf16 on a GPU, fp32 on a CPU), and its floating-point operations."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return Work(lambda _: a @ b), 2.0 * side**3


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"[:200]
