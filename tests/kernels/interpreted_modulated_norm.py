"""The kernels of modulated_norm in Triton's interpreter, against float64. test_modulated_norm.py runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastimagen import ops
from fastimagen.ops.modulated_norm import modulated_norm_reference
from fastimagen_kernels import modulated_norm as kernels
from tests.kernels.interpreting import guarded, traffic
from tests.kernels.modulated_norm_cases import exact, inputs, results

pytestmark = pytest.mark.usefixtures("interpreter")

# One token, one channel, more tokens than a program of the backward pass has, channels that are no power of two.
SHAPES = [(2, 1, 1), (3, 5, 7), (2, 70, 96), (1, 9, 1500), (1, 2, 4097)]


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    with guarded(kernels):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_good_as_pytorchs(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    found, expected = results(ops.modulated_norm, tensors), exact(tensors)
    plain = results(lambda x, scale, shift: modulated_norm_reference(x, scale, shift, 1e-5), tensors)
    for name, value in expected.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        error, of_plain = ((result[name].double() - value).abs().max() for result in (found, plain))
        assert error <= 2 * of_plain + 1e-5 * value.abs().max() + 1e-6, name


def test_large_means_keep_their_digits() -> None:
    tensors = inputs((2, 6, 96), torch.float32, offset=1000.0)
    found, expected = results(ops.modulated_norm, tensors), exact(tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-3)


def test_bits_are_reproducible_and_other_strides_give_the_same() -> None:
    tensors = inputs((2, 70, 24), torch.float32)
    first = results(ops.modulated_norm, tensors)
    strided = tensors | {
        "x": tensors["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "dy": tensors["dy"].transpose(1, 2).contiguous().transpose(1, 2),
        "scale": tensors["scale"].T.contiguous().T,
    }
    other = results(ops.modulated_norm, strided)
    assert all(torch.equal(first[name], other[name]) for name in first)
    expanded = results(ops.modulated_norm, tensors | {"dy": torch.ones(1, 1, 1).expand(2, 70, 24)})
    same = results(ops.modulated_norm, tensors | {"dy": torch.ones(2, 70, 24)})
    assert all(torch.equal(expanded[name], same[name]) for name in same)


def test_dtypes_may_differ() -> None:
    """Under autocast x is fp32 and the film layer's output bf16."""
    tensors = inputs((2, 6, 24), torch.float32)
    tensors |= {name: tensors[name].bfloat16() for name in ("scale", "shift")}
    found, expected = results(ops.modulated_norm, tensors), exact(tensors)
    assert found["y"].dtype == torch.float32 and found["dshift"].dtype == torch.bfloat16
    torch.testing.assert_close(found["dx"].double(), expected["dx"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["dscale"].double(), expected["dscale"], rtol=2**-7, atol=1e-2)


def test_tensors_move_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((2, 64, 96), torch.float32)
    size = tensors["x"].nbytes
    with traffic(monkeypatch) as moved:
        y, mean, rstd = kernels.modulated_norm_forward(tensors["x"], tensors["scale"], tensors["shift"], 1e-5)
        assert moved(tensors["x"], y)[0] == 2 * size
        dx, _ = kernels.modulated_norm_backward(tensors["dy"], tensors["x"], tensors["scale"], mean, rstd)
        assert moved(tensors["x"], tensors["dy"], dx)[0] == 3 * size


def test_what_the_kernel_cannot_take_raises_with_backend_triton() -> None:
    vector = torch.zeros(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="the kernel takes float32, bfloat16 and float16, not float64"):
        ops.modulated_norm(torch.zeros(1, 2, 4, dtype=torch.float64), vector, vector)
    wide = torch.zeros(1, 8193)
    with pytest.raises(ValueError, match="at most 8192 channels, not 8193"):
        ops.modulated_norm(wide[None], wide, wide)
