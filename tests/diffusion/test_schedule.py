"""Noise schedules against closed forms and an independent float64 computation of DDPM's betas."""

from __future__ import annotations

import math

import pytest
import torch

from fastimagen.config import ScheduleConfig
from fastimagen.diffusion.schedule import Schedule, make_schedule

SHIFTS = (0.25, 1.0, 2.0, 16.0)
BOUNDS = ((-15.0, 15.0), (-10.0, 20.0), (-40.0, 40.0))
TIMESTEPS = (20, 21, 25, 100, 1000, 4000)


def cosine(shift: float = 1.0, logsnr_range: tuple[float, float] = (-15.0, 15.0)) -> Schedule:
    return make_schedule(ScheduleConfig(name="cosine", shift=shift, logsnr_range=logsnr_range))


def linear(timesteps: int) -> Schedule:
    return make_schedule(ScheduleConfig(name="linear", timesteps=timesteps))


SCHEDULES = {
    **{
        f"cosine {s} {b}": (cosine(s, b), torch.linspace(0, 1, 2001, dtype=torch.float64))
        for s in SHIFTS
        for b in BOUNDS
    },
    **{f"linear {n}": (linear(n), torch.arange(n)) for n in TIMESTEPS},
}
"""Name -> schedule and all, or many, of its times from clean to noise."""


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_a_straight_line_whose_noise_is_shifted(shift: float) -> None:
    schedule = make_schedule(ScheduleConfig(name="flow", shift=shift))
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    assert (alpha + sigma - 1).abs().max() < 1e-15 and (sigma.diff() > 0).all()
    inner = slice(1, -1)
    plain = times[inner] / (1 - times[inner])
    assert (sigma[inner] / alpha[inner]).allclose(shift * plain, rtol=1e-12)
    assert schedule.time_of((alpha**2 / sigma**2).log()[inner]).allclose(times[inner], atol=1e-12)
    for time, clean, noise in ((-1, 1, 0), (0, 1, 0), (1, 0, 1)):
        assert [c.item() for c in schedule.alpha_sigma(torch.tensor(time))] == [clean, noise]
    assert schedule.sampling_times(4).tolist() == [1, 0.75, 0.5, 0.25, -1]
    assert schedule.network_time(torch.tensor(0.25)).item() == 250


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_and_noise_increases(name: str) -> None:
    schedule, times = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(times)
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == times.shape
    assert (alpha**2 + sigma**2 - 1).abs().max() < 4e-15
    ratio = alpha / sigma
    assert ratio.isfinite().all() and (ratio.diff() < 0).all()


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_linear_is_ddpm_with_rescaled_betas(timesteps: int) -> None:
    alpha, sigma = linear(timesteps).alpha_sigma(torch.arange(timesteps))
    first, last = 1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps
    product = 1.0
    for step in range(timesteps):
        product *= 1 - (first + (last - first) * step / (timesteps - 1))
        assert alpha[step].item() == pytest.approx(math.sqrt(product), rel=1e-11)
        assert sigma[step].item() == pytest.approx(math.sqrt(1 - product), rel=1e-11)


def test_linear_ends_where_ddpm_ends() -> None:
    alpha, _ = linear(1000).alpha_sigma(torch.tensor(999))
    assert alpha.item() ** 2 == pytest.approx(4.0358e-5, rel=1e-4)  # alpha_bar_T of Ho et al.'s betas


@pytest.mark.parametrize("shift", SHIFTS)
def test_cosine_is_shifted_in_log_snr(shift: float) -> None:
    times = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = cosine(shift, (-60.0, 60.0)).alpha_sigma(times)
    cosine_logsnr = 2 * (torch.cos(math.pi * times / 2) / torch.sin(math.pi * times / 2)).log()
    assert ((alpha**2 / sigma**2).log() - (cosine_logsnr - 2 * math.log(shift))).abs().max() < 1e-9
    # As documented in ScheduleConfig: sigma / alpha is `shift` times that of the plain cosine.
    plain_alpha, plain_sigma = cosine(1.0, (-60.0, 60.0)).alpha_sigma(times)
    assert (sigma / alpha / (plain_sigma / plain_alpha) / shift - 1).abs().max() < 1e-9


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_cosine_reaches_its_bounds_and_stays_close_to_the_unbounded_one(
    shift: float, bounds: tuple[float, float]
) -> None:
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = cosine(shift, bounds).alpha_sigma(times)
    logsnr = 2 * (alpha.log() - sigma.log())
    assert logsnr[0].item() == pytest.approx(bounds[1], abs=1e-6)
    assert logsnr[-1].item() == pytest.approx(bounds[0], abs=1e-6)
    # The angle of the unshifted cosine differs from pi t / 2 by at most what the bounds cut off at the ends.
    angle = torch.atan(sigma / alpha / shift)
    cut = max(angle[0].item(), math.pi / 2 - angle[-1].item())
    assert (angle - math.pi * times / 2).abs().max() <= cut * (1 + 1e-9)
    assert (angle.diff() - angle.diff().mean()).abs().max() < 1e-12  # uniform: no range of t has one log-SNR


def test_default_bounds_change_angles_as_little_as_documented() -> None:
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = cosine().alpha_sigma(times)
    assert (torch.atan2(sigma, alpha) - math.pi * times / 2).abs().max() < 0.0006


@pytest.mark.parametrize("name", SCHEDULES)
def test_minus_one_is_the_clean_image(name: str) -> None:
    schedule, _ = SCHEDULES[name]
    for time in (torch.tensor(-1), torch.tensor([-1.0, -1.0], dtype=torch.float64)):
        alpha, sigma = schedule.alpha_sigma(time)
        assert (alpha == 1).all() and (sigma == 0).all()


def test_network_time() -> None:
    assert linear(100).network_time(torch.tensor([0, 7, 99])).tolist() == [0.0, 7.0, 99.0]
    assert cosine().network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]
    for schedule, time in ((linear(100), torch.tensor(3)), (cosine(), torch.rand(2, dtype=torch.float64))):
        assert schedule.network_time(time).dtype == torch.float32


def test_cosine_sampling_times_are_even_and_end_at_the_clean_image() -> None:
    grid = cosine().sampling_times(4)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, -1.0]
    assert cosine().sampling_times(1).tolist() == [1.0, -1.0]


def test_linear_sampling_times_are_respaced_and_end_at_the_clean_image() -> None:
    assert linear(1000).sampling_times(4).tolist() == [999.0, 749.0, 499.0, 249.0, -1.0]
    assert linear(1000).sampling_times(3).tolist() == [999.0, 666.0, 332.0, -1.0]  # rounded to nearest
    assert linear(1000).sampling_times(1).tolist() == [999.0, -1.0]
    for timesteps in (20, 25, 50, 1000):
        assert linear(timesteps).sampling_times(timesteps).tolist() == list(range(timesteps - 1, -2, -1))
    for timesteps in (20, 37, 64):
        for steps in range(1, timesteps + 1):  # rounding repeats no step
            grid = linear(timesteps).sampling_times(steps)
            assert (grid.diff() <= -1).all() and grid[0] == timesteps - 1 and grid[-1] == -1


def test_training_times_cover_the_schedule_evenly() -> None:
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)  # 1.0 is an augmentation level
    steps = linear(40).training_times(uniform)
    assert steps.dtype == torch.int64
    counts = steps[:-1].bincount(minlength=40)
    assert (counts - 100).abs().max() <= 1 and steps[-1] == 39
    assert cosine().training_times(uniform).equal(uniform)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_inverts_the_schedule(name: str) -> None:
    schedule, times = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(times)
    logsnr = 2 * (alpha.log() - sigma.log())
    assert (schedule.time_of(logsnr) - times).abs().max() < 1e-9
    beyond = schedule.time_of(torch.tensor([100.0, math.inf, -math.inf]))
    assert beyond.tolist() == [times[0], times[0], times[-1]]


def test_time_of_takes_the_nearest_step() -> None:
    schedule = linear(100)
    alpha, sigma = schedule.alpha_sigma(torch.arange(100))
    logsnr = 2 * (alpha / sigma).log()
    asked = torch.linspace(10, -10, 501, dtype=torch.float64)
    assert schedule.time_of(asked).equal((logsnr[None] - asked[:, None]).abs().argmin(dim=1))


def test_fewer_than_20_linear_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 20 timesteps, got 19: betas exceed 1"):
        linear(19)


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    with pytest.raises(ValueError, match="26 sampling steps, but the schedule has 25 timesteps"):
        linear(25).sampling_times(26)


@pytest.mark.parametrize(
    "shift, bounds",
    [
        (1.0, (-71.0, 15.0)),
        (1.0, (-2000.0, 15.0)),
        (1e30, (-15.0, 15.0)),
    ],
)
def test_bounds_beyond_float64_are_refused(shift: float, bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"logsnr_range .* is out of reach") as error:
        cosine(shift, bounds)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", [(-15.0, math.inf), (math.nan, 15.0)])
def test_bounds_that_are_not_finite_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite number"):
        cosine(1.0, bounds)


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(name="linear", timesteps=50)])
def test_schedules_made_under_the_meta_device_have_values(config: ScheduleConfig) -> None:
    with torch.device("meta"):  # where networks are built before their weights are read
        schedule = make_schedule(config)
        grid = schedule.sampling_times(5)
    alpha, _ = schedule.alpha_sigma(grid)
    assert alpha.device.type == "cpu" and alpha.isfinite().all()
