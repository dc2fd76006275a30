"""Networks applied tile by tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen.diffusion.tiling import in_tiles


def image(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 16), (70, 33, 32), (16, 40, 16), (20, 20, 64)])
def test_tiles_change_nothing_for_a_network_without_neighbourhood(height: int, width: int, side: int) -> None:
    """The output of a pixel depends on that pixel only, so tiles and the whole image agree."""
    x, lowres = image(height, width), image(height, width).flip(0)
    sizes = []

    def network(x: Tensor, lowres: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return torch.sin(3 * x) + lowres

    torch.testing.assert_close(in_tiles(network, side, x, lowres=lowres), network(x, lowres), rtol=1e-12, atol=1e-12)
    assert set(sizes[:-1]) == {(min(side, height), min(side, width))}


def test_the_overlap_hides_seams() -> None:
    """Each tile has another constant: the difference between neighbours is spread over their overlap."""
    calls = iter(range(100))
    tiled = in_tiles(lambda x: torch.full_like(x, float(next(calls))), 32, image(32, 104))  # 4 tiles, 24 apart
    row = tiled[0, 0, 0]
    assert row[0] == 0 and row[-1] == 3
    assert (row.diff().abs() <= 1 / 8).all() and (row.diff() >= 0).all()


def test_pixels_far_from_the_borders_of_a_tile_are_those_of_the_whole_image() -> None:
    x = image(96, 96)
    kernel = torch.randn(3, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def network(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=2)

    whole, tiled = network(x), in_tiles(network, 64, x)
    assert torch.allclose(whole[..., :30, :30], tiled[..., :30, :30])  # only the first tile reaches there
    assert (whole - tiled).abs().mean() < 0.05 * whole.abs().mean()
