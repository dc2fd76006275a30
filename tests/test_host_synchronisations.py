"""Training and sampling never make the host wait for the GPU, from the first micro-batch or network call to the last.

The networks are real, their tensors are on the meta device (tests/host_synchronisations.py). Fused ops run as plain
PyTorch; tests/gpu repeats a part of this with kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagen import cascade as cascade_module
from fastimagen.cascade import Stage
from fastimagen.config import CascadeConfig, SamplingConfig, ScheduleConfig
from fastimagen.data.batch import Batch
from fastimagen.diffusion.draws import Draws, draw
from fastimagen.diffusion.inpainting import InitImage
from fastimagen.diffusion.samplers import SAMPLERS
from fastimagen.network_config import UNetConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.network import Network
from fastimagen.presets import PRESETS
from fastimagen.text.embeddings import PackedEmbeddings, TextEmbeddings
from tests.host_synchronisations import GPU, Generator, recorded

REPEATED = ("jit-l", "jit-h", "jit-unet-1024", "if-l", "if-xl")
"""Presets whose networks run the same lines as those of others."""
STAGES = [(preset, stage.name) for preset, make in PRESETS.items() if preset not in REPEATED for stage in make().stages]
SCHEDULES = {
    "cosine": ScheduleConfig(),
    "shifted cosine": ScheduleConfig(shift=4.0, logsnr_range=(-20.0, 10.0)),
    "linear": ScheduleConfig(name="linear", timesteps=1000),
    "short linear": ScheduleConfig(name="linear", timesteps=25),
}
OBJECTIVES = [
    *itertools.product(("epsilon", "x0", "v", "edm"), ("none", "min_snr"), ("uniform", "edm"), ("l2",)),
    ("v", "none", "uniform", "l1"),
    ("v", "none", "uniform", "huber"),
]
X = torch.empty(3, 4, device=GPU)
IMG2IMG = InitImage(torch.zeros(2, 3, 32, 32), strength=0.7)
INPAINTING = InitImage(
    torch.zeros(2, 3, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.bool), num_resamples=2, jump_length=2
)


def text_on_gpu(width: int | None, lengths: tuple[int, ...] = (3, 9), max_length: int = 256) -> TextEmbeddings:
    assert width is not None
    text = TextEmbeddings.from_list([torch.zeros(length, width) for length in lengths])
    return text.to(device=GPU).padded(max_length)


def text_for(stage: Stage) -> TextEmbeddings:
    """Two captions: DeepFloyd IF reads a fixed number of tokens."""
    unet = stage.config.unet
    return text_on_gpu(unet.text_dim) if unet.has_null_text else text_on_gpu(unet.text_dim, (77, 77), 77)


def preset_on_gpu(preset: str, name: str) -> tuple[Stage, Network]:
    """A stage and its network with one residual block per level, or two blocks of a transformer, the second with text:
    further ones would take time and run the same lines."""
    config = PRESETS[preset]()
    stage = Stage(config.stage(name), config.below(name), empty_text=text_on_gpu(4096, (77,), 77))
    with GPU:
        unet = stage.config.unet
        few = {"unet": {"num_blocks": 0}, "if": {"num_blocks": 1}}.get(unet.kind, {"depth": 2, "text_from": 1})
        return stage, build_network(stage.config.unet.model_copy(update=few))


def small_cascade(schedule: ScheduleConfig = SCHEDULES["cosine"], **objective: Any) -> CascadeConfig:
    """A base stage and super-resolution, which trains on crops, with noise augmentation and the smallest U-Nets."""
    unet = dict(dim=8, dim_mults=[1], num_blocks=0, self_attention=False, text_dim=64, stem_kernels=[3])
    common = {"schedule": schedule.model_dump(), "objective": objective, "sampling": {"steps": 4}}
    sr = {"name": "sr", "size": 32, "crop": 16, "unet": {**unet, "lowres": True}}
    sr["augmentation"] = {"schedule": schedule.model_dump()}
    return CascadeConfig.model_validate({"stages": [{"name": "base", "size": 16, "unet": unet} | common, sr | common]})


def draws_on_gpu(stage: Stage, images: Tensor) -> Draws:
    """Draws without values."""
    uniforms = (torch.empty(len(images), dtype=torch.float64, device=GPU) for _ in range(3))
    return Draws(*uniforms, torch.empty_like(images), torch.empty_like(images) if stage.config.unet.lowres else None)


class Scale(nn.Module):
    """A network of one parameter: what surrounds it does not depend on the network."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, device=GPU))

    def encode_text(self, text: TextEmbeddings, keep_text: Tensor | None = None) -> TextEmbeddings:
        return text

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        return self.factor * x + time[:, None, None, None]


# ---- the record itself


@pytest.mark.parametrize(
    "synchronise",
    [
        lambda: X.sum().item(),
        lambda: float(X.sum()),
        lambda: bool((X > 0).all()),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: torch.zeros(3).to(GPU),
        lambda: torch.tensor([1.0, 2.0], device=GPU),
        lambda: torch.tensor(1.0, device=GPU),
        lambda: X.new_tensor([1.0]),
        lambda: torch.linspace(0, 1, 5).to(X),
        lambda: X.copy_(torch.zeros(3, 4)),
        lambda: X.__setitem__((0, 0), torch.tensor(1.0)),
        lambda: X[[0, 1]],
        lambda: X[torch.tensor([0, 1])],
        lambda: X[X > 0],
        lambda: X.nonzero(),
        lambda: X.masked_select(X > 0),
        lambda: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device=GPU)),
        lambda: X + torch.zeros(4),
        lambda: torch.cat([X, torch.zeros(3, 4)]),
        lambda: torch.equal(X, X),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_synchronisations_are_recorded(synchronise: Callable[[], Any], inference: bool) -> None:
    no_values = suppress(RuntimeError, NotImplementedError)  # the meta device has none
    with torch.inference_mode(inference), recorded() as found, no_values:
        synchronise()
    assert len(found) == 1 and "test_host_synchronisations.py" in found[0]


def test_work_on_the_gpu_is_not_recorded() -> None:
    with recorded() as found:
        rows = torch.arange(6, device=GPU) % 3
        y = torch.where(X[rows] > 0, 1.0, 2.0 ** X[rows]) * torch.tensor(2.0) + torch.linspace(0, 1, 4, device=GPU)
        y[0, :2] = 3.0
        torch.cat([y.double(), torch.full((2, 4), 0.5, device=GPU, dtype=torch.float64)]).masked_fill(
            torch.zeros(8, 4, dtype=torch.bool, device=GPU), 0
        )
        torch.zeros(3).tolist()
    assert found == []


# ---- training


def test_a_batch_is_three_copies_that_do_not_block() -> None:
    """Images, embeddings and lengths; where there is a GPU, the loader has them in pinned memory."""
    text = PackedEmbeddings.from_list([torch.zeros(length, 64) for length in (3, 9)])
    batch = Batch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), text, torch.arange(2), ["a", "b"])
    with recorded() as found:
        batch.images_for(GPU)
        batch.text_for(UNetConfig(text_dim=64), GPU)
    assert len(found) == 3 and not any("blocking" in event for event in found), found


@pytest.mark.parametrize("lowres", [False, True])
def test_draws_are_one_copy_that_does_not_block(lowres: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uniform numbers; noise is drawn on the GPU."""
    images = torch.empty(4, 3, 16, 16, device=GPU)
    monkeypatch.setattr(torch, "Generator", lambda device: Generator())
    with recorded() as found:
        draws = draw(0, "base", range(4), images, lowres=lowres)
    assert len(found) == 1 and "blocking" not in found[0], found
    assert draws.noise.device == draws.time.device == GPU and (draws.lowres_noise is not None) == lowres


@pytest.mark.parametrize(("preset", "name"), STAGES)
def test_a_preset_trains_without_synchronisation(preset: str, name: str) -> None:
    """The first micro-batch copies the tables of linear schedules, once; later ones, accumulated or not, nothing."""
    stage, unet = preset_on_gpu(preset, name)
    side = stage.config.crop or stage.config.size
    images, text = torch.empty(2, 3, side, side, device=GPU), text_for(stage)
    schedules = [stage.config.schedule] + ([stage.config.augmentation.schedule] if stage.config.augmentation else [])
    linear = sum(schedule.name in ("linear", "squaredcos") for schedule in schedules)
    draws = draws_on_gpu(stage, images)
    with recorded() as first:
        stage.training_loss(unet, images, text, draws)
    assert len(first) == linear and all("schedule.py" in event for event in first), first
    with recorded() as second:
        stage.training_loss(unet, images, text, draws).mean().backward()
    assert second == []
    assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_objective_trains_without_synchronisation(schedule: str) -> None:
    images, text, network = torch.empty(2, 3, 16, 16, device=GPU), text_on_gpu(64), Scale()
    for prediction, weighting, times, loss in OBJECTIVES:
        objective = dict(prediction=prediction, weighting=weighting, times=times, loss=loss, caption_dropout=0.5)
        cascade = small_cascade(SCHEDULES[schedule], **objective)
        for config in cascade.stages:
            stage = Stage(config, cascade.below(config.name))
            draws = draws_on_gpu(stage, images)
            stage.training_loss(network, images, text, draws)  # copies the tables of the schedules
            with recorded() as found:
                stage.training_loss(network, images, text, draws).mean().backward()
            assert found == [], (objective, stage.name)


# ---- sampling


@pytest.fixture
def noise_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """image_noise copies from pinned memory without blocking, which needs a real GPU: tests/gpu checks it."""

    def noise(seeds: list[int], shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.empty(len(seeds), *shape, device=GPU)

    monkeypatch.setattr(cascade_module, "image_noise", noise)


def synchronisations_of_the_loop(stage: Stage, unet: nn.Module, **options: Any) -> list[str]:
    """What happens in `stage.sample` between the first network call and the end of the last step."""
    lowres, first, last = None, [], 0
    if stage.lowres_size:
        lowres = torch.empty(2, 3, stage.lowres_size, stage.lowres_size, device=GPU)
    with recorded() as found:

        def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
            nonlocal last
            last = len(found)

        unet.register_forward_pre_hook(lambda *_: first.append(len(found)))
        text = text_for(stage)
        stage.sample(unet, text, [0, 1], lowres=lowres, callback=callback, **options)
    return found[first[0] : last]


LOOPS: dict[str, dict[str, Any]] = {
    "dynamic thresholding": {},
    "static thresholding": {"threshold": "static"},
    "no thresholding": {"threshold": "none"},
    "no guidance": {"guidance": 1.0},
    "negative captions": {"negative": text_on_gpu(64, (5, 2))},
    "tiles": {"tile": 16},
    "img2img": {"init_image": IMG2IMG},
    "inpainting in tiles": {"init_image": INPAINTING, "tile": 16},
}


@pytest.mark.parametrize(
    ("schedule", "loop"),
    [("short linear", loop) for loop in LOOPS] + [(schedule, "dynamic thresholding") for schedule in SCHEDULES],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_loop_does_not_synchronise(sampler: str, schedule: str, loop: str, noise_on_gpu: None) -> None:
    cascade, options = small_cascade(SCHEDULES[schedule]), dict(LOOPS[loop])
    inputs = {name: options.pop(name) for name in ("negative", "init_image") if name in options}
    sampling = SamplingConfig(sampler=sampler, steps=4, **options)
    for config in cascade.stages:
        stage = Stage(config, cascade.below(config.name))
        assert synchronisations_of_the_loop(stage, Scale(), sampling=sampling, **inputs) == []


@pytest.mark.parametrize(("preset", "name"), STAGES)
def test_a_preset_samples_without_synchronisation(preset: str, name: str, noise_on_gpu: None) -> None:
    stage, unet = preset_on_gpu(preset, name)
    sampling = stage.config.sampling.model_copy(update={"steps": 1})
    assert synchronisations_of_the_loop(stage, unet, sampling=sampling) == []


def test_a_stage_that_has_sampled_can_train(noise_on_gpu: None) -> None:
    """Sampling runs in inference mode, whose tensors autograd refuses."""
    config = small_cascade(SCHEDULES["linear"], weighting="min_snr")
    stage, network = Stage(config.stages[1], config.stages[0]), Scale()
    images = torch.empty(2, 3, 16, 16, device=GPU)
    with recorded():
        stage.sample(network, text_on_gpu(64), [0, 1], lowres=images)
        stage.training_loss(network, images, text_on_gpu(64), draws_on_gpu(stage, images)).mean().backward()
