"""Who computes the fused ops: choosing, refusing, and saying so."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastimagen import ops
from tests.conftest import ROOT

backends = importlib.import_module("fastimagen.ops.dispatch")  # `ops.backend` is its function of that name
ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_requested", "auto")
    backends._announce.cache_clear()
    yield
    backends._announce.cache_clear()


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match='no backend "cuda"; there are auto, triton, torch, xformers'):
        ops.set_backend("cuda")
    assert ops.backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "there is no GPU; TRITON_INTERPRET=1|not installed"),
        ("xformers", "xformers needs a GPU|not installed"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(name: str, reason: str) -> None:
    code = f"from fastimagen import ops; ops.set_backend('{name}')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    last = child.stderr.splitlines()[-1]
    assert last.startswith(f'ValueError: backend "{name}" cannot run: ') and any(r in last for r in reason.split("|"))


def test_forcing_the_kernels_raises_for_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_requested", "triton")
    with pytest.raises(ValueError, match=r'attention with backend "triton": the kernel takes .* not float64'):
        ops.attention(torch.ones(1, 2, 1, 16, dtype=torch.float64), null_k=torch.ones(16), null_v=torch.ones(16))
    with pytest.raises(ValueError, match="16 to 128 channels per head in steps of 8, not 20"):
        ops.attention(torch.ones(1, 2, 1, 20), null_k=torch.ones(20), null_v=torch.ones(20))


def test_a_fallback_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backends, "_no_triton", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert backends.use_triton("attention", ON_GPU) and not caplog.records
        for _ in range(2):
            assert not backends.use_triton("attention", ON_GPU, "of a reason")
        assert not backends.use_triton("attention", ON_GPU, slower="of another")
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs in plain PyTorch: of a reason",
        "attention runs in plain PyTorch: of another",
    ]
    assert not backends.use_triton("attention", torch.ones(1))
    monkeypatch.setattr(backends, "_requested", "triton")
    assert backends.use_triton("attention", ON_GPU, slower="of another")


def test_the_choice_does_not_break_a_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What torch.compile meets on a GPU, where nothing has been asked or said yet."""

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if backends.no_triton() else x + 2

    def fall_back(x: torch.Tensor) -> torch.Tensor:
        backends.announce_once("told while tracing")
        return x * 2

    backends._no_triton.cache_clear()
    x = torch.ones(2)
    for function in (choose, fall_back):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), function(x))
    assert [record.getMessage() for record in caplog.records].count("told while tracing") == 1
