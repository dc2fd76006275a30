"""What steps of DeepSpeed do to the weights, against the formulas: Muon on our layers, accumulated gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastimagen.networks.convolution import Conv2d
from fastimagen.train.deepspeed_config import resolve_deepspeed
from fastimagen.train.engine import init_distributed, make_engine
from fastimagen.train.flat_weights import FlatWeights
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

MUON, ADAM, MOMENTUM, BETAS = 0.01, 0.002, 0.95, [0.9, 0.99]
STEPS = 5
BF16_GRADIENTS = (256.0, *[1.0] * 7)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv2d(3, 8, 3, padding=1)
        self.embedding_to_film = nn.Linear(4, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.out(self.conv(x).mean(dim=(2, 3)) * self.embedding_to_film(vector))


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(4, *shape, generator=generator) for shape in ((3, 6, 6), (4,), (2,))) for _ in range(STEPS)
    ]


CONFIGS = {
    "muon": {
        "optimizer": {
            "type": "Muon",
            "params": {"muon_lr": MUON, "adam_lr": ADAM, "momentum": MOMENTUM, "betas": BETAS, "weight_decay": 0.0},
        }
    },
    "whole": {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True},
    "accumulated": {
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": 4,
    },
}


def with_deepspeed() -> dict[str, Any]:
    """The weights after a few steps of DeepSpeed with each of CONFIGS, and bf16 sums, in this process."""
    init_distributed()
    return {**{name: trained(tree) for name, tree in CONFIGS.items()}, "bf16": [bf16_sum(stage) for stage in (1, 2, 3)]}


class Scale(nn.Module):
    """One weight, whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def bf16_sum(stage: int) -> float:
    """The fp32 master weight after one SGD step, of learning rate 1, on the mean of BF16_GRADIENTS."""
    keys = {
        "train_batch_size": len(BF16_GRADIENTS),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    # As if there were a GPU: otherwise the run would be fp32.
    config, _ = resolve_deepspeed(keys, {}, steps=1, world_size=1, cuda=True, tensorboard="", job_name="")
    engine = make_engine(Scale(), config, muon=set())
    for gradient in BF16_GRADIENTS:
        engine.backward(engine(torch.full((4,), gradient, dtype=torch.bfloat16)))
        engine.step()
    return FlatWeights(engine).shards[0][0].item()


def trained(tree: dict) -> dict[str, list]:
    torch.manual_seed(0)
    config, _ = resolve_deepspeed(
        {"train_batch_size": 4, **tree}, {}, steps=STEPS, world_size=1, cuda=False, tensorboard="", job_name=""
    )
    engine = make_engine(Net(), config, muon={"conv.weight", "out.weight"})
    for batch in batches():
        for x, vector, target in zip(*(part.split(config["train_micro_batch_size_per_gpu"]) for part in batch)):
            engine.backward(F.mse_loss(engine(x, vector), target))
            engine.step()
    return {name: parameter.tolist() for name, parameter in engine.module.named_parameters()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    script = (
        "import json; from tests.train.test_deepspeed_steps import with_deepspeed; print(json.dumps(with_deepspeed()))"
    )
    # DeepSpeed's Muon orthogonalizes in bf16 on CPUs that multiply in bf16. Without that it does so in fp32.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def orthogonal(matrix: Tensor) -> Tensor:
    """Muon's quintic of the singular values, five times (Jordan 2024), by a singular value decomposition."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def by_hand() -> dict[str, Tensor]:
    """The same steps from the formulas, in float64: matrices by Muon, vectors and embeddings by Adam."""
    torch.manual_seed(0)
    net = Net().double()
    muon = [net.conv.weight, net.out.weight]
    adam = torch.optim.AdamW(
        [p for p in net.parameters() if all(p is not q for q in muon)], lr=ADAM, betas=BETAS, weight_decay=0.0
    )
    momenta = [torch.zeros_like(p) for p in muon]
    for x, vector, target in batches():
        net.zero_grad()
        F.mse_loss(net(x.double(), vector.double()), target.double()).backward()
        adam.step()
        with torch.no_grad():
            for parameter, momentum in zip(muon, momenta):
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                rows, columns = parameter.shape
                update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM)) * max(1, rows / columns) ** 0.5
                parameter -= MUON * update
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def test_muon_steps_are_those_of_its_formula(weights: dict) -> None:
    for name, expected in by_hand().items():
        torch.testing.assert_close(torch.tensor(weights["muon"][name]).double(), expected, rtol=0, atol=2e-5, msg=name)


def test_bf16_gradients_of_micro_batches_are_not_lost(weights: dict) -> None:
    """The mean is -263 / 8 = -32.875. A sum in bf16 stays at 256, and the weight at -32.

    ZeRO 1 rounds the sum to bf16 once, when it reduces gradients: -33."""
    assert weights["bf16"] == [-33.0, -32.875, -32.875]


def test_defect_6_accumulated_micro_batches_are_one_averaged_batch(weights: dict) -> None:
    for name, expected in weights["whole"].items():
        torch.testing.assert_close(
            torch.tensor(weights["accumulated"][name]), torch.tensor(expected), rtol=0, atol=1e-6
        )
