"""Runs the cases of single ops: every provider of a case becomes a row, also the one that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .rows import Results, Row, clocks
from .timing import Times, Work, copy_work, first_line, matrix_work, peak_bytes, time_cuda, time_interleaved

Provider = Callable[..., Tensor]


class ProviderUnavailable(Exception):
    """A provider that cannot run here, or not for this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One op on one shape. `inputs()` gives arguments and keywords; all providers take those of the op itself.

    flops and bytes are the least that the op must compute and move.
    """

    op: str
    shape: str
    dtype: torch.dtype
    mode: str  # "forward" or "backward"
    inputs: Callable[[], tuple[tuple, dict[str, Any]]]
    providers: dict[str, Provider]
    flops: float | None = None
    bytes: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def work(self, provider: Provider) -> Work:
        """Fresh inputs and what to time on them: the forward pass without, or the backward pass with gradients."""
        arguments, keywords = self.inputs()
        if self.mode == "forward":
            return Work(torch.no_grad()(lambda _: provider(*arguments, **keywords)))
        leaves = [x.requires_grad_() for x in _tensors((*arguments, *keywords.values())) if x.is_floating_point()]
        dout = torch.randn_like(provider(*arguments, **keywords))
        return Work(
            lambda out: torch.autograd.grad(out, leaves, dout, allow_unused=True),
            lambda: provider(*arguments, **keywords),
        )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


class Bench:
    """What all measurements of a run share: device, results, deadline, ceilings."""

    def __init__(self, device: torch.device, results: Results, *, deadline: float, seconds: float = 0.2) -> None:
        self.device, self.results, self.deadline, self.seconds = device, results, deadline, seconds
        self.gbs, self.tflops = self._ceilings()

    def _ceilings(self) -> tuple[float, float]:
        """Copy bandwidth in GB/s and matrix rate in TFLOP/s, measured now, with the clocks right after."""
        rates = []
        for name, (work, amount) in (("copy", copy_work(self.device)), ("matrix product", matrix_work(self.device))):
            times = self.time({name: work})[name]
            quantity = "bytes" if name == "copy" else "flops"
            rates.append(amount / times.p50 * 1e3)
            if self.device.type == "cuda":
                self.results.shared["clocks"] = clocks()
            self.results.add(
                op="ceiling",
                shape="large",
                dtype="bfloat16" if self.device.type == "cuda" else "float32",
                mode="forward",
                provider=name,
                ms=times[:3],
                timer=times.timer,
                **{quantity: amount},
            )
        return rates[0] / 1e9, rates[1] / 1e12

    def time(self, works: dict[str, Work], *, in_graph: bool = True, seconds: float | None = None) -> dict[str, Times]:
        """Times of each, in about `seconds` a work, by default those of the bench."""
        seconds = seconds or self.seconds
        if self.device.type == "cuda":
            return {name: time_cuda(work, seconds=seconds, in_graph=in_graph) for name, work in works.items()}
        return time_interleaved(works, seconds=seconds * len(works))

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def run(self, cases: Iterable[Case]) -> None:
        """Measure case after case until all are done or the time is up."""
        for case in cases:
            if not self.in_time():
                print(f"out of time before {case.op} {case.shape} {case.mode}: the rest is not measured", flush=True)
                return
            self.run_case(case)

    def run_case(self, case: Case) -> None:
        """All providers of a case. On a CPU they alternate, on a GPU they come one after the other."""
        works: dict[str, Work] = {}
        for name, provider in case.providers.items():
            with self.missing_on_error(name, **_names(case)):
                work = case.work(provider)
                work.call(work.setup())  # what cannot run fails here
                if self.device.type == "cuda":
                    self._add(case, name, self.time({name: work})[name], peak_bytes(work))
                else:
                    works[name] = work
        for name, times in self.time(works).items() if works else ():
            self._add(case, name, times, None)

    def _add(self, case: Case, provider: str, times: Times, peak: int | None) -> None:
        self.add(
            **_names(case),
            provider=provider,
            ms=times[:3],
            timer=times.timer,
            flops=case.flops,
            bytes=case.bytes,
            peak_bytes=peak,
            note=case.notes.get(provider),
        )

    def add(self, **row: Any) -> None:
        """A row with the ceilings of this run, printed and written."""
        print(line(self.results.add(**row, gbs=self.gbs, tflops=self.tflops)), flush=True)

    @contextmanager
    def missing_on_error(self, provider: str, **names: str) -> Iterator[None]:
        """What fails inside becomes a row that says so: one bad provider must not end the run."""
        try:
            yield
        except ProviderUnavailable as reason:
            self.add(**names, provider=provider, missing=str(reason))
        except Exception as error:  # whatever other people's code may raise
            self.add(**names, provider=provider, missing=first_line(error))
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _names(case: Case) -> dict[str, str]:
    return {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "mode": case.mode}


def line(row: Row) -> str:
    """A row for the eye."""
    names = f"{row['op']:<14} {row['shape']:<44} {row['mode']:<10} {row['provider']:<28} "
    if "missing" in row:
        return f"{names}not measured: {row['missing']}"
    if "ms" not in row:
        return f"{names}{row['peak_bytes'] / 2**20:10.0f} MiB"
    shares = [f"{row['bytes'] / row['ms'][1] / 1e4 / row['gbs']:4.0f} % of copy"] if row.get("bytes") else []
    shares += [f"{row['flops'] / row['ms'][1] / 1e7 / row['tflops']:4.0f} % of matrix rate"] if row.get("flops") else []
    return f"{names}{row['ms'][1]:10.4f} ms  {', '.join(shares)}  {row.get('note') or ''}"


def compiled(function: Callable) -> Callable:
    """torch.compile as it comes, for fixed shapes."""
    return torch.compile(function, dynamic=False)
