"""How long a piece of work takes.

On a GPU: CUDA events with a cold L2, inside a CUDA graph where the work can be captured, so that neither caches nor
launches of Python flatter or blame anyone. On a CPU: CPU seconds of one thread, the works in turns, so that whatever
else the machine does falls on all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARMUPS = 3  # the first call compiles and plans, the second fills the allocator
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU
MOST_ROUNDS = 100  # on a CPU
SAMPLES = (10, 200)  # at least and at most, where the time allows


class Work(NamedTuple):
    """What is timed: call(setup()), of which only `call` counts."""

    call: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None


class Times(NamedTuple):
    """Milliseconds: the 20th, 50th and 80th of a hundred repetitions; and how they were taken."""

    p20: float
    p50: float
    p80: float
    timer: str

    @classmethod
    def of(cls, samples: list[float], timer: str) -> Times:
        ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(samples, dtype=torch.float64).quantile(ranks).tolist(), timer)


def time_cuda(work: Work, *, seconds: float = 0.2, in_graph: bool = True) -> Times:
    """Times of one work on the current GPU, in about `seconds` besides warming up."""
    for _ in range(WARMUPS):
        work.call(work.setup())
    torch.cuda.synchronize()
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    run, timer = None, "events"
    if in_graph:
        try:
            run, timer = _captured(work, buffer), "events in a CUDA graph, cold L2"
        except RuntimeError as error:  # it waits for the GPU, or allocates behind PyTorch's back
            timer = f"events, no graph: {first_line(error)}"
            torch.cuda.synchronize()
    run = run or _uncaptured(work, buffer)
    least, most = SAMPLES
    samples, until = [run()], time.monotonic() + seconds
    while len(samples) < least or (len(samples) < most and time.monotonic() < until):
        samples.append(run())
        if len(samples) >= 3 and time.monotonic() > until + 10 * seconds:  # seconds each: three will do
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


def time_in_turns(works: Mapping[str, Work], *, seconds: float) -> dict[str, Times]:
    """Times of several works on the CPU, one repetition of each in turn, after one that does not count.

    Goes on for about `seconds` in all, at least three rounds, two if a round takes longer than 20 seconds. With one
    thread CPU time is counted, which other processes cannot stretch much; with more, the clock on the wall.
    """
    alone = torch.get_num_threads() == 1
    clock, timer = (
        (time.process_time, "CPU seconds of 1 thread, in turns")
        if alone
        else (time.perf_counter, f"wall clock, {torch.get_num_threads()} threads, in turns")
    )
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work.call(work.setup())
    begin = time.monotonic()
    for turn in range(MOST_ROUNDS):
        spent = time.monotonic() - begin
        if spent > seconds and turn >= (2 if spent > 20 * turn else 3):
            break
        for name, work in works.items():
            state = work.setup()
            begun = clock()
            work.call(state)
            samples[name].append(1000 * (clock() - begun))
    return {name: Times.of(taken, timer) for name, taken in samples.items()}


def peak_bytes(work: Work) -> int | None:
    """GPU memory at the highest point of the work, beyond what was there before it; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.call(work.setup())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_work(device: torch.device) -> tuple[Work, float]:
    """A copy far beyond any cache, and the bytes it reads and writes."""
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(count, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return Work(lambda _: target.copy_(source)), 2.0 * count


def matrix_work(device: torch.device) -> tuple[Work, float]:
    """A large product of random matrices (bf16 on a GPU, fp32 on a CPU), and its floating-point operations."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return Work(lambda _: a @ b), 2.0 * side**3


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"[:200]
