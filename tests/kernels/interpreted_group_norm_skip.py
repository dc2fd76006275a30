"""GroupNorm's kernels with a skip, biases and residual gradients, in the interpreter, against float64.

test_group_norm_skip.py runs this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from fastimagen_kernels import group_norm as kernels
from tests.kernels.group_norm_cases import assert_close, errors
from tests.kernels.group_norm_skip_cases import Tensors, composed, exact, inputs, results
from tests.kernels.interpreting import guarded, traffic

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]  # sigmoid(-100): 1 / inf is right

LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
PATHS = pytest.mark.parametrize("path", ["one pass", "split"])
BOTH = ("x_residual", "skip_residual")


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    kernels.plan.cache_clear()  # the tests change how tensors are cut
    with guarded(kernels):
        yield


def cut_small(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Send all shapes down one path; small tiles, so that small tensors have several chunks of several tiles."""
    monkeypatch.setattr(kernels, "MAX_ONE_PASS", 1 << 20 if path == "one pass" else 0)
    monkeypatch.setattr(kernels, "SECTOR", 0)
    monkeypatch.setattr(kernels, "TILE_ELEMENTS", {"forward": 256, "backward": 128})
    monkeypatch.setattr(kernels, "CHANNELS_LAST_WIDTH", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    monkeypatch.setattr(kernels, "CHUNKS", 2)


def fused(tensors: Tensors, groups: int) -> Tensors:
    return results(ops.group_norm_silu_residual, tensors, groups)


@PATHS
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "skip_channels", "groups", "film", "biases", "residuals"),
    [
        ((2, 15, 7, 5), 9, 3, True, True, BOTH),  # the second group lies in both tensors
        ((1, 4, 6, 4), 12, 2, False, False, ("x_residual",)),
        ((2, 20, 5, 3), 0, 5, True, True, ("x_residual",)),
        ((1, 29, 4, 9), 11, 1, False, True, ("skip_residual",)),  # one group: several pieces
        ((3, 3, 1, 1), 5, 2, True, False, ()),  # one pixel
    ],
    ids=str,
)
def test_every_gradient_matches_float64(
    shape: tuple[int, ...],
    skip_channels: int,
    groups: int,
    film: bool,
    biases: bool,
    residuals: tuple[str, ...],
    last: bool,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch, path)
    tensors = inputs(shape, skip_channels, film=film, biases=biases, residuals=residuals, last=last)
    got = fused(tensors, groups)
    assert_close(got, exact(tensors, groups))
    assert got["dx"].stride() == tensors["x"].stride() and got["y"].stride() == tensors["dy"].stride()
    assert not skip_channels or got["dskip"].stride() == tensors["skip"].stride()


@PATHS
def test_gradients_of_scale_and_shift_are_joined_without_a_copy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, path)
    tensors = inputs((2, 6, 3, 5), 0, residuals=(), last=True)
    true = exact(tensors, 3)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    film = torch.cat([tensors["scale"], tensors["shift"]], dim=1).requires_grad_()  # (B, 2 C)
    scale, shift = ops.halves(film, dim=1)
    vectors = dict(scale=scale, shift=shift, film_bias=tensors["film_bias"], x_bias=tensors["x_bias"])
    y = ops.group_norm_silu(x, weight, bias, 3, **vectors)
    monkeypatch.setattr(torch, "cat", lambda *unused: pytest.fail("a copy"))
    (dfilm,) = torch.autograd.grad(y, film, tensors["dy"])
    dscale, dshift = dfilm.chunk(2, dim=1)
    assert_close({"dscale": dscale, "dshift": dshift}, {name: true[name] for name in ("dscale", "dshift")})


def test_loads_of_x_and_skip_apart_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "split")
    tensors = inputs((2, 15, 7, 5), 9, last=True)
    at_once = fused(tensors, 3)
    monkeypatch.setattr(kernels, "architecture", lambda device: "gfx942")
    apart = fused(tensors, 3)
    assert all(torch.equal(apart[name], at_once[name]) for name in apart)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(
    dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, path)
    tensors = inputs((2, 15, 7, 5), 9, last=True, dtype=dtype)
    true = exact(tensors, 3)
    got, theirs = fused(tensors, 3), results(composed, tensors, 3)
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: t.dtype for name, t in theirs.items()}
    ours, limits = errors(got, true), errors(theirs, true)
    assert all(ours[name] <= 2 * limits[name] for name in true), (ours, limits)


@PATHS
def test_mean_of_1000_deviations_costs_no_more_than_its_rounding(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, path)
    tensors = inputs((2, 12, 12, 10), 4, residuals=(), last=True, mean=1000.0)
    # The mean is rounded to fp32, by 6e-8 of it.
    assert_close(fused(tensors, 4), exact(tensors, 4), 5e-6 + 1.2e-7 * 1000)


@pytest.mark.parametrize(("mean", "outlier"), [(100.0, 0.0), (0.0, 300.0)], ids=["mean", "outlier"])
def test_variance_over_many_tiles_errs_by_rounding(
    mean: float, outlier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pivot far from the mean, such as an outlier in the first pixel, would cost 3e-5."""
    cut_small(monkeypatch, "split")
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # one chunk of 120 tiles
    x = inputs((1, 16, 48, 40), 0, residuals=(), last=True, mean=mean)["x"]
    x[:, :, 0, 0] += outlier
    _, _, rstd = kernels.group_norm_forward(x, torch.ones(16), torch.zeros(16), None, None, 1, 0.0, False)
    assert abs(rstd.double() ** -2 / x.double().var(correction=0) - 1).item() < 4e-7


@PATHS
def test_result_is_bitwise_reproducible(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, path)
    tensors = inputs((2, 15, 7, 5), 9)
    first, second = fused(tensors, 3), fused(tensors, 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_and_gradients_may_have_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "split")
    tensors = inputs((2, 15, 4, 6), 9, last=True)
    true = exact(tensors, 3)
    for name in ("skip", "x_residual", "skip_residual"):
        assert_close(fused(tensors | {name: tensors[name].contiguous()}, 3), true)
    vectors = {
        name: torch.stack([tensors[name]] * 2, dim=-1)[..., 0] for name in ("weight", "bias", "film_bias", "x_bias")
    }
    assert_close(fused(tensors | vectors, 3), true)
    expanded = {name: torch.ones(()).expand_as(tensors[name]) for name in ("dy", "x_residual")}
    assert_close(fused(tensors | expanded, 3), exact(tensors | expanded, 3))


def test_gradients_that_do_not_arrive_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "split")
    tensors = inputs((1, 4, 3, 3), 4)
    x = tensors["x"].requires_grad_()
    _, same, skip = ops.group_norm_silu_residual(x, tensors["weight"], tensors["bias"], 2, skip=tensors["skip"])
    assert torch.equal(same, x) and torch.equal(skip, tensors["skip"]) and same.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(same.sum(), x)[0], torch.ones_like(x))


def test_second_derivative_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "one pass")
    tensors = inputs((1, 4, 3, 3), 0)
    x = tensors["x"].requires_grad_()
    y = ops.group_norm_silu(x, tensors["weight"], tensors["bias"], 2)
    with pytest.raises(RuntimeError, match="no second derivative; compute it in plain PyTorch"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_samples_in_launches_that_fit_into_l2_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "split")
    tensors = inputs((5, 15, 7, 5), 9, last=True)
    sample = 24 * 7 * 5 * 4  # bytes
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # the cut does not depend on the number of samples
    whole = fused(tensors, 3)
    kernels.plan.cache_clear()
    monkeypatch.setattr(kernels, "L2_BYTES", 4 * sample)  # forward: 5 samples in 2 launches; backward: in 3
    plans = [kernels.plan((5, 15, 7, 5), 9, True, 4, 3, True, direction) for direction in ("forward", "backward")]
    assert [plan.samples for plan in plans] == [3, 2]
    launched = fused(tensors, 3)
    assert all(torch.equal(launched[name], whole[name]) for name in whole)


def test_samples_of_a_launch_fit_into_l2_or_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "L2_BYTES", 1000)
    assert kernels.samples_in_l2(8, 1001) == 8  # the second pass would not read from L2 either
    assert kernels.samples_in_l2(8, 125) == 8  # all fit
    assert kernels.samples_in_l2(9, 125) == 5  # two launches of about the same size
    assert kernels.samples_in_l2(4, 1000) == 1
    assert kernels.samples_in_l2(5, 1000) == 5  # too many launches


@PATHS
@LAYOUTS
def test_memory_traffic_per_element_is_that_of_one_tensor(
    last: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x and skip are read where they are: 6 and 10 bytes as without them, 4 and 6 in one pass, 2 for the residuals."""
    shape = (1, 24, 64, 40) if path == "split" else (1, 24, 16, 16)
    tensors = inputs(shape, 8, last=last, dtype=torch.bfloat16)
    x, skip = tensors["x"].requires_grad_(), tensors["skip"].requires_grad_()
    vectors = {name: tensors[name] for name in ("weight", "bias", "scale", "shift", "film_bias", "x_bias")}
    with traffic(monkeypatch) as moved:
        y, x_again, skip_again = ops.group_norm_silu_residual(x, num_groups=2, skip=skip, **vectors)
        forward = moved(x, skip, y)
        outputs: list[Tensor] = [y, x_again, skip_again]
        arriving = [tensors[name] for name in ("dy", "x_residual", "skip_residual")]
        dx, dskip = torch.autograd.grad(outputs, [x, skip], arriving)
        backward = moved(x, skip, dx, dskip, *arriving)
    elements = y.numel()
    planned = (6, 12) if path == "split" else (4, 8)
    assert (forward[0] / elements, backward[0] / elements) == planned
    assert forward[1] < 0.15 * forward[0] and backward[1] < 0.15 * backward[0]


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, "one pass")
    tensors = inputs((2, 4, 2, 3), 2, last=True)
    eager = fused(tensors, 2)
    torch._dynamo.reset()
    compiled = torch.compile(ops.group_norm_silu_residual, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors, 2), eager)
