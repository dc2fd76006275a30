"""Targets of distillation, in float64, on Gaussian data: there the path of a sample is known in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastimagen.config import ScheduleConfig
from fastimagen.diffusion.distillation import Predict, Segments
from fastimagen.diffusion.schedule import Schedule, make_schedule

SCHEDULES = {
    "cosine": ScheduleConfig(shift=2.0),
    "linear": ScheduleConfig(name="linear", timesteps=1000),
    "flow": ScheduleConfig(name="flow"),
    "starts in pure noise": ScheduleConfig(name="linear", timesteps=20),
}
MEAN, DEVIATION = 0.3, 0.5  # of every pixel


def levels(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(c[:, None, None, None] for c in schedule.alpha_sigma(time))


def denoiser(schedule: Schedule) -> Predict:
    """E[x_0 | x_t] of N(MEAN, DEVIATION^2)."""

    def predict(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = levels(schedule, time)
        return MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)

    return predict


def moved(schedule: Schedule, x: Tensor, time: Tensor, to: Tensor) -> Tensor:
    """Where the probability-flow path through x at `time` is at `to`: the marginal's quantile stays the same."""
    (alpha, sigma), (alpha_q, sigma_q) = levels(schedule, time), levels(schedule, to)
    spread, spread_q = ((a**2 * DEVIATION**2 + s**2).sqrt() for a, s in ((alpha, sigma), (alpha_q, sigma_q)))
    return alpha_q * MEAN + spread_q / spread * (x - alpha * MEAN)


def leading(schedule: Schedule, x: Tensor, time: Tensor, to: Tensor) -> Tensor:
    """The x0 with which one DDIM step goes from x at `time` to `moved`: the consistency function."""
    (alpha, sigma), (alpha_q, sigma_q) = levels(schedule, time), levels(schedule, to)
    ratio = sigma_q / sigma
    return (moved(schedule, x, time, to) - ratio * x) / (alpha_q - ratio * alpha)


def exact(segments: Segments, to: Tensor) -> Predict:
    """The consistency function to the times `to` (B,)."""
    return lambda x, time: leading(segments.schedule, x, time, to)


def noisy(segments: Segments, start: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (len(start), 1, 2, 2)
    x0 = MEAN + DEVIATION * torch.randn(shape, generator=generator, dtype=torch.float64)
    alpha, sigma = levels(segments.schedule, segments.times[start])
    return alpha * x0 + sigma * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "substeps"), [(4, 5), (2, 8), (1, 4), (3, 1)])
def test_the_target_of_an_exact_student_is_the_consistency_function(name: str, steps: int, substeps: int) -> None:
    """From every time of the grid, if the teacher's single step is exact too."""
    segments = Segments.of(make_schedule(SCHEDULES[name]), steps, substeps)
    start = torch.arange(steps * substeps)
    end = segments.times[(start // substeps + 1) * substeps]
    x = noisy(segments, start)
    target = segments.target(start, x, exact(segments, segments.times[start + 1]), exact(segments, end))
    torch.testing.assert_close(target, leading(segments.schedule, x, segments.times[start], end), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_exact_steps_are_one_step(name: str) -> None:
    """All steps of the teacher to the end of the segment, each exact."""
    segments = Segments.of(make_schedule(SCHEDULES[name]), 4, 5)
    start = torch.arange(4) * 5
    x, calls = noisy(segments, start), []

    def teacher(x: Tensor, time: Tensor) -> Tensor:
        calls.append(time)
        return leading(segments.schedule, x, time, segments.times[start + len(calls)])

    target = segments.target(start, x, teacher)
    expected = leading(segments.schedule, x, segments.times[start], segments.times[start + 5])
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-9)
    assert [time.tolist() for time in calls] == [segments.times[start + offset].tolist() for offset in range(5)]


def test_more_substeps_of_a_real_teacher_converge_to_the_consistency_function() -> None:
    """DDIM has order 1: the error of the target halves when the substeps double."""
    schedule, errors = make_schedule(SCHEDULES["cosine"]), []
    for substeps in (16, 32, 64):
        segments = Segments.of(schedule, 4, substeps)
        start = torch.arange(4) * substeps
        x = noisy(segments, start)
        expected = leading(schedule, x, segments.times[start], segments.times[start + substeps])
        errors.append((segments.target(start, x, denoiser(schedule)) - expected)[:3].abs().max().item())
    assert errors[0] < 0.05
    assert all(1.7 < first / second < 2.3 for first, second in pairwise(errors)), errors


def test_a_target_lies_between_the_estimates_that_it_is_made_of() -> None:
    """Thresholded estimates give a target within [-1, 1], also where a step changes x hardly at all."""
    segments = Segments.of(make_schedule(ScheduleConfig(logsnr_range=(-20, 20))), 2, 64)
    start, signs = torch.arange(128), torch.tensor([1.0, -1.0]).double()

    def extreme(x: Tensor, time: Tensor) -> Tensor:
        return signs[torch.randint(2, x.shape, generator=torch.Generator().manual_seed(len(time)))]

    target = segments.target(start, noisy(segments, start), extreme, lambda x, time: -extreme(x, time))
    assert target.abs().max() <= 1 + 1e-12 and target.isfinite().all()
    (ends,) = torch.where(start % 64 == 63)  # the teacher's step is the last one: nothing is left for the student
    assert (target[ends].abs() == 1).all()


def test_starts_cover_the_grid_evenly() -> None:
    segments = Segments.of(make_schedule(ScheduleConfig()), 4, 8)
    uniform = torch.linspace(0, 1, 3201, dtype=torch.float64)[:-1]
    assert segments.start(uniform, inside=True).bincount().tolist() == [100] * 32
    counts = segments.start(uniform, inside=False).bincount().tolist()
    assert counts[::8] == [800] * 4 and sum(counts) == 3200
    assert segments.start(torch.tensor([1 - 2.0**-53], dtype=torch.float64), inside=True).item() == 31
    with pytest.raises(ValueError, match="24 sampling steps, but the schedule has 20 timesteps"):
        Segments.of(make_schedule(SCHEDULES["starts in pure noise"]), 4, 6)
