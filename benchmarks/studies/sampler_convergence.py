"""How close the samplers come with how many network evaluations, where the best possible network is known exactly.

    python -m benchmarks.studies.sampler_convergence [--out docs/samplers.svg]

Data is a one-dimensional mixture of three Gaussians in [-1, 1], so E[x_0 | x_t] has a closed form. Measured is the
Wasserstein-1 distance between samples and data. Writes the plot, prints the numbers as a Markdown table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastimagen.diffusion.samplers import SAMPLERS
from fastimagen.diffusion.schedule import Schedule, make_schedule
from fastimagen.diffusion_config import ScheduleConfig

from ..harness.checkout import ROOT

WEIGHTS, MEANS, DEVIATIONS = (
    torch.tensor(x, dtype=torch.float64) for x in ((0.25, 0.45, 0.3), (-0.7, 0.1, 0.8), (0.1, 0.2, 0.05))
)
EVALUATIONS = (4, 8, 16, 32, 64, 128, 256)
SAMPLES = {"ddpm": 60_000, "ddim": 2000, "dpmpp_2m": 2000, "heun": 2000}
"""The stochastic sampler's results scatter like random numbers: even so many leave a distance of about 0.002."""
COLORS = {"ddpm": "#999999", "ddim": "#d55e00", "dpmpp_2m": "#0072b2", "heun": "#009e73"}
LABELS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "heun": "Heun"}

Points = list[tuple[int, float]]


def denoiser(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """x (N,), time -> E[x_0 | x_t = x] (N,): posterior means of the Gaussians, weighed by responsibility."""

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(time)
        variance = (alpha * DEVIATIONS) ** 2 + sigma**2
        off = x[:, None] - alpha * MEANS  # (N, 3)
        share = torch.softmax(WEIGHTS.log() - variance.log() / 2 - off**2 / (2 * variance), dim=1)
        return (share * (MEANS + alpha * DEVIATIONS**2 / variance * off)).sum(dim=1)

    return denoise


def data_quantiles(ranks: Tensor) -> Tensor:
    """The mixture's quantiles (N,), by bisection of its distribution function."""
    low, high = torch.full_like(ranks, -3.0), torch.full_like(ranks, 3.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((middle[:, None] - MEANS) / DEVIATIONS)).sum(dim=1) < ranks
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def distance(name: str, steps: int, schedule: Schedule) -> float:
    """Wasserstein-1 distance to the data after `steps` steps from evenly spread Gaussian noise."""
    samples = SAMPLES[name]
    ranks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    normal, generator = torch.special.ndtri(ranks), torch.Generator().manual_seed(0)

    def noise(step: int) -> Tensor:  # evenly spread too, in random order: far less scatter than independent draws
        return normal[torch.randperm(samples, generator=generator)]

    x = SAMPLERS[name](denoiser(schedule), noise(-1), schedule.sampling_times(steps), schedule=schedule, noise=noise)
    return (x.sort().values - data_quantiles(ranks)).abs().mean().item()


def measure(schedule: Schedule) -> dict[str, Points]:
    """Sampler -> (network evaluations, distance); Heun evaluates twice a step, but once in the last."""
    results: dict[str, Points] = {}
    for name in COLORS:
        per_step = 2 if name == "heun" else 1
        results[name] = [
            (evaluations - per_step + 1, distance(name, evaluations // per_step, schedule))
            for evaluations in EVALUATIONS
        ]
    return results


def draw(results: dict[str, Points]) -> str:
    """The plot as SVG, both axes logarithmic."""
    left, top, width, height = 64, 40, 440, 330
    lowest = math.floor(math.log10(min(error for points in results.values() for _, error in points)))

    def place(evaluations: float, error: float) -> tuple[float, float]:
        across = math.log2(evaluations / 3) / math.log2(EVALUATIONS[-1] / 3)
        return left + across * width, top + height * math.log10(error) / lowest

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 430" font-family="sans-serif" font-size="13">',
        '<rect width="660" height="430" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">Distance from the data, cosine schedule, exact network</text>',
    ]
    for power in range(0, lowest - 1, -1):
        y = place(3, 10.0**power)[1]
        parts += [
            f'<path d="M{left} {y:.1f}H{left + width}" stroke="#ddd"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>',
        ]
    for count in EVALUATIONS:
        x = place(count, 1)[0]
        parts += [
            f'<path d="M{x:.1f} {top}V{top + height}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{count}</text>',
        ]
    middle = left + width / 2
    parts.append(f'<text x="{middle}" y="{top + height + 40}" text-anchor="middle">network evaluations</text>')
    label_at = -math.inf
    for name, points in sorted(results.items(), key=lambda item: -item[1][-1][1]):  # worst first, which ends highest
        spots = [place(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLORS[name]}"/>' for x, y in spots]
        label_at = max(spots[-1][1] + 4, label_at + 16)
        parts.append(f'<text x="{left + width + 10}" y="{label_at:.1f}" fill="{COLORS[name]}">{LABELS[name]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def table(results: dict[str, Points]) -> str:
    """The numbers in Markdown."""
    rows = ["| evaluations | " + " | ".join(map(str, EVALUATIONS)) + " |", "|---" * (len(EVALUATIONS) + 1) + "|"]
    rows += [
        f"| {LABELS[name]} | " + " | ".join(f"{error:.4f}" for _, error in points) + " |"
        for name, points in results.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="accuracy of the samplers against network evaluations")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/samplers.svg", help="the plot")
    out = parser.parse_args().out
    results = measure(make_schedule(ScheduleConfig()))
    out.write_text(draw(results))
    print(table(results))


if __name__ == "__main__":
    main()
