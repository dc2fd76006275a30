"""Kernels that launches on meta tensors would compile, compiled by several processes into Triton's cache.

Networks and ops run on meta tensors along the path of the kernels, and each launch leaves what Triton would compile for
it (signature, constants, alignment of the arguments, warps) instead of running. Triton's key of a compiled kernel is a
digest of these, of the sources and of the target, so later processes find every kernel on the disk.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .offline import Offline
from .on_meta import on_the_kernels_path
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


def compilations_of(launches: Iterable[Callable[[], object]], target: GPUTarget) -> dict[str, Compilation]:
    """What the kernels of these calls on meta tensors compile, by key."""
    with on_the_kernels_path(), listing(target) as found:
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
