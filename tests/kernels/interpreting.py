"""Runs kernels in Triton's interpreter, and makes the interpreter faster and more like a GPU.

The tests in interpreted_OP.py need TRITON_INTERPRET=1 before kernels are imported. test_OP.py has one test for each of
them, and runs the selected ones together in one child process. Select by name, or call the file directly:

    python -m pytest tests/kernels/test_attention.py -k "interpreter and float64"
    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_attention.py -k "float64 and lengths"
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT

FOLDER = Path(__file__).parent
MARGIN = 256  # elements around every guarded tensor


def interpreted_tests(file: str) -> list[str]:
    """The names of the test functions in tests/kernels/`file`."""
    return re.findall(r"^def (test_\w+)\(", (FOLDER / file).read_text(), re.MULTILINE)


def run_interpreted(file: str, names: list[str], report: Path) -> dict[str, str]:
    """Run tests of tests/kernels/`file` in a child process with TRITON_INTERPRET=1; the output of those that failed.

    `report` is where the child writes its JUnit XML.
    """
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        + [f"{FOLDER / file}::{name}" for name in names],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), child.stdout + child.stderr
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[0]  # without its parameters
        failures = [found.text or "" for kind in ("failure", "error") for found in case.iter(kind)]
        outcomes[name] = outcomes.get(name, "") + "\n".join(failures)
    missing = dict.fromkeys(set(names) - outcomes.keys(), child.stdout + child.stderr)
    return {name: output for name, output in (outcomes | missing).items() if output}


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter patch triton.language once per launch, not for every call of a device function."""
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
    """Round fp32 to the nearest bf16, as a GPU does; the interpreter truncates."""
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
    """Fill what the launchers of `kernels` allocate with NaN, margins included, and check that the margins stay NaN."""
    buffers: list[Tensor] = []

    def guard(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = torch.full((math.prod(shape) + 2 * MARGIN,), math.nan, dtype=dtype)
        buffers.append(buffer)
        return buffer.as_strided(shape, stride, MARGIN)

    class Torch:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(
            self,
            *shape: int | tuple[int, ...],
            dtype: torch.dtype,
            device: torch.device,
            memory_format: torch.memory_format = torch.contiguous_format,
        ) -> Tensor:
            like = torch.empty(*shape, device="meta", memory_format=memory_format)
            return guard(like.shape, like.stride(), dtype)

        def empty_like(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return guard(like.shape, torch.empty_like(like, device="meta").stride(), dtype or like.dtype)

    kernels.torch = Torch()
    try:
        yield
    finally:
        kernels.torch = torch
    assert all(buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all() for buffer in buffers)


@contextmanager
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, int]]]:
    """Inside, the function counts bytes that kernels loaded and stored since it was called last.

    Those in the given tensors, and those in everything else.
    """
    from triton.runtime import interpreter

    touched: list[tuple[np.ndarray, int]] = []
    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{kind}") for kind in ("load", "store"))

    def note(pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        # An address that several threads of a program ask for at once is read once.
        touched.append(
            (np.unique(pointers.data[mask.data.astype(bool)]), pointers.get_element_ty().primitive_bitwidth // 8)
        )

    def noted_load(self: object, pointers: object, mask: object, *rest: object) -> object:
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self: object, pointers: object, value: object, mask: object, *rest: object) -> object:
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def moved(*tensors: Tensor) -> tuple[int, int]:
        spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        inside = sum(size * sum(((at >= low) & (at < high)).sum() for low, high in spans) for at, size in touched)
        everything = sum(size * at.size for at, size in touched)
        touched.clear()
        return int(inside), int(everything - inside)

    with monkeypatch.context() as patches:
        patches.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted_load)
        patches.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted_store)
        yield moved
