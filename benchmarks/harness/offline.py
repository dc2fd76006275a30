"""Kernels compiled for GPUs that need not be present: a stub of Triton's driver, and launches that only compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_90", "sm_100")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Offline:
    """A stub of Triton's driver for `target`, with what a launch asks of it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[tuple[JITFunction, Any]]]:
    """Inside, a launch compiles the kernel for `target` without running it, and adds (kernel, compiled) to the list."""
    launches: list[tuple[JITFunction, Any]] = []
    run = JITFunction.run

    def note(self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        launches.append((self, compiled))
        return compiled

    before, driver._active = driver._active, Offline(target)
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = run, before
