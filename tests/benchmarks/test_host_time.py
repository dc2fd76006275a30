"""benchmarks/cases/host_time.py: what it times is the path to the kernels, and it leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks.cases import host_time
from fastimagen import ops
from fastimagen.ops import dispatch

CPU = torch.device("cpu")
LAUNCHES = {
    "self-attention B2 8x8": {"forward", "backward_rows", "backward_keys", "add_splits"},
    "cross-attention B2 8x8": {"forward", "backward_rows", "backward_keys"},
    "sampler step B2 64x64, dynamic": {"x0", "count", "finish"},
    "dynamic_threshold B2 64x64": {"count", "apply"},
}

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's own launches")


def passes(call: str, make: Callable[[torch.device], host_time.Call], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The passes of the kernels that a call launches."""
    launched: set[str] = set()

    def note(kernel: Any, *arguments: object, **options: object) -> None:
        launched.add(kernel.__name__)

    with host_time.stubbed(bound=False), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        make(CPU)()
    starts = ("attention_", "sampler_step_", "dynamic_threshold_", "group_norm_silu_", "modulated_norm_")
    found = {next(name.removeprefix(start) for start in starts if name.startswith(start)) for name in launched}
    return {name.removesuffix("_kernel") for name in found}


@pytest.mark.parametrize(("call", "mode"), list(host_time.CASES), ids=str)
def test_every_call_reaches_its_kernels(call: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(call, host_time.CASES[call, mode], monkeypatch)
    assert found
    if call in LAUNCHES:
        assert found == (LAUNCHES[call] if mode != "forward" or "attention" not in call else {"forward"})


def test_host_time_is_measured_and_the_backend_restored() -> None:
    run = JITFunction.run
    with host_time.stubbed(bound=False):
        times = host_time.host_times(host_time.CASES["dynamic_threshold B2 64x64", "forward"](CPU), CPU, 0.01)
    assert 0 < times.p20 <= times.p50 <= times.p80 < 100
    assert ops.backend() == "auto" and not dispatch.interpreting() and JITFunction.run is run
