"""The loss of a learned variance against torch.distributions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastimagen.cascade import Stage
from fastimagen.config import ScheduleConfig, StageConfig
from fastimagen.diffusion.schedule import make_schedule
from fastimagen.diffusion.variance import hybrid_term
from tests.networks.test_lora import NETWORKS

STEPS = torch.tensor([0, 1, 2, 40, 700, 999])


def betas(name: str) -> torch.Tensor:
    """Written out from the papers, in float64."""
    if name == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = ((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


@pytest.mark.parametrize("name", ["squaredcos", "linear"])
def test_it_is_the_bound_of_one_step(name: str) -> None:
    torch.manual_seed(0)
    x0, predicted, variance = torch.randn(3, len(STEPS), 3, 4, 4, dtype=torch.float64) * 0.4
    x0.clamp_(-1, 1)[0, 0, 0] = torch.tensor([-1, 1, -1, 1])  # the first and last values of a pixel
    x0 = (((x0 + 1) * 127.5).round() / 127.5 - 1).float()
    predicted = (x0 + 0.01 * predicted.float()).requires_grad_()
    variance = variance.float().requires_grad_()
    schedule = make_schedule(ScheduleConfig(name=name, timesteps=1000))  # type: ignore[arg-type]
    got = hybrid_term(schedule, 1000, x0, predicted, variance, STEPS)

    beta = betas(name)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    floor = beta * (1 - before) / (1 - bar)
    floor[0] = floor[1]
    for row, step in enumerate(STEPS.tolist()):
        x_t = torch.randn(3, 4, 4, dtype=torch.float64)  # whatever it is: it cancels
        share = (variance[row].double() + 1) / 2
        std = torch.exp(0.5 * (share * beta[step].log() + (1 - share) * floor[step].log()))
        means = [
            before[step].sqrt() * beta[step] / (1 - bar[step]) * image
            + (1 - beta[step]).sqrt() * (1 - before[step]) / (1 - bar[step]) * x_t
            for image in (x0[row].double(), predicted[row].double())
        ]
        if step:
            nats = kl_divergence(Normal(means[0], floor[step].sqrt()), Normal(means[1], std))
        else:
            p, image = Normal(means[1], std), x0[row].double()
            above = torch.where(image > 0.999, 1.0, p.cdf(image + 1 / 255))
            nats = -(above - torch.where(image < -0.999, 0.0, p.cdf(image - 1 / 255))).log()
        expected = 0.001 * 1000 * nats.mean() / math.log(2)
        assert got[row].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7), step
    got.sum().backward()
    assert variance.grad is not None and variance.grad.flatten(1).abs().sum(dim=1).min() > 0
    assert predicted.grad is None


def test_no_term_is_left_where_the_model_is_right() -> None:
    """The true mean with the posterior's variance."""
    x0 = torch.zeros(5, 1, 2, 2)
    schedule = make_schedule(ScheduleConfig(name="squaredcos", timesteps=1000))
    assert hybrid_term(schedule, 1000, x0, x0, -torch.ones_like(x0), STEPS[1:]).abs().max() < 1e-6


def stage(**objective: object) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "base",
            "size": 8,
            "unet": NETWORKS["if"].model_dump() | {"lowres": False},
            "schedule": {"name": "squaredcos", "timesteps": 1000},
            "objective": {"prediction": "epsilon", **objective},
        }
    )


def test_a_stage_trains_the_variance_by_choice() -> None:
    """Frozen, its outputs get no gradient; with the hybrid loss the prediction's gradient stays what it was."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    gradients = {}
    for choice in ("frozen", "hybrid"):
        output = torch.full((2, 6, 8, 8), 0.1, requires_grad=True)
        made = Stage(stage(variance=choice))
        made.training_loss(
            lambda x, time, output=output: output, images, None, made.draw(0, [1, 2], images)
        ).sum().backward()
        assert output.grad is not None
        gradients[choice] = output.grad
    assert torch.equal(gradients["hybrid"][:, :3], gradients["frozen"][:, :3]) and gradients["frozen"][:, :3].any()
    assert not gradients["frozen"][:, 3:].any() and gradients["hybrid"][:, 3:].any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"unet": {**NETWORKS["if"].model_dump(), "lowres": False, "learned_variance": False}},
            "network predicts none",
        ),
        ({"schedule": {"name": "cosine"}}, "needs a discrete schedule"),
        ({"objective": {"prediction": "epsilon", "variance": "hybrid", "times": "edm"}}, '"times": "uniform"'),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        StageConfig.model_validate(stage(variance="hybrid").model_dump() | change)
