"""The kernels of group_norm_silu in Triton's interpreter, against float64. test_group_norm.py runs this file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastimagen import ops
from fastimagen_kernels import group_norm as kernels
from tests.kernels.group_norm_cases import NAMES, assert_close, errors, exact, inputs, results
from tests.kernels.interpreting import guarded, traffic

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]  # sigmoid(-100): 1 / inf is right


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    kernels.plan.cache_clear()  # the tests change how tensors are cut
    with guarded(kernels):
        yield


def cut_small(monkeypatch: pytest.MonkeyPatch, one_pass: bool) -> None:
    """Send all shapes down one path; small tiles, so that small tensors have several chunks of several tiles."""
    monkeypatch.setattr(kernels, "MAX_ONE_PASS", 1 << 20 if one_pass else 0)
    monkeypatch.setattr(kernels, "SECTOR", 0)
    monkeypatch.setattr(kernels, "TILE_ELEMENTS", {"forward": 256, "backward": 128})
    monkeypatch.setattr(kernels, "CHANNELS_LAST_WIDTH", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 8)


@pytest.mark.parametrize("path", ["one pass", "split"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "film", "activation"),
    [
        ((2, 24, 7, 5), 3, True, "silu"),
        ((1, 20, 7, 5), 5, False, "gelu"),  # 4 channels a group
        ((2, 36, 3, 3), 3, True, "none"),  # 12 channels a group
        ((3, 6, 1, 1), 2, True, "silu"),  # one pixel
        ((2, 5, 6, 4), 5, False, "none"),  # a channel a group
        ((1, 40, 4, 9), 1, True, "gelu"),  # one group: several pieces
    ],
    ids=str,
)
def test_output_and_gradients_match_float64(
    shape: tuple[int, ...],
    groups: int,
    film: bool,
    activation: str,
    last: bool,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch, path == "one pass")
    tensors = inputs(shape, film=film, last=last)
    got = results(ops.group_norm_silu, tensors, groups, activation)
    assert_close(got, exact(tensors, groups, activation))
    assert got["y"].stride() == got["dx"].stride() == tensors[1].stride()


@pytest.mark.parametrize("path", ["one pass", "split"])
def test_statistics_are_accurate_for_a_mean_of_100_deviations(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, path == "one pass")
    tensors = inputs((2, 16, 12, 10), last=True, mean=100.0)
    # x is exact here; what an input rounded at 100 would suffer anyway, 6e-8 * 100, is not added to the limit.
    assert_close(results(ops.group_norm_silu, tensors, 2), exact(tensors, 2))


@pytest.mark.parametrize(
    ("dtype", "vectors", "activation"),
    [
        (torch.bfloat16, None, "silu"),
        (torch.bfloat16, torch.float32, "gelu"),
        (torch.float16, None, "gelu"),
        (torch.float16, torch.float32, "silu"),
    ],
    ids=str,
)
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(
    dtype: torch.dtype, vectors: torch.dtype | None, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, False)
    tensors = inputs((2, 24, 7, 5), last=True, dtype=dtype, vectors=vectors)
    true = exact(tensors, 3, activation)
    got = results(ops.group_norm_silu, tensors, 3, activation)
    ops.set_backend("torch")
    theirs = results(ops.group_norm_silu, tensors, 3, activation)
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: t.dtype for name, t in theirs.items()}
    ours, limits = errors(got, true), errors(theirs, true)
    assert all(ours[name] <= 2 * limits[name] for name in NAMES), (ours, limits)


def test_result_is_bitwise_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, False)
    tensors = inputs((1, 24, 7, 5))
    first, *others = (results(ops.group_norm_silu, tensors, 3) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in NAMES)


@pytest.mark.parametrize("path", ["one pass", "split"])
def test_inputs_and_output_gradients_may_have_any_layout(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, path == "one pass")
    dy, x, *vectors = inputs((2, 12, 4, 6), last=True)
    true = exact([dy, x, *vectors], 3)
    for gradient in (dy.contiguous(), dy.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        assert_close(results(ops.group_norm_silu, [gradient, x, *vectors], 3), true)
    expanded = torch.ones(()).expand_as(x)  # the gradient of y.sum()
    assert_close(results(ops.group_norm_silu, [expanded, x, *vectors], 3), exact([expanded, x, *vectors], 3))
    for other in (
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], dim=1)[:, :12],
        torch.stack([x, x], dim=-1)[..., 0],
    ):
        assert_close(results(ops.group_norm_silu, [dy, other, *vectors], 3), true)


# Bytes of an element of 2 bytes: a tensor that is read twice takes 6 and 10 (docs/kernels.md), one that fits 4 and 6.
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "per_element"), [((1, 16, 64, 40), (6, 10)), ((1, 32, 16, 16), (4, 6))], ids=str)
def test_memory_traffic_per_element_is_as_documented(
    shape: tuple[int, ...], per_element: tuple[int, int], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles as they are shipped: x, y and their gradients are touched as often as planned, little else is."""
    dy, x, *vectors = inputs(shape, last=last, dtype=torch.bfloat16, vectors=torch.float32)
    x.requires_grad_()
    with traffic(monkeypatch) as moved:
        y = ops.group_norm_silu(x, *vectors[:2], 2, scale=vectors[2], shift=vectors[3])
        forward = moved(x, y)
        (dx,) = torch.autograd.grad(y, x, dy)
        backward = moved(dy, x, dx)
    for (planned, rest), expected in zip((forward, backward), per_element):
        assert planned == expected * x.numel() and rest < 0.15 * planned, (planned, rest)


def test_only_x_and_its_statistics_are_saved_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, False)
    _, x, *vectors = inputs((2, 24, 7, 5), last=True)
    leaves = [tensor.requires_grad_() for tensor in (x, *(vector.detach() for vector in vectors))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.group_norm_silu(*leaves[:3], 3, scale=leaves[3], shift=leaves[4])
    own = [tensor for tensor in kept if all(tensor.data_ptr() != leaf.data_ptr() for leaf in leaves)]
    assert [tuple(tensor.shape) for tensor in own] == [(2, 3), (2, 3)]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_offsets_beyond_2_to_the_32_elements(last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of every kernel, on a tensor of 2^33 elements: files that are almost all holes."""
    batch, channels, side, chunks = 2, 64, 8192, 1 << 14
    shape = (batch, channels, side, side)

    def sparse(name: str) -> Tensor:
        flat = torch.from_file(str(tmp_path / name), shared=True, size=math.prod(shape), dtype=torch.bfloat16)
        return flat.view(batch, side, side, channels).permute(0, 3, 1, 2) if last else flat.view(shape)

    x, y, dx = sparse("x"), sparse("y"), sparse("dx")
    monkeypatch.setattr(kernels, "MAX_PARTS", 1 << 20)
    monkeypatch.setattr(kernels, "PROGRAMS", batch * chunks * (1 if last else 16))
    cut = kernels.cut(shape, last, 1, 8192)
    rows = side * side // cut.chunks
    block = slice(channels - cut.constants["WIDTH"], None)
    assert cut.chunks == chunks and rows < side
    here = (batch - 1, block, side - 1, slice(side - rows, None))  # what the last program works on
    x[here] = (torch.randn(x[here].shape) + 1).bfloat16()
    true = x[here].double()

    def launch(kernel: object, first: bool, *arguments: object, **constants: object) -> None:
        """Run the program with the first or the last index alone."""
        program = [0] if first else [cut.programs - 1]
        monkeypatch.setattr(
            interpreter, "range", lambda *ends: program if ends == (cut.programs,) else range(*ends), raising=False
        )
        kernel[(cut.programs,)](*arguments, **constants)
        monkeypatch.delattr(interpreter, "range")

    # The arguments live on the CPU: copying them back would fill the holes.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *unused: None)
    constants = dict(C=channels, C_X=channels, CPG=channels, CHANNELS_LAST=last, SELECT=True, **cut.constants)
    position = (0, side * side, chunks, cut.tiles)
    parts = torch.full((batch, 1, cut.parts, 2), math.nan)
    launch(kernels.group_norm_silu_statistics_kernel, False, x, None, None, parts, 1.0, *position, **constants)
    count = true.numel()
    assert_close(
        {"mean": parts[-1, 0, -1, 0], "m2": parts[-1, 0, -1, 1]},
        {"mean": true.mean(), "m2": true.var(correction=0) * count},
    )

    one, zero = torch.ones(2), torch.zeros(2)
    # x_bias, weight, bias, scale, shift, film_bias
    vectors = (None, torch.ones(channels), torch.zeros(channels), None, None, None)
    scales = (0, 0, 1.0)
    parts[..., 0], parts[..., 1] = 0, count  # mean 0 and deviation 1
    constants |= dict(ACTIVATION="none")
    arguments = (x, None, y, *vectors, parts, zero, one, *scales, *position, 0.0)
    launch(kernels.group_norm_silu_forward_kernel, True, *arguments, **constants, PARTS=cut.parts)
    assert torch.equal(y[here], x[here])

    sums = torch.full((batch, chunks, 2, channels), math.nan)
    saved = (*vectors, zero, one)
    arguments = (x, x, None, *saved, sums, parts, *scales, *position)
    launch(kernels.group_norm_silu_backward_sums_kernel, False, *arguments, **constants)
    assert_close({"s2": sums[-1, -1, 1, block]}, {"s2": true.square().sum(dim=1)})

    parts[:], sums[:] = 0, 1
    samples = torch.full((batch, 2, channels), math.nan)
    arguments = (x, x, None, None, None, dx, None, *saved, sums, parts, None, samples, *scales, *position)
    launch(kernels.group_norm_silu_backward_kernel, True, *arguments, **constants, PARTS=cut.parts, CHUNKS=1024)
    assert torch.equal(dx[here], x[here])
    assert (samples[-1, :, block] == chunks).all()


def test_float64_raises_with_backend_triton() -> None:
    _, *leaves = inputs((1, 4, 2, 2), film=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="the kernel takes float32, bfloat16 and float16, not float64"):
        ops.group_norm_silu(*leaves, 2)


def test_operator_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, True)
    monkeypatch.setattr(kernels, "torch", torch)  # a guarded tensor has margins, which a fake one has not
    _, *leaves = inputs((1, 4, 2, 2), last=True)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    torch.library.opcheck(torch.ops.fastimagen.group_norm_silu, (*leaves, 2, 1e-5, "silu"))


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, True)
    tensors = inputs((2, 6, 2, 3), last=True)

    def network(x: Tensor, *vectors: Tensor, **options: object) -> Tensor:
        return ops.group_norm_silu(x * 1.5, *vectors, **options)

    eager = results(network, tensors, 2)
    torch._dynamo.reset()
    compiled = results(torch.compile(network, fullgraph=True, backend="aot_eager"), tensors, 2)
    assert_close(compiled, eager, 1e-6)
    assert compiled["y"].stride() == compiled["dx"].stride() == tensors[1].stride()
