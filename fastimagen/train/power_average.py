"""Power-function averages of the weights, and how one of any length is made of others after training.

The average of length sigma_rel after n updates weights the weights after update s with a density proportional to
s^gamma on [0, n]; sigma_rel is the standard deviation of that density, as a share of n. Training tracks two of them,
and a sum over snapshots of both is close to any other (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C: "post-hoc EMA").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TRACKED = (0.05, 0.10)
"""sigma_rel of the averages that every training keeps, as in the paper."""
MAX_SIGMA_REL = 12**-0.5
"""That of gamma = 0, the plain mean over all of training: a longer average would weight early weights most."""
QUANTITIES = {sigma_rel: f"ema_{sigma_rel:.2f}" for sigma_rel in TRACKED}
"""Names of the tracked averages in checkpoints."""


class Source(NamedTuple):
    """A tracked average of a snapshot: the number of updates so far, and its length."""

    updates: int
    sigma_rel: float


def gamma(sigma_rel: float) -> float:
    """The exponent of a length: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of the
    density (s / n)^gamma, normalised.

    Raises ValueError outside of 0 < sigma_rel < MAX_SIGMA_REL.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"the length of an average must lie between 0 and {MAX_SIGMA_REL:.3f}, got {sigma_rel:g}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(sigma_rel: float, update: int) -> float:
    """Decay of update number `update`, counted from 1: the first one forgets the initial weights."""
    return (1 - 1 / update) ** (gamma(sigma_rel) + 1)


def combine(sources: Sequence[Source], target: Source) -> tuple[list[float], float]:
    """Factors of the sources whose sum is nearest to `target`, and how near, as a share of the target's density.

    Least squares between densities in closed form, float64. Differs from the paper because the factors
    must add up to 1: otherwise few snapshots would scale all weights, whose fluctuations are small beside them.
    """
    updates = np.array([source.updates for source in [*sources, target]], dtype=np.float64) / target.updates
    exponents = np.array([gamma(source.sigma_rel) for source in [*sources, target]])
    dots = _dot(updates[:, None], exponents[:, None], updates, exponents)  # (n + 1, n + 1)
    scale = 1 / np.sqrt(dots.diagonal())
    dots = dots * scale[:, None] * scale  # unit densities, so that short and long ones count alike
    among, towards = dots[:-1, :-1], dots[:-1, -1]
    sums = scale[:-1] / scale[-1]
    # Lagrange: [among sums; sums 0] [factors; multiplier] = [towards; 1]
    bordered = np.block([[among, sums[:, None]], [sums, np.zeros(1)]])
    factors = np.linalg.lstsq(bordered, np.append(towards, 1), rcond=1e-15)[0][:-1]
    distance = 1 - 2 * factors @ towards + factors @ among @ factors
    return list(factors * sums), float(np.sqrt(max(distance, 0)))


def _dot(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Scalar products of the densities (gamma + 1) s^gamma / t^(gamma + 1) on [0, t]."""
    log_ratio = (gamma_a + gamma_b + 1) * np.log(np.minimum(t_a, t_b))
    log_ratio = log_ratio - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    dots: np.ndarray = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(log_ratio)
    return dots
