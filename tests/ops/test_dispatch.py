"""Choosing the backend of the fused ops: errors, and logged fallbacks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastimagen import ops
from fastimagen.ops import dispatch
from tests.conftest import ROOT

ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def automatic_backend() -> Iterator[None]:
    ops.set_backend("auto")
    yield
    ops.set_backend("auto")


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match='no backend "cuda"; there are auto, triton, torch, xformers'):
        ops.set_backend("cuda")
    assert ops.backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("name", "reason"), [("triton", "there is no GPU; TRITON_INTERPRET=1"), ("xformers", "xformers needs a GPU")]
)
def test_backend_that_cannot_run_raises_with_the_reason(name: str, reason: str) -> None:
    if find_spec(name) is None:
        reason = f"{name} is not installed"
    code = f"from fastimagen import ops; ops.set_backend('{name}')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.stderr.splitlines()[-1].startswith(f'ValueError: backend "{name}" cannot run: {reason}')


def test_unsupported_arguments_raise_with_backend_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "no_triton", lambda: None)
    ops.set_backend("triton")
    with pytest.raises(ValueError, match=r'attention with backend "triton": the kernel takes .* not float64'):
        ops.attention(torch.ones(1, 2, 1, 16, dtype=torch.float64), null_k=torch.ones(16), null_v=torch.ones(16))
    with pytest.raises(ValueError, match="16 to 128 channels per head in steps of 8, not 20"):
        ops.attention(torch.ones(1, 2, 1, 20), null_k=torch.ones(20), null_v=torch.ones(20))


def test_each_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "no_triton", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert dispatch.use_triton("attention", ON_GPU) and not caplog.records
        for _ in range(2):
            assert not dispatch.use_triton("attention", ON_GPU, "the dtype is not supported")
        assert not dispatch.use_triton("attention", ON_GPU, slower="PyTorch is faster")
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs in plain PyTorch: the dtype is not supported",
        "attention runs in plain PyTorch: PyTorch is faster",
    ]
    assert not dispatch.use_triton("attention", torch.ones(1))
    ops.set_backend("triton")
    assert dispatch.use_triton("attention", ON_GPU, slower="PyTorch is faster")


def test_choosing_and_logging_do_not_break_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    """On a GPU torch.compile traces both."""

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch.no_triton() else x + 2

    def fall_back(x: torch.Tensor) -> torch.Tensor:
        dispatch.announce_once("logged while tracing")
        return x * 2

    x = torch.ones(2)
    for function in (choose, fall_back):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), function(x))
    assert [record.getMessage() for record in caplog.records].count("logged while tracing") == 1


def test_registered_operators_are_called_only_where_something_traces_them() -> None:
    def add_whether_traced(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if dispatch.traced() else 2)

    x = torch.zeros(2)
    torch._dynamo.reset()
    assert torch.compile(add_whether_traced, fullgraph=True, backend="eager")(x).tolist() == [1, 1]
    assert add_whether_traced(x).tolist() == [2, 2]
    with FakeTensorMode():
        assert dispatch.traced()
    assert not dispatch.traced()
