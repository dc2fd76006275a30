"""Samplers, guidance and thresholding on data whose best denoiser is known in closed form: Gaussian mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastimagen.config import ObjectiveConfig, SamplingConfig, ScheduleConfig
from fastimagen.diffusion.guidance import Denoiser
from fastimagen.diffusion.process import Diffusion
from fastimagen.diffusion.samplers import SAMPLERS, sample_ddpm
from fastimagen.diffusion.schedule import Flow, Schedule, make_schedule
from fastimagen.seeds import image_noise, mix_seed

PREDICTIONS = ("epsilon", "x0", "v", "edm")


class Mixture:
    """A one-dimensional Gaussian mixture under the forward process: everything about it is known exactly."""

    def __init__(self, weights: list[float], means: list[float], deviations: list[float]) -> None:
        self.weights, self.means, self.deviations = (
            torch.tensor(x, dtype=torch.float64) for x in (weights, means, deviations)
        )
        self.mean = (self.weights * self.means).sum().item()
        square = (self.weights * (self.deviations**2 + self.means**2)).sum().item()
        self.deviation = math.sqrt(square - self.mean**2)

    def x0(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x_0 | x_t = x]: the Gaussian posterior mean of each component, weighted by its responsibility."""
        x, mean = x[..., None], alpha * self.means
        variance = (alpha * self.deviations) ** 2 + sigma**2
        responsibility = torch.softmax(
            self.weights.log() - variance.log() / 2 - (x - mean) ** 2 / (2 * variance), dim=-1
        )
        return (responsibility * (self.means + alpha * self.deviations**2 / variance * (x - mean))).sum(dim=-1)

    def cdf(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """P(x_t < x)."""
        deviation = ((alpha * self.deviations) ** 2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr((x[..., None] - alpha * self.means) / deviation)).sum(dim=-1)

    def flow(self, x: Tensor, start: tuple[float, float], stop: tuple[float, float] = (1.0, 0.0)) -> Tensor:
        """The end of the probability-flow ODE from x: in one dimension paths keep their quantile. By bisection."""
        quantile, low, high = self.cdf(x, *start), torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, *stop) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def denoise(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, time: self.x0(x, *schedule.alpha_sigma(time))


SMOOTH = Mixture([0.4, 0.6], [-0.6, 0.5], [0.35, 0.25])
SHARP = Mixture([0.25, 0.45, 0.3], [-0.7, 0.1, 0.8], [0.1, 0.2, 0.05])
QUANTILES = (torch.arange(500, dtype=torch.float64) + 0.5) / 500


def level(schedule: Schedule, time: float) -> tuple[float, float]:
    alpha, sigma = schedule.alpha_sigma(torch.tensor(time, dtype=torch.float64))
    return alpha.item(), sigma.item()


def flow_error(name: str, mixture: Mixture, schedule: Schedule, times: Tensor) -> float:
    """Mean distance of a sampler's results from the exact probability flow, over the whole distribution."""
    start, stop = level(schedule, times[0].item()), level(schedule, times[-1].item())
    x = torch.special.ndtri(QUANTILES)
    result = SAMPLERS[name](mixture.denoise(schedule), x, times, schedule=schedule)
    return (result - mixture.flow(x, start, stop)).abs().mean().item()


# ---- accuracy


def order(errors: list[float]) -> float:
    """Order of convergence from errors at steps that double each time."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


@pytest.mark.parametrize("name, expected", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(name="flow")])
def test_order_of_convergence_away_from_the_ends(name: str, expected: int, config: ScheduleConfig) -> None:
    schedule = make_schedule(config)
    errors = [
        flow_error(name, SMOOTH, schedule, torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
        for steps in (32, 64, 128)
    ]
    assert order(errors) == pytest.approx(expected, abs=0.05)
    assert errors[-1] < (3e-3 if expected == 1 else 5e-5)


@pytest.mark.parametrize("name, low, high", [("ddim", 0.95, 1.05), ("dpmpp_2m", 1.2, 2.05), ("heun", 1.95, 2.05)])
def test_order_of_convergence_from_noise_to_image(name: str, low: float, high: float) -> None:
    """The multistep method loses a logarithm at both ends, where even steps in t never become short in log-SNR."""
    schedule = make_schedule(ScheduleConfig(logsnr_range=(-40.0, 40.0)))
    errors = [flow_error(name, SMOOTH, schedule, schedule.sampling_times(steps)) for steps in (64, 128, 256)]
    assert low < order(errors) < high
    assert errors[-1] < (3e-3 if name == "ddim" else 2e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_noise_is_left_for_any_bounds(name: str, steps: int) -> None:
    """If the data is a single point, every sampler ends at it exactly, even where the log-SNR ends at 5."""
    for config in (
        ScheduleConfig(),
        ScheduleConfig(logsnr_range=(-5.0, 5.0)),
        ScheduleConfig(name="linear", timesteps=20),
        ScheduleConfig(name="flow", shift=2.0),
    ):
        schedule = make_schedule(config)
        x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        result = SAMPLERS[name](
            lambda x, time: torch.full_like(x, 0.3),
            x,
            schedule.sampling_times(steps),
            schedule=schedule,
            noise=lambda step: torch.ones_like(x),
        )
        assert (result - 0.3).abs().max() < 1e-12


@pytest.mark.parametrize(
    "name, evaluations, allowed", [("ddim", 32, 0.02), ("dpmpp_2m", 32, 0.015), ("heun", 15, 0.04), ("heun", 31, 0.02)]
)
@pytest.mark.parametrize(
    "config", [ScheduleConfig(), ScheduleConfig(logsnr_range=(-40.0, 40.0)), ScheduleConfig(name="flow")]
)
def test_common_step_counts_are_accurate(name: str, evaluations: int, allowed: float, config: ScheduleConfig) -> None:
    """Three sharp modes and the step counts that people use. Heun in sigma / alpha errs by 0.24 with 15, or by 10^4."""
    schedule = make_schedule(config)
    steps, calls = (evaluations + 1) // 2 if name == "heun" else evaluations, []
    denoise = SHARP.denoise(schedule)

    def counted(x: Tensor, time: Tensor) -> Tensor:
        calls.append(time.item())
        return denoise(x, time)

    x = torch.special.ndtri(QUANTILES)
    result = SAMPLERS[name](counted, x, schedule.sampling_times(steps), schedule=schedule)
    error = (result - SHARP.flow(x, level(schedule, 1.0))).abs().mean().item()
    assert len(calls) == evaluations and min(calls) >= 0
    assert error < allowed


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(name="flow")])
def test_samples_have_the_distribution_of_the_data(name: str, config: ScheduleConfig) -> None:
    """Kolmogorov's distance and two moments against the mixture; 20,000 samples, whose sampling error is 0.01.

    DDPM's lower posterior variance is exact if the data is one point; here it loses 2 % of the deviation in 100 steps.
    """
    schedule, steps = make_schedule(config), 250 if name == "ddpm" else 50
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)
    result = SAMPLERS[name](
        SMOOTH.denoise(schedule),
        x,
        schedule.sampling_times(steps),
        schedule=schedule,
        noise=lambda step: torch.randn(x.shape, generator=generator, dtype=torch.float64),
    )
    ranks = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert (SMOOTH.cdf(result.sort().values) - ranks).abs().max() < 0.02
    assert result.mean().item() == pytest.approx(SMOOTH.mean, abs=0.015)
    assert result.std().item() == pytest.approx(SMOOTH.deviation, rel=0.02)


def test_ddpm_is_equation_7_over_all_steps() -> None:
    """Against DDPM's posterior in betas, written independently, with the same noise."""
    timesteps = 50
    schedule = make_schedule(ScheduleConfig(name="linear", timesteps=timesteps))
    noise = torch.randn(timesteps, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.special.ndtri(QUANTILES[::5])
    result = sample_ddpm(
        SHARP.denoise(schedule),
        start,
        schedule.sampling_times(timesteps),
        schedule=schedule,
        noise=lambda step: noise[step],
    )
    betas = [1e-4 * 20 + (0.02 - 1e-4) * 20 * step / (timesteps - 1) for step in range(timesteps)]
    x = start
    for step in reversed(range(timesteps)):
        beta, bar = betas[step], math.prod(1 - b for b in betas[: step + 1])
        bar_before = math.prod(1 - b for b in betas[:step])
        x0 = SHARP.x0(x, math.sqrt(bar), math.sqrt(1 - bar))
        x = math.sqrt(bar_before) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar) * x
        x = x + math.sqrt((1 - bar_before) / (1 - bar) * beta) * noise[timesteps - 1 - step]
    assert (result - x).abs().max() < 1e-9


def test_ddim_is_equation_12() -> None:
    schedule = make_schedule(ScheduleConfig(name="linear", timesteps=100))
    x = start = torch.special.ndtri(QUANTILES)
    times = schedule.sampling_times(5)
    result = SAMPLERS["ddim"](SHARP.denoise(schedule), start, times, schedule=schedule)
    for time, then in zip(times.tolist(), times.tolist()[1:]):
        (alpha, sigma), (alpha_then, sigma_then) = level(schedule, time), level(schedule, then)
        epsilon = (x - alpha * SHARP.denoise(schedule)(x, torch.tensor(time))) / sigma
        x = alpha_then * (x - sigma * epsilon) / alpha + sigma_then * epsilon
    assert (result - x).abs().max() < 1e-9


def test_the_velocity_of_gaussian_data_flows_to_the_data() -> None:
    """Gaussian data of mean m and deviation s. The network is the exact velocity E[noise - x_0 | x_t], written from the
    joint Gaussian of x_t with it; along its flow x_0 = m + s noise. DDIM is Euler's method on that velocity."""
    mean, deviation, steps = 0.2, 0.4, 400
    diffusion = Diffusion(ScheduleConfig(name="flow"), ObjectiveConfig(prediction="flow"))

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        t = time.double()[:, None] / 1000
        covariance = t - (1 - t) * deviation**2  # of x_t with noise - x_0
        return -mean + covariance / (t**2 + ((1 - t) * deviation) ** 2) * (x - (1 - t) * mean)

    noise = torch.special.ndtri(QUANTILES)[:, None]  # (B, 1)
    times = diffusion.schedule.sampling_times(steps)
    denoise = Denoiser(velocity, diffusion, SamplingConfig(threshold="none"))
    results = {
        name: SAMPLERS[name](denoise, noise, times, schedule=diffusion.schedule) for name in SAMPLERS if name != "ddpm"
    }
    exact = mean + deviation * noise
    assert all((result - exact).abs().max() < (8e-3 if name == "ddim" else 4e-4) for name, result in results.items())
    euler = noise
    for step in range(steps):
        t = torch.full((len(noise),), 1000 * (1 - step / steps), dtype=torch.float32)
        euler = euler - velocity(euler, t) / steps
    assert (results["ddim"] - euler).abs().max() < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_flow_and_cosine_are_one_process_in_two_scales(name: str) -> None:
    """At the same noise levels, samplers take the same steps, but for the scale of x_t."""

    class AsFlow(Flow):
        """Flow at the noise levels of the cosine schedule."""

        def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
            alpha, sigma = cosine.alpha_sigma(time)
            return alpha / (alpha + sigma), sigma / (alpha + sigma)

    cosine = make_schedule(ScheduleConfig())
    times = torch.linspace(0.9, 0.1, 6, dtype=torch.float64)
    noise = torch.randn(6, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.special.ndtri(QUANTILES)
    ends = []
    for schedule in (cosine, AsFlow()):
        alpha_t, sigma_t = level(schedule, 0.9)
        start = x * math.hypot(alpha_t, sigma_t)
        end = SAMPLERS[name](SHARP.denoise(schedule), start, times, schedule=schedule, noise=lambda step: noise[step])
        ends.append(end / math.hypot(*level(schedule, 0.1)))
    assert (ends[0] - ends[1]).abs().max() < 1e-12


# ---- robustness


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig(shift=16.0),
        ScheduleConfig(logsnr_range=(-60.0, 60.0)),
        ScheduleConfig(name="linear", timesteps=21),
        ScheduleConfig(name="linear", timesteps=1000),
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samplers_stay_finite_in_fp32(name: str, config: ScheduleConfig, prediction: str) -> None:
    _sample_finite(name, config, prediction)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["flow", "x0"])
def test_samplers_of_flow_stay_finite_in_fp32(name: str, prediction: str) -> None:
    _sample_finite(name, ScheduleConfig(name="flow", shift=3.0), prediction)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_minimagen_defect_4_twenty_steps_sample_without_nan(name: str, prediction: str) -> None:
    """T = 20 starts from alpha = 0, where MinImagen's samples are all NaN."""
    _sample_finite(name, ScheduleConfig(name="linear", timesteps=20), prediction)


def _sample_finite(name: str, config: ScheduleConfig, prediction: str) -> None:
    diffusion = Diffusion(config, ObjectiveConfig(prediction=prediction))
    generator = torch.Generator().manual_seed(0)

    def network(x: Tensor, time: Tensor) -> Tensor:  # any untrained output of order one
        return torch.sin(5 * x + 0.01 * time[:, None, None, None])

    for steps in (1, 2, 3, 20):
        denoise = Denoiser(network, diffusion, SamplingConfig())
        x = torch.randn(2, 1, 4, 4, generator=generator)
        result = SAMPLERS[name](
            denoise,
            x,
            diffusion.schedule.sampling_times(steps),
            schedule=diffusion.schedule,
            noise=lambda step: torch.randn(x.shape, generator=generator),
        )
        assert result.isfinite().all() and result.dtype == torch.float32
        assert result.abs().max() <= 1  # the last step returns the thresholded x0


@pytest.mark.parametrize("name", SAMPLERS)
def test_callbacks_see_every_step(name: str) -> None:
    schedule = make_schedule(ScheduleConfig())
    seen = []
    x = torch.special.ndtri(QUANTILES)
    result = SAMPLERS[name](
        SMOOTH.denoise(schedule),
        x,
        schedule.sampling_times(5),
        schedule=schedule,
        noise=lambda step: torch.zeros_like(x),
        callback=lambda *state: seen.append(state),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[-1][1].equal(result) and (seen[0][2] - SMOOTH.mean).abs().max() < 0.01


def test_ddpm_needs_noise() -> None:
    schedule, steps = make_schedule(ScheduleConfig()), []

    def noise(step: int) -> Tensor:
        steps.append(step)
        return torch.zeros_like(QUANTILES)

    sample_ddpm(SMOOTH.denoise(schedule), QUANTILES, schedule.sampling_times(4), schedule=schedule, noise=noise)
    assert steps == [0, 1, 2]  # the step to the clean image has none
    with pytest.raises(ValueError, match="ddpm is stochastic"):
        sample_ddpm(SMOOTH.denoise(schedule), QUANTILES, schedule.sampling_times(2), schedule=schedule)


# ---- seeds


def test_a_row_of_noise_depends_on_seed_stage_and_step_only() -> None:
    def draw(seeds: list[int], stage: str = "base", step: int = 3) -> Tensor:
        return image_noise(seeds, (3, 8, 8), stage=stage, step=step, device=torch.device("cpu"))

    torch.manual_seed(1)
    batch = draw([7, 0, 2**62, 7])
    torch.manual_seed(2)  # the global generator has no influence, and does not advance
    before = torch.random.get_rng_state()
    assert draw([0])[0].equal(batch[1]) and draw([2**62, 7]).equal(batch[2:]) and batch[0].equal(batch[3])
    assert torch.random.get_rng_state().equal(before)
    rows = [draw([7])[0], draw([8])[0], draw([7], stage="sr")[0], draw([7], step=4)[0], draw([7], step=-1)[0]]
    for first in range(len(rows)):
        for second in range(first):
            correlation = torch.corrcoef(torch.stack([rows[first].flatten(), rows[second].flatten()]))[0, 1]
            assert abs(correlation) < 0.3  # 192 numbers: 4 standard deviations
    assert batch.dtype == torch.float32 and batch.shape == (4, 3, 8, 8)


def test_noise_is_standard_normal_over_seeds_and_pixels() -> None:
    noise = image_noise(list(range(500)), (1, 8, 8), stage="base", step=0, device=torch.device("cpu")).double()
    ranks = (torch.arange(noise.numel(), dtype=torch.float64) + 0.5) / noise.numel()
    assert (torch.special.ndtr(noise.flatten().sort().values) - ranks).abs().max() < 0.01
    assert noise.flatten(1).mean(dim=0).abs().max() < 4.5 / math.sqrt(500)  # neighbouring seeds are not biased


def test_seeds_give_the_same_noise_in_every_version() -> None:
    # First 8 bytes of blake2b("0/base/-1"), big-endian, halved.
    assert mix_seed(0, "base", -1) == 5398578872981705063
    seeds = {mix_seed(seed, stage, step) for seed in range(20) for stage in ("base", "sr") for step in range(-1, 20)}
    assert len(seeds) == 20 * 2 * 21 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # the CPU's generator uses these bits only


# ---- guidance and thresholding


def both_halves(x: Tensor, time: Tensor) -> Tensor:
    """A network whose first half of the batch has captions; its output depends on time and input."""
    half = len(x) // 2
    assert x[:half].equal(x[half:]) and time[:half].equal(time[half:]) and time.shape == (2 * half,)
    caption = torch.arange(2 * half).lt(half).to(x)[:, None, None, None]
    return torch.sin(x) + caption * torch.cos(3 * x) + time[:, None, None, None] / 1000


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def x0_of(diffusion: Diffusion, weight: float, x: Tensor, time: Tensor) -> Tensor:
    return Denoiser(both_halves, diffusion, SamplingConfig(threshold="none"), guidance=weight)(x, time)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_on_the_output_is_guidance_on_epsilon_and_x0(prediction: str, x: Tensor) -> None:
    diffusion = Diffusion(ScheduleConfig(), ObjectiveConfig(prediction=prediction))
    for time in torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64):
        alpha, sigma = diffusion.schedule.alpha_sigma(time)
        network_time = diffusion.schedule.network_time(time).expand(3)
        x_in = diffusion.network_input(x, time)
        halves = both_halves(torch.cat([x_in, x_in]), torch.cat([network_time] * 2)).chunk(2)
        conditional, unconditional = (diffusion.x0(half, x, time) for half in halves)
        for weight in (0.0, 0.3, 1.0, 3.0, 18.0):  # Imagen, equation 2
            x0 = x0_of(diffusion, weight, x, time)
            assert x0.allclose(weight * conditional + (1 - weight) * unconditional, rtol=1e-9)
            epsilon_c, epsilon_u = ((x - alpha * half) / sigma for half in (conditional, unconditional))
            epsilon = weight * epsilon_c + (1 - weight) * epsilon_u
            assert ((x - alpha * x0) / sigma).allclose(epsilon, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fused_step_equals_the_formulas_of_the_samplers(name: str, x: Tensor) -> None:
    """A denoiser with `step` against the same as a plain function, with guidance and thresholding."""
    diffusion = Diffusion(ScheduleConfig(), ObjectiveConfig(prediction="v"))
    denoise = Denoiser(both_halves, diffusion, SamplingConfig(percentile=0.9), guidance=2.0)

    def sample(denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return SAMPLERS[name](
            denoise,
            x,
            diffusion.schedule.sampling_times(6),
            schedule=diffusion.schedule,
            noise=lambda step: torch.full_like(x, 0.1 * step),
        )

    torch.testing.assert_close(sample(denoise), sample(lambda x, time: denoise(x, time)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_scales_predicts_and_thresholds(kind: str, prediction: str) -> None:
    diffusion = Diffusion(ScheduleConfig(), ObjectiveConfig(prediction=prediction))
    sampling = SamplingConfig(threshold=kind, percentile=0.9)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0] *= 3
    images[1] *= 0.2
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    time = torch.tensor(0.6, dtype=torch.float64)
    x = diffusion.add_noise(images, noise, time)

    def network(x_in: Tensor, network_time: Tensor) -> Tensor:
        assert x_in.equal(diffusion.network_input(x, time))
        assert network_time.tolist() == pytest.approx([600.0, 600.0]) and network_time.dtype == torch.float32
        return diffusion.target(images, noise, time)

    found = Denoiser(network, diffusion, sampling)(x, time)
    if kind == "none":
        expected = images
    elif kind == "static":
        expected = images.clamp(-1, 1)
    else:  # Imagen, section 2.3: the quantile of each image, but at least 1
        expected = images.clone()
        for image in expected:
            s = max(1.0, sorted_quantile(image.abs().flatten(), 0.9))
            image.copy_(image.clamp(-s, s) / s)
        assert expected[1].equal(images[1]) and expected[0].abs().max() == 1
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("ceiling", [1.0, 1.7, 50.0])
def test_ceiling_limits_the_dynamic_threshold(ceiling: float) -> None:
    diffusion = Diffusion(ScheduleConfig(), ObjectiveConfig(prediction="x0"))
    images = 3 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = Denoiser(lambda x, time: images, diffusion, SamplingConfig(percentile=0.9, ceiling=ceiling))
    found = denoise(torch.zeros_like(images), torch.tensor(0.6, dtype=torch.float64))
    for image, thresholded in zip(images, found):
        s = min(max(1.0, sorted_quantile(image.abs().flatten(), 0.9)), ceiling)
        torch.testing.assert_close(thresholded, image.clamp(-s, s) / s)


def sorted_quantile(values: Tensor, percentile: float) -> float:
    """Linear interpolation between order statistics."""
    rank = percentile * (len(values) - 1)
    low, high = values.sort().values[int(rank) : int(rank) + 2]
    return (low + (rank - int(rank)) * (high - low)).item()


def test_thresholding_does_not_change_images_in_range() -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    diffusion = Diffusion(ScheduleConfig(), ObjectiveConfig(prediction="x0"))
    for kind in ("dynamic", "static", "none"):
        denoise = Denoiser(lambda x, time: x, diffusion, SamplingConfig(threshold=kind))
        assert denoise(images, torch.tensor(0.5, dtype=torch.float64)).equal(images)
