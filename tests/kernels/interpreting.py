"""Kernels in Triton's interpreter: a process for them, and what makes it faster and truer to a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT

MARGIN = 256  # elements around every guarded tensor


def run_interpreted(file: str) -> None:
    """Run the tests of tests/kernels/`file` with TRITON_INTERPRET=1, which must be set before kernels are imported."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/kernels/{file}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language again for every call of a helper; once for a launch is enough."""
    from triton.runtime import interpreter

    done: set[int] = set()
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang(function: Callable) -> interpreter._LangPatchScope:
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(function.__globals__))
        return patch(function)

    def call(self: interpreter.GridExecutor, *arguments: object, **options: object) -> None:
        done.clear()
        launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 off where it makes bf16 of it; a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


@contextmanager
def guarded(kernels: ModuleType) -> Iterator[None]:
    """What the launchers of `kernels` allocate is full of NaN, and so are its margins, which must stay so."""
    buffers: list[Tensor] = []

    def guard(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = torch.full((math.prod(shape) + 2 * MARGIN,), math.nan, dtype=dtype)
        buffers.append(buffer)
        return buffer.as_strided(shape, stride, MARGIN)

    class Torch:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            return guard(*((like := torch.empty(*shape, device="meta")).shape, like.stride()), dtype)

        def empty_like(self, like: Tensor) -> Tensor:
            return guard(like.shape, torch.empty_like(like, device="meta").stride(), like.dtype)

    kernels.torch = Torch()
    try:
        yield
    finally:
        kernels.torch = torch
    assert all(buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all() for buffer in buffers)
