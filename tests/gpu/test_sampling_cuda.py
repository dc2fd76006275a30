"""Sampling on a GPU: the images of a CPU, no host synchronisation in the loop, offloading, torch.compile."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from benchmarks.harness.networks import TOY, captions
from fastimagen import ops
from fastimagen.cascade import Cascade

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SEEDS = [3, 0, 7]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    torch.manual_seed(0)
    cascade = Cascade(TOY.cascade()).eval()
    with torch.no_grad():
        for parameter in cascade.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return cascade


def sample(cascade: Cascade, device: torch.device, sampler: str = "dpmpp_2m", **options: object) -> Tensor:
    settings = cascade.settings(steps=8, guidance=3.0, sampler=sampler)
    return cascade.sample(captions(3, cascade.text_dim, device), SEEDS, settings=settings, **options).cpu()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_a_gpu_gives_the_images_of_a_cpu(sampler: str, backend: str, cascade: Cascade) -> None:
    ops.set_backend("torch")
    expected = sample(cascade, CPU, sampler)
    ops.set_backend(backend)
    found = sample(copy.deepcopy(cascade).to(CUDA), CUDA, sampler)
    assert (found - expected).abs().max() < 2 / 255


def test_the_sampling_loop_does_not_synchronise_with_the_gpu(cascade: Cascade) -> None:
    ops.set_backend("triton")
    on_gpu = copy.deepcopy(cascade).to(CUDA)
    sample(on_gpu, CUDA)
    steps: list[int] = []

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        """Watch from the first step of a stage to its last."""
        torch.cuda.set_sync_debug_mode("warn" if step < 7 else "default")
        steps.append(step)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sample(on_gpu, CUDA, callback=callback)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 16
    assert [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)] == []


def test_an_offloaded_stage_is_on_the_gpu_only_while_it_runs(cascade: Cascade) -> None:
    on_cpu = copy.deepcopy(cascade)
    stages_on_gpu: list[set[str]] = []

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        stages_on_gpu.append({name for name, unet in on_cpu.unets.items() if next(unet.parameters()).is_cuda})

    images = sample(on_cpu, CUDA, callback=callback, device=CUDA)
    assert stages_on_gpu == [{"base"}] * 8 + [{"sr"}] * 8
    assert not any(parameter.is_cuda for parameter in on_cpu.parameters())
    assert torch.equal(images, sample(copy.deepcopy(cascade).to(CUDA), CUDA))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_unets_give_the_same_images(mode: str, cascade: Cascade) -> None:
    on_gpu = copy.deepcopy(cascade).to(CUDA)
    expected = sample(on_gpu, CUDA)
    for unet in on_gpu.unets.values():
        unet.compile(mode=mode)
    for _ in range(2):
        assert (sample(on_gpu, CUDA) - expected).abs().max() < 2 / 255
