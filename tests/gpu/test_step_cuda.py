"""Whole training steps on a GPU: the same gradients as on a CPU, no waiting in between, one graph for the compiler."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import step
from benchmarks.harness import networks
from benchmarks.harness.networks import captions, images, make_unet
from fastimagen import ops

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TOYS = [networks.TOY, networks.TOY_SUPER]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("network", TOYS, ids=lambda network: network.name)
def test_gradients_equal_those_in_double_precision(network: networks.Network, backend: str) -> None:
    stage = network.stage()
    x, time = images(2, network.side, CPU), torch.tensor([3.0, 21.0])
    lowres = {"lowres": x, "lowres_time": time} if stage.config.unet.lowres else {}
    found = {}
    for device, dtype, name in ((CPU, torch.float64, "torch"), (CUDA, torch.float32, backend)):
        ops.set_backend(name)
        unet = make_unet(stage.config.unet, CPU, dtype).to(device)
        given = {key: value.to(device, dtype) for key, value in {"x": x, "time": time, **lowres}.items()}
        unet(**given, text=captions(2, stage.config.unet.text_dim, device)).square().mean().backward()
        found[device] = {key: p.grad.double().cpu() for key, p in unet.named_parameters()}
    largest = max(grad.norm() for grad in found[CPU].values())
    for key, right in found[CPU].items():
        error = (found[CUDA][key] - right).norm() / torch.maximum(right.norm(), 1e-4 * largest)
        assert error < 1e-3, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("network", TOYS, ids=lambda network: network.name)
def test_a_training_step_never_waits_for_the_gpu(network: networks.Network) -> None:
    one = step.ours(network, 2, CUDA)
    one()
    assert step.waits(one) == 0


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_compiler_sees_one_graph(backend: str) -> None:
    ops.set_backend(backend)
    network = networks.TOY
    unet = make_unet(network.stage().config.unet, CUDA, torch.float32)
    x, time, text = images(2, 16, CUDA), torch.tensor([3.0, 21.0], device=CUDA), captions(2, 32, CUDA)
    eager = unet(x, time, text=text)
    compiled = torch.compile(unet, fullgraph=True)(x, time, text=text)
    assert (compiled - eager).norm() / eager.norm() < 1e-4
