"""Triton's cache of compiled kernels: filled from all cores before anything is measured, and its use counted.

    python -m benchmarks.harness.kernel_cache [--only GROUP,...] [--processes N] [--target sm_90] [--toys] [--list]

A process compiles one kernel after another, half a second to several seconds each, and a network needs dozens. Here the
launches of all groups are listed first: networks and ops run on meta tensors along the path of the kernels, and each
launch leaves what Triton would compile for it (signature, constants, alignment of the arguments, warps) instead of
running. Then as many processes as there are cores compile the list. Triton's key of a compiled kernel is a digest of
these, of the sources and of the target, so later processes find every kernel on the disk.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastimagen.ops import dispatch

from ..studies.aot import TARGETS, Offline
from ..studies.trace_step import Recorder, on_the_kernels_path
from .timing import first_line

RUN = JITFunction.run


class Compilation(NamedTuple):
    """What Triton compiles for a launch."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        function = getattr(importlib.import_module(self.module), self.name)
        return ASTSource(function, self.signature, self.constants, self.attributes)

    @property
    def key(self) -> str:
        """The same for the same kernel: of everything that Triton's own key depends on and that a launch decides."""
        return self.source().hash() + repr(sorted(self.options.items(), key=str))


class Compiled(NamedTuple):
    """A kernel in the cache: its name, CPU seconds, whether it was there before, and the error if there was one."""

    name: str
    seconds: float
    was_cached: bool
    error: str | None = None


# ---- listing


@contextmanager
def listing(target: GPUTarget) -> Iterator[dict[str, Compilation]]:
    """Inside, launches neither compile nor run; what they would compile for `target` is added to the dictionary."""
    found: dict[str, Compilation] = {}

    def note(
        self: JITFunction,
        key: object,
        signature: Any,
        device: object,
        constants: Any,
        options: Any,
        attributes: Any,
        _: bool,
    ) -> None:
        made = Compilation(self.fn.__module__, self.fn.__name__, signature, constants, attributes, dict(vars(options)))
        found.setdefault(made.key, made)

    def run(self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        RUN(self, *arguments, grid=grid, warmup=True, **options)

    with (
        mock.patch.object(driver, "_active", Offline(target)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "_do_compile", note),
    ):
        yield found


class _Lister(Recorder):
    """Runs the launchers on meta tensors; convolutions return what cuDNN would, in channels_last."""

    def launch(self, kernel: JITFunction, arguments: tuple, options: dict[str, Any]) -> None:
        RUN(kernel, *arguments, grid=(1,), warmup=True, **options)


def compilations_of(launches: Iterable[Callable[[], object]], target: GPUTarget) -> dict[str, Compilation]:
    """What the kernels of these calls on meta tensors compile, by key."""
    lister = _Lister()
    with (
        mock.patch.object(dispatch, "no_triton", return_value=None),  # so that set_backend takes "triton" without a GPU
        on_the_kernels_path(lister),
        listing(target) as found,
        lister,
    ):
        for launch in launches:
            launch()
    return found


# ---- compiling


def compile_one(compilation: Compilation, target: GPUTarget) -> Compiled:
    """Compile into the cache, or find it there."""
    cached: list[bool] = []
    before = _cpu_seconds()
    with mock.patch.object(knobs.compilation, "listener", lambda *, cache_hit, **_: cached.append(cache_hit)):
        try:
            triton.compile(compilation.source(), target=target, options=compilation.options)
        except Exception as error:  # the launch that needs this kernel will fail too, and say where
            return Compiled(compilation.name, _cpu_seconds() - before, False, first_line(error))
    return Compiled(compilation.name, _cpu_seconds() - before, all(cached))


def _cpu_seconds() -> float:
    """Of this process and of the assembler that it ran."""
    return sum(os.times()[:4])


def compile_all(compilations: list[Compilation], target: GPUTarget, processes: int) -> list[Compiled]:
    """Compile in so many processes. They are forked: importing PyTorch in each would take longer than compiling."""
    with (
        mock.patch.object(driver, "_active", Offline(target)),  # a forked process must not ask CUDA
        multiprocessing.get_context("fork").Pool(max(1, min(processes, len(compilations)))) as pool,
    ):
        return pool.starmap(compile_one, [(compilation, target) for compilation in compilations], chunksize=1)


class Use:
    """How a process used the cache: kernels that it found there, and that it compiled itself in `seconds`."""

    def __init__(self) -> None:
        self.found, self.compiled, self.seconds = 0, 0, 0.0

    def __call__(self, *, times: Any, cache_hit: bool, **_: object) -> None:
        """Triton's listener of compilations."""
        self.found += cache_hit
        self.compiled += not cache_hit
        self.seconds += 0.0 if cache_hit else times.total / 1e6

    def __str__(self) -> str:
        return f"kernels: {self.found} from the cache, {self.compiled} compiled in {self.seconds:.1f} s"


def count_use() -> Use:
    """From now on count how this process uses the cache."""
    use = Use()
    knobs.compilation.listener = use
    return use


def compile_fused_adam() -> str:
    """Compile DeepSpeed's FusedAdam, which its first engine would do for a minute, and say what came of it."""
    if find_spec("deepspeed") is None:
        return "not needed: deepspeed is not installed"
    from fastimagen.train.deepspeed_config import can_compile_fused_adam

    if not can_compile_fused_adam():
        return "not compiled: there is no nvcc of torch's CUDA version, and training uses torch's AdamW"
    from deepspeed.ops.op_builder import FusedAdamBuilder

    began = time.monotonic()
    try:
        FusedAdamBuilder().load()
    except Exception as error:  # of nvcc and the host's compiler; the engine's rows will say the same
        return f"cannot be compiled: {first_line(error)}"
    return f"compiled in {time.monotonic() - began:.0f} s"


def main() -> None:
    from ..gpu_groups import GROUPS, launches

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.kernel_cache", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,...", help=", ".join(GROUPS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(all cores)")
    parser.add_argument("--target", choices=TARGETS, help="compile for this GPU (the one that is present)")
    parser.add_argument("--toys", action="store_true", help="the toy sizes of gpu_check --dry-run")
    parser.add_argument("--list", action="store_true", help="compile nothing, count the kernels")
    options = parser.parse_args()
    target = TARGETS[options.target] if options.target else driver.active.get_current_target()
    began = time.monotonic()
    everything: dict[str, Compilation] = {}
    for group in options.only.split(","):
        found = compilations_of(launches(group, toys=options.toys), target)
        new = found.keys() - everything.keys()
        everything |= found
        if found:
            print(f"{group:<14} {len(found):4} kernels, {len(new):4} of them new", flush=True)
    listed = time.monotonic() - began
    facts = {"kernels": len(everything), "list_s": round(listed, 1)}
    if not options.list:
        done = compile_all(list(everything.values()), target, options.processes)
        for failed in (one for one in done if one.error):
            print(f"{failed.name} does not compile: {failed.error}", flush=True)
        facts |= {
            "compiled": sum(not one.was_cached for one in done),
            "cpu_s": round(sum(one.seconds for one in done), 1),
            "wall_s": round(time.monotonic() - began - listed, 1),
            "processes": options.processes,
        }
    if "engine" in options.only.split(",") and not options.list and torch.cuda.is_available():
        print(f"FusedAdam: {compile_fused_adam()}", flush=True)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled; unset it")
    main()
