"""What lets a GPU run a training step at full speed: no host synchronisation, one compiled graph, cuDNN's benchmark.

tests/gpu counts the waits where there is a GPU; here the profile of a step on the CPU shows what would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.config import EMAConfig
from fastimagen.config_file import config_from_dict
from fastimagen.networks.unet import UNet
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.ema import EMA
from fastimagen.train.trainer import Trainer
from tests.conftest import one_level_cascade, toy_cascade

READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


def reads(work: Callable[[], object]) -> dict[str, int]:
    """Operations of the profile that need a value of a tensor on the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key: event.count for event in profile.key_averages() if event.key in READS}


@pytest.mark.parametrize("name", ["base", "sr"])
def test_a_step_reads_no_tensor_on_the_host(name: str) -> None:
    cascade = toy_cascade()
    stage = Stage(next(stage for stage in cascade.stages if stage.name == name), cascade.below(name))
    unet = UNet(stage.config.unet)
    images = torch.rand(2, 3, stage.config.size, stage.config.size) * 2 - 1
    text = TextEmbeddings(torch.randn(2, 5, 64), torch.arange(5) < torch.tensor([[5], [2]]))
    average = EMA(list(unet.parameters()), EMAConfig())

    def step() -> None:
        stage.training_loss(unet, images, text, stage.draw(0, range(2), images)).mean().backward()
        average.update(1)

    step()
    assert reads(step) == {}


def test_the_profile_shows_reads() -> None:
    assert reads(lambda: torch.ones(3).sum().item()) == {"aten::item": 1, "aten::_local_scalar_dense": 1}


# ---- compiled networks


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_compile_and_cudnn_benchmark_are_for_gpus(
    device: str, toy_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_config["fastimagen"]["train"]["compile"] = "max-autotune"
    trainer = Trainer(config_from_dict(toy_config), tmp_path)
    trainer.device, trainer.world_size, trainer.rank = torch.device(device), 1, 0
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    modes: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append(mode))
    monkeypatch.setattr("fastimagen.train.trainer.make_engine", lambda unet, deepspeed, muon: unet)
    trainer._make_engine(trainer.stages[0])
    assert modes == (["max-autotune"] if device == "cuda" else [])
    printed = capsys.readouterr().out
    assert ("base: train.compile: null (no CUDA)" in printed) == (device == "cpu")
    assert ("base: train.cudnn_benchmark: true" in printed) == torch.backends.cudnn.benchmark == (device == "cuda")


@pytest.mark.slow
def test_caption_lengths_share_one_compiled_graph() -> None:
    cascade = one_level_cascade()
    stage = Stage(cascade.stage("sr"), cascade.below("sr"))
    torch.manual_seed(0)
    unet = UNet(stage.config.unet)
    images = torch.rand(2, 3, stage.config.size, stage.config.size) * 2 - 1

    def losses() -> list[torch.Tensor]:
        texts = [
            TextEmbeddings(torch.ones(2, length, 64), torch.arange(length) < torch.tensor([[length], [2]]))
            for length in (4, 7, 11)
        ]
        draws = stage.draw(1, range(2), images)
        return [stage.training_loss(unet, images, text, draws).mean() for text in texts]

    expected = losses()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet.compile(backend="eager", fullgraph=True)
    found = losses()
    sum(found).backward()
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first length, then any length
