"""Random numbers of training: a function of (seed, stage, position) alone, independent of each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastimagen.diffusion.draws import Draws, draw

IMAGES = torch.zeros(6, 3, 8, 8)
FIELDS = ("time", "level", "caption", "noise", "lowres_noise")


def at(positions: list[int], *, seed: int = 0, stage: str = "sr") -> Draws:
    return draw(seed, stage, positions, torch.zeros(len(positions), 3, 8, 8), lowres=True)


@pytest.mark.parametrize("field", FIELDS)
def test_a_sample_has_the_same_bits_in_every_batch_and_order(field: str) -> None:
    together = getattr(at([0, 1, 2, 3, 400_000_000_000]), field)
    for batch in ([2], [400_000_000_000, 3], [3, 1, 0, 2]):
        for row, position in zip(getattr(at(batch), field), batch):
            assert row.equal(together[[0, 1, 2, 3, 400_000_000_000].index(position)])


@pytest.mark.parametrize("field", FIELDS)
def test_seeds_stages_and_positions_are_unrelated(field: str) -> None:
    rows = [
        getattr(at([position], seed=seed, stage=stage), field)
        for seed, stage, position in itertools.product((0, 1, 10), ("base", "sr", "1"), (0, 1, 10))
    ]
    assert len(torch.cat(rows).flatten(1).unique(dim=0) if field.endswith("noise") else torch.cat(rows).unique()) == 27


def test_distributions() -> None:
    draws = at(list(range(4000)))
    for field in ("time", "level", "caption"):
        ranks = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        assert (getattr(draws, field).sort().values - ranks).abs().max() < 1.95 / math.sqrt(4000)  # Kolmogorov, 0.1 %
    assert draws.lowres_noise is not None
    for noise in (draws.noise, draws.lowres_noise):
        assert abs(noise.mean()) < 0.005 and abs(noise.std() - 1) < 0.005
    everything = torch.stack(
        [draws.time, draws.level, draws.caption, draws.noise[:, 0, 0, 0], draws.lowres_noise[:, 0, 0, 0]]
    )
    correlations = torch.corrcoef(everything.double()) - torch.eye(5)
    assert correlations.abs().max() < 4 / math.sqrt(4000)


def test_noise_is_like_the_images() -> None:
    base = draw(0, "base", range(6), IMAGES.double(), lowres=False)
    assert base.lowres_noise is None and base.noise.dtype == torch.float64 and base.noise.shape == IMAGES.shape
    with pytest.raises(AssertionError, match="one position per image"):
        draw(0, "base", range(5), IMAGES, lowres=False)
