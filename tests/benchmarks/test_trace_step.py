"""benchmarks/studies/trace_step.py: the launches of a toy network, and how single ops are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.jit import JITFunction

from benchmarks.harness import networks
from benchmarks.harness.rows import RESULTS
from benchmarks.studies import trace_step
from benchmarks.studies.trace_step import Recorder, Trace
from fastimagen.networks import convolution
from fastimagen.networks.unet import UNet
from fastimagen.ops import dispatch
from tests.conftest import ROOT

LAST = torch.channels_last


def counted(recorder: Recorder) -> dict[tuple[str, str], tuple[int, float]]:
    """(phase, kind) -> launches and bytes."""
    rows = recorder.rows.values()
    found = Trace("", 1, 0, 0, list(rows))
    keys = {(row.phase, row.kind) for row in rows}
    return {key: tuple(found.total(field, key[1:], key[0]) for field in ("launches", "bytes")) for key in keys}


@pytest.fixture(scope="module")
def toy() -> Trace:
    return trace_step.trace(networks.TOY_SUPER)


def test_matrix_flops_equal_those_of_pytorchs_counter(toy: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions and linear layers; attention has kernels of its own here."""
    monkeypatch.setattr(convolution, "WIDE_KERNEL", 99)  # on a CPU wide kernels compute more products
    unet = UNet(networks.TOY_SUPER.stage().config.unet)
    given, x = trace_step.inputs(unet.config, toy.batch, networks.TOY_SUPER.side)
    given["text"] = networks.captions(toy.batch, unet.config.text_dim, torch.device("cpu"))
    given["keep_text"] = torch.ones(toy.batch, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        unet(x, **given).square().mean().backward()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    expected = sum(counts.get(op, 0) for op in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm))
    assert toy.total("flops", ("convolution", "product")) == expected


def test_kernels_of_all_norms_and_attentions_are_recorded(toy: Trace) -> None:
    unet = UNet(networks.TOY_SUPER.stage().config.unet)
    norms = sum(type(module).__name__ == "GroupNormSiLU" for module in unet.modules())
    attentions = sum(type(module).__name__.endswith("Attention") for module in unet.modules())
    launches = {(row.phase, row.op): row.launches for row in toy.rows}
    forward = [count for (phase, op), count in launches.items() if phase == "forward" and op.startswith("group_norm")]
    assert sum(forward) >= norms > 10
    assert launches["forward", "attention_forward_kernel"] == attentions > 0
    assert launches["backward", "attention_backward_rows_kernel"] == attentions
    assert toy.activation_bytes > 0


def test_nothing_stays_replaced(toy: Trace) -> None:
    assert JITFunction.run.__module__.startswith("triton")
    assert torch.is_autocast_enabled("cpu") is False
    assert all(
        vars(module)[name] is getattr(dispatch, name)
        for key, module in sys.modules.items()
        if key.startswith("fastimagen.")
        for name in ("use_triton", "in_kernels")
        if name in vars(module)
    )


def test_launches_and_bytes_of_pytorchs_ops() -> None:
    """By hand, for one convolution and what surrounds it: bf16, maps of 2 * 8 * 4 * 4 elements."""
    size = 2 * 8 * 4 * 4 * 2
    x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="meta").to(memory_format=LAST).requires_grad_()
    weight = torch.empty(8, 8, 3, 3, dtype=torch.bfloat16, device="meta").to(memory_format=LAST).requires_grad_()
    bias = torch.empty(8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    recorder = Recorder()
    with recorder:
        y = F.conv2d(x, weight, bias, padding=1) + x
    recorder.phase = "backward"
    with recorder:
        y.backward(torch.empty_like(x, requires_grad=False))
    weights = 8 * 8 * 9 * 2
    assert counted(recorder) == {
        ("forward", "convolution"): (1, 2 * size + weights),
        ("forward", "bias add"): (1, 2 * size),
        ("forward", "residual add"): (1, 3 * size),
        ("backward", "convolution"): (2, 2 * (2 * size + weights)),
        ("backward", "bias-gradient sum"): (1, size),
        ("backward", "gradient add"): (1, 3 * size),
    }


def test_a_convolution_copies_an_input_in_the_other_layout() -> None:
    x, weight = torch.empty(2, 8, 4, 4, device="meta"), torch.empty(8, 8, 1, 1, device="meta")
    recorder = Recorder()
    with recorder:
        out = F.conv2d(x, weight)
    assert out.is_contiguous(memory_format=LAST)
    assert counted(recorder)["forward", "layout copy"] == (1, 2 * x.nbytes)


def test_products_in_place_read_their_addend_once() -> None:
    a, b, c = (torch.empty(16, 16, device="meta") for _ in range(3))
    recorder = Recorder()
    with recorder:
        c.addmm_(a, b)
    assert counted(recorder) == {("forward", "product"): (1, 4 * 1024)}
    with recorder:
        torch.addmm(c, a, b)  # CUDA copies the addend into the result first
    assert counted(recorder) == {("forward", "product"): (2, 8 * 1024), ("forward", "other"): (1, 2048)}


def test_expanded_tensors_are_read_once_and_views_are_free() -> None:
    recorder = Recorder()
    with recorder:
        x = torch.zeros(4, device="meta").expand(8, 4)
        (x + 1).view(4, 8).t()
    assert counted(recorder) == {("forward", "zero fill"): (1, 16), ("forward", "other"): (1, 16 + 128)}


def test_the_table_of_the_documentation_is_that_of_the_result_files() -> None:
    before, now = (trace_step.read(RESULTS / f"trace/{name}.json") for name in ("before", "after"))
    page = (ROOT / "docs/benchmarks.md").read_text()
    for one, other in zip(before, now, strict=True):
        assert trace_step.comparison(one, other) in page


def test_what_is_written_can_be_read(toy: Trace, tmp_path: Path) -> None:
    trace_step.write(tmp_path / "toy.json", [toy])
    assert trace_step.read(tmp_path / "toy.json") == [toy]
