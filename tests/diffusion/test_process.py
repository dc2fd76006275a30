"""Noising, targets, losses and weights against float64 formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen.config import ObjectiveConfig, ScheduleConfig
from fastimagen.diffusion.process import Diffusion

PREDICTIONS = ("epsilon", "x0", "v", "edm")  # of schedules that preserve the variance
SCHEDULES = {
    **{f"cosine {shift}": ScheduleConfig(shift=shift) for shift in (0.25, 1.0, 4.0, 16.0)},
    **{f"linear {n}": ScheduleConfig(name="linear", timesteps=n) for n in (20, 21, 25, 100, 1000, 4000)},
}
REFUSED = {("linear 20", "epsilon"), ("linear 20", "edm")}
POSSIBLE = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) not in REFUSED]
FLOWS = {f"flow {shift}": ScheduleConfig(name="flow", shift=shift) for shift in (1.0, 3.0)}
SCHEDULES |= FLOWS
POSSIBLE += [(s, p) for s in FLOWS for p in ("flow", "x0")]
PURE_NOISE = ScheduleConfig(name="linear", timesteps=20)


def make(schedule: str | ScheduleConfig = "cosine 1.0", **objective: object) -> Diffusion:
    schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    return Diffusion(schedule, ObjectiveConfig(**objective))


def all_times(schedule: str) -> Tensor:
    """Every step of a discrete schedule; continuous time in fine steps, both ends included."""
    timesteps = SCHEDULES[schedule].timesteps
    return torch.arange(timesteps) if timesteps else torch.linspace(0, 1, 501, dtype=torch.float64)


def data(times: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(images in [-1, 1], noise), (B, 1, 4, 4) for B times."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(times), 1, 4, 4)
    images = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return images.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- x0 from the output


@pytest.mark.parametrize("schedule, prediction", POSSIBLE)
def test_the_exact_output_gives_the_image(schedule: str, prediction: str) -> None:
    diffusion, times = make(schedule, prediction=prediction), all_times(schedule)
    images, noise = data(times)
    x_t = diffusion.add_noise(images, noise, times)
    restored = diffusion.x0(diffusion.target(images, noise, times), x_t, times)
    assert restored.dtype == torch.float64
    assert (restored - images).abs().max() < 1e-9


@pytest.mark.parametrize("schedule, prediction", POSSIBLE)
def test_the_exact_output_gives_the_image_in_fp32(schedule: str, prediction: str) -> None:
    diffusion, times = make(schedule, prediction=prediction), all_times(schedule)
    images, noise = data(times, torch.float32)
    x_t = diffusion.add_noise(images, noise, times)
    restored = diffusion.x0(diffusion.target(images, noise, times), x_t, times)
    alpha, _ = diffusion.schedule.alpha_sigma(times)
    allowed = 4 * torch.finfo(torch.float32).eps / (alpha if prediction == "epsilon" else torch.ones_like(alpha))
    assert ((restored - images).abs().flatten(1).max(dim=1).values <= allowed).all()


def test_noising_is_equation_4_of_ddpm() -> None:
    diffusion, times = make("linear 1000"), torch.tensor([0, 500, 999])
    images, noise = data(times)
    x_t = diffusion.add_noise(images, noise, times)
    for row, time in enumerate(times.tolist()):
        alpha_bar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * step / 999) for step in range(time + 1))
        expected = math.sqrt(alpha_bar) * images[row] + math.sqrt(1 - alpha_bar) * noise[row]
        assert (x_t[row] - expected).abs().max() < 1e-12


def test_targets_of_epsilon_x0_and_v() -> None:
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    images, noise = data(times)
    alpha, sigma = (c[:, None, None, None] for c in make().schedule.alpha_sigma(times))
    assert make(prediction="epsilon").target(images, noise, times).equal(noise)
    assert make(prediction="x0").target(images, noise, times).equal(images)
    v = alpha * noise - sigma * images  # Salimans and Ho 2022
    assert (make(prediction="v").target(images, noise, times) - v).abs().max() < 1e-14


def test_the_target_of_flow_is_the_velocity_of_the_straight_path() -> None:
    """x_t = x_0 + t (noise - x_0): the target is dx_t/dt, the same at all times."""
    diffusion = make("flow 1.0", prediction="flow")
    times = torch.tensor([0.2, 0.8], dtype=torch.float64)
    images, noise = data(times)
    images[1], noise[1] = images[0], noise[0]
    target = diffusion.target(images, noise, times)
    slope = diffusion.add_noise(images, noise, times + 1e-3) - diffusion.add_noise(images, noise, times)
    assert (slope / 1e-3 - target).abs().max() < 1e-9 and target[0].equal(target[1])


@pytest.mark.parametrize(
    "schedule, prediction, message",
    [
        *(("flow 1.0", p, f'the schedule "flow" needs .* "x0", got "{p}"') for p in ("epsilon", "v", "edm")),
        ("cosine 1.0", "flow", 'set schedule.name to "flow", or use "v", the velocity of the cosine'),
        ("linear 20", "flow", "the velocity of the linear schedule"),
    ],
)
def test_the_prediction_must_belong_to_the_schedule(schedule: str, prediction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(schedule, prediction=prediction)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_table_1_of_karras(sigma_data: float) -> None:
    diffusion = make(prediction="edm", sigma_data=sigma_data)
    times = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    images, noise = data(times)
    alpha, sigma = (c[:, None, None, None] for c in diffusion.schedule.alpha_sigma(times))
    level = sigma / alpha
    noisy = images + level * noise  # variance exploding, as in the paper
    c_skip = sigma_data**2 / (level**2 + sigma_data**2)
    c_out = level * sigma_data / (level**2 + sigma_data**2).sqrt()
    c_in = 1 / (level**2 + sigma_data**2).sqrt()
    x_t = diffusion.add_noise(images, noise, times)
    assert (diffusion.network_input(x_t, times) - c_in * noisy).abs().max() < 1e-11
    assert (diffusion.target(images, noise, times) - (images - c_skip * noisy) / c_out).abs().max() < 1e-9
    output = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (diffusion.x0(output, x_t, times) - (c_skip * noisy + c_out * output)).abs().max() < 1e-11


def test_edm_inputs_and_targets_have_unit_variance_at_every_time() -> None:
    diffusion, times = make(prediction="edm", sigma_data=0.5), torch.linspace(0, 1, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(5, 20_000, generator=generator, dtype=torch.float64) for _ in range(2))
    images = 0.5 * images
    for values in (
        diffusion.network_input(diffusion.add_noise(images, noise, times), times),
        diffusion.target(images, noise, times),
    ):
        assert (values.std(dim=1) - 1).abs().max() < 0.03


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_only_edm_scales_the_network_input(prediction: str) -> None:
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x_t = data(times)[1]
    assert make(prediction=prediction).network_input(x_t, times).equal(x_t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("time", [torch.tensor([0.9, 0.9]), torch.tensor(0.9)])
def test_half_precision_is_promoted_to_fp32(prediction: str, time: Tensor) -> None:
    diffusion, times = make(prediction=prediction), torch.tensor([0.9, 0.9])
    images, noise = (x.bfloat16().float() for x in data(times))
    x_t = diffusion.add_noise(images, noise, times).bfloat16()
    output = diffusion.target(images, noise, times).bfloat16()
    assert diffusion.add_noise(images.bfloat16(), noise.bfloat16(), time).dtype == torch.float32
    restored = diffusion.x0(output, x_t, time)
    assert restored.dtype == torch.float32
    exact = diffusion.x0(output.double(), x_t.double(), times.double())
    assert (restored - exact).abs().max() < 1e-4


# ---- where alpha is 0


@pytest.mark.parametrize("prediction", ["epsilon", "edm"])
def test_minimagen_defect_4_twenty_steps_of_nan_are_refused(prediction: str) -> None:
    """MinImagen accepts T = 20, where the last beta is 1, and then every sample is NaN."""
    message = 'linear schedule with 20 timesteps ends in pure noise; use "v", "x0"'
    with pytest.raises(ValueError, match=message) as error:
        make(PURE_NOISE, prediction=prediction)
    assert "\n" not in str(error.value) and prediction in str(error.value)
    make(ScheduleConfig(name="linear", timesteps=21), prediction=prediction)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_minimagen_defect_4_twenty_steps_work_with_v_and_x0(prediction: str) -> None:
    diffusion, times = make(PURE_NOISE, prediction=prediction), torch.tensor([19])
    images, noise = data(times)
    assert diffusion.add_noise(images, noise, times).equal(noise)  # alpha = 0
    target = diffusion.target(images, noise, times)
    assert target.equal(images if prediction == "x0" else -images)
    assert diffusion.x0(target, noise, times).equal(images)


@pytest.mark.parametrize("schedule, prediction", POSSIBLE)
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_losses_and_weights_are_finite_at_every_time(schedule: str, prediction: str, weighting: str) -> None:
    diffusion = make(schedule, prediction=prediction, weighting=weighting)
    times = torch.cat([all_times(schedule), torch.tensor([-1])])  # the clean image too
    weight = diffusion.weight(times)
    assert weight.dtype == torch.float64 and weight.isfinite().all() and (weight >= 0).all()
    images, noise = data(times, torch.float32)
    x_t = diffusion.add_noise(images, noise, times)
    output = torch.zeros_like(images, requires_grad=True)
    loss = diffusion.loss(output, diffusion.target(images, noise, times), times)
    loss.sum().backward()
    for values in (
        x_t,
        diffusion.network_input(x_t, times),
        loss,
        output.grad,
        diffusion.x0(output.detach(), x_t, times),
    ):
        assert values.isfinite().all()


# ---- loss


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
def test_losses_equal_their_formulas(kind: str) -> None:
    times = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    diffusion = make(loss=kind, weighting="min_snr")
    target, output = data(times)
    output = 3 * output  # errors on both sides of 1, where Huber's changes
    error = (output - target).abs()
    formula = {"l2": error**2, "l1": error, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[kind]
    expected = formula.flatten(1).mean(dim=1) * diffusion.weight(times)
    loss = diffusion.loss(output.float(), target.float(), times)
    assert loss.dtype == torch.float32 and loss.shape == (3,)
    assert loss.double().allclose(expected, rtol=1e-5)
    assert diffusion.loss(output.bfloat16(), target, times).dtype == torch.float32


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_loss_on_differences_equals_its_formula(kind: str, prediction: str) -> None:
    times = torch.tensor([0.3, 0.7], dtype=torch.float64)
    objective = dict(loss=kind, prediction=prediction, weighting="min_snr")
    target, output = (2 * image[:, :, :, :3] for image in data(times))  # (B, C, 4, 3)
    rows, columns = [], []
    for y in range(4):
        for x in range(3):
            error = output[:, :, y, x] - target[:, :, y, x]
            if x:
                rows.append(error - (output - target)[:, :, y, x - 1])
            if y:
                columns.append(error - (output - target)[:, :, y - 1, x])
    penalty = {"l2": torch.square, "l1": torch.abs, "huber": lambda e: F.huber_loss(e, 0 * e, reduction="none")}[kind]
    differences = sum(penalty(torch.stack(pairs)).mean(dim=(0, 2)) for pairs in (rows, columns))  # (B,)
    plain, weighted = make(**objective), make(**objective, difference_weight=0.7)
    added = weighted.loss(output.float(), target.float(), times) - plain.loss(output.float(), target.float(), times)
    torch.testing.assert_close(added.double(), 0.7 * differences * plain.weight(times), rtol=1e-5, atol=1e-6)
    shifted = target + 0.3  # an error without differences
    assert weighted.loss(shifted, target, times).allclose(plain.loss(shifted, target, times))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("schedule", ["cosine 1.0", "linear 1000"])
def test_min_snr_weights_are_those_of_hang(schedule: str, gamma: float) -> None:
    times = all_times(schedule)
    alpha, sigma = make(schedule).schedule.alpha_sigma(times)
    snr = alpha**2 / sigma**2
    limited = snr.clamp(max=gamma)
    level, sigma_data = sigma / alpha, 0.5
    formulas = {
        "x0": limited,
        "epsilon": limited / snr,
        "v": limited / (snr + 1),  # Hang et al. 2023, section 3.4
        "edm": limited * (level * sigma_data) ** 2 / (level**2 + sigma_data**2),
    }  # times Karras et al.'s c_out^2
    for prediction, expected in formulas.items():
        diffusion = make(schedule, prediction=prediction, weighting="min_snr", min_snr_gamma=gamma)
        assert diffusion.weight(times).allclose(expected, rtol=1e-9, atol=0)
    assert make(schedule).weight(times).equal(torch.ones_like(alpha))


@pytest.mark.parametrize("schedule, prediction", [*(("cosine 1.0", p) for p in PREDICTIONS), ("flow 3.0", "flow")])
def test_min_snr_weights_the_image_error_equally_for_every_prediction(schedule: str, prediction: str) -> None:
    diffusion = make(schedule, prediction=prediction, weighting="min_snr", min_snr_gamma=5.0)
    times = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    images, noise = data(times)
    x_t, target = diffusion.add_noise(images, noise, times), diffusion.target(images, noise, times)
    output = target + 0.1 * noise.roll(1, 0)
    image_error = (diffusion.x0(output, x_t, times) - images).square().flatten(1).mean(dim=1)
    alpha, sigma = diffusion.schedule.alpha_sigma(times)
    expected = (alpha**2 / sigma**2).clamp(max=5.0) * image_error
    assert diffusion.loss(output, target, times).double().allclose(expected, rtol=1e-4)


# ---- training times

UNIFORM = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule, top", [("cosine 1.0", 1.0), ("linear 100", 99.0)])
def test_uniform_training_times(schedule: str, top: float) -> None:
    times = make(schedule).training_times(UNIFORM).double()
    assert times.shape == (20_000,) and times.min() >= 0 and times.max() <= top
    assert times.mean().item() == pytest.approx(top / 2, rel=0.02)
    assert times.std().item() == pytest.approx((top + (top > 1)) / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("schedule", ["flow 1.0", "cosine 4.0", "linear 4000"])
def test_logit_normal_training_times(schedule: str) -> None:
    """log(t / (1 - t)) is normal, before any shift: with flow and no shift it is the log noise level."""
    prediction = "flow" if schedule.startswith("flow") else "v"
    diffusion = make(schedule, prediction=prediction, times="logit_normal", logit_mean=-0.5, logit_std=0.8)
    times = diffusion.training_times(UNIFORM)
    logit = torch.logit((times.double() + 0.5) / 4000 if times.dtype == torch.int64 else times)
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.03) and logit.std().item() == pytest.approx(0.8, abs=0.03)
    if prediction == "flow":
        levels = make(schedule, prediction="flow", times="edm", edm_mean=-0.5, edm_std=0.8).training_times(UNIFORM)
        assert times.allclose(levels, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine 1.0", "cosine 4.0", "linear 4000"])
def test_edm_training_times_have_log_normal_noise_levels(schedule: str) -> None:
    diffusion = make(schedule, prediction="edm", times="edm", edm_mean=-0.8, edm_std=0.9)
    times = diffusion.training_times(UNIFORM)
    alpha, sigma = diffusion.schedule.alpha_sigma(times)
    level = (sigma / alpha).log()
    assert level.mean().item() == pytest.approx(-0.8, abs=0.03) and level.std().item() == pytest.approx(0.9, abs=0.03)
    standard = ((level + 0.8) / 0.9).sort().values
    ranks = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert (
        torch.special.ndtr(standard) - ranks
    ).abs().max() < 0.015  # Kolmogorov distance from the normal distribution
