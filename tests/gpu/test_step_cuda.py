"""Training steps on a GPU: gradients, host synchronisations, one graph for the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases import step
from benchmarks.harness import networks
from benchmarks.harness.networks import captions, images, make_unet
from fastimagen import ops

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TOYS = [networks.TOY, networks.TOY_SUPER]


def gradients(
    network: networks.Network, device: torch.device, dtype: torch.dtype, *, onednn: bool = True
) -> dict[str, Tensor]:
    """Of a mean square of the U-Net's output, by parameter, in float64 on the CPU."""
    stage = network.stage()
    x, time = images(2, network.side, CPU), torch.tensor([3.0, 21.0])
    lowres = {"lowres": x, "lowres_time": time} if stage.config.unet.lowres else {}
    with torch.backends.mkldnn.flags(enabled=onednn):
        unet = make_unet(stage.config.unet, CPU, dtype).to(device)
        given = {key: value.to(device, dtype) for key, value in {"x": x, "time": time, **lowres}.items()}
        unet(**given, text=captions(2, stage.config.unet.text_dim, device)).square().mean().backward()
    return {name: parameter.grad.double().cpu() for name, parameter in unet.named_parameters()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the 2-norm; relative to 1e-4 of the largest gradient where a gradient nearly cancels."""
    least = 1e-4 * max(gradient.norm() for gradient in exact.values())
    return {
        name: ((found[name] - gradient).norm() / torch.maximum(gradient.norm(), least)).item()
        for name, gradient in exact.items()
    }


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("network", TOYS, ids=lambda network: network.name)
def test_gradients_are_as_exact_as_those_of_plain_fp32(network: networks.Network, backend: str) -> None:
    """At most 6 times the larger error of two implementations of plain fp32 on the CPU, or 1e-5.

    Some gradients, of a bias before GroupNorm above all, are sums that cancel: fp32 leaves errors from 1e-6 to 1e-3 of
    them. The two implementations differ from each other by up to a factor of 3, so 6 leaves a factor of two."""
    ops.set_backend("torch")
    exact = gradients(network, CPU, torch.float64)
    plain = [errors(gradients(network, CPU, torch.float32, onednn=onednn), exact) for onednn in (True, False)]
    ops.set_backend(backend)
    found = errors(gradients(network, CUDA, torch.float32), exact)
    allowed = {name: max(6 * max(error[name] for error in plain), 1e-5) for name in exact}
    assert {name: (found[name], allowed[name]) for name in exact if not found[name] <= allowed[name]} == {}


@pytest.mark.parametrize("network", TOYS, ids=lambda network: network.name)
def test_a_training_step_has_no_host_synchronisation(network: networks.Network) -> None:
    one = step.ours(network, 2, CUDA)
    one()
    assert step.host_synchronisations(one) == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_compiler_sees_one_graph(backend: str) -> None:
    ops.set_backend(backend)
    network = networks.TOY
    unet = make_unet(network.stage().config.unet, CUDA, torch.float32)
    x, time, text = images(2, 16, CUDA), torch.tensor([3.0, 21.0], device=CUDA), captions(2, 32, CUDA)
    eager = unet(x, time, text=text)
    compiled = torch.compile(unet, fullgraph=True)(x, time, text=text)
    assert (compiled - eager).norm() / eager.norm() < 1e-4
