"""A callback that returns False stops sampling and keeps what is drawn; no float64 is made on a device without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastimagen.cascade import Stage
from fastimagen.config import ScheduleConfig
from fastimagen.images import resize
from fastimagen.networks.unet import UNet
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade, write_toy_model

TEXT = TextEmbeddings(torch.ones(5, 2, 64), torch.ones(5, 2, dtype=torch.bool))


@pytest.mark.parametrize(("stage", "step"), [("base", 0), ("sr", 1)])
def test_a_callback_that_returns_false_stops(tmp_path: Path, stage: str, step: int) -> None:
    pipe = ImagenPipeline.from_pretrained(write_toy_model(tmp_path / "model"))
    whole = pipe(text=TEXT, batch_size=2, steps=3)
    batches, estimates = 0, []

    def stop(at: str, number: int, x: Tensor, x0: Tensor) -> bool:
        nonlocal batches
        batches += (at, number) == ("base", 0)
        if batches == 2 and (at, number) == (stage, step):
            estimates.append(x0.clone())
            return False
        return True

    out = pipe(text=TEXT, batch_size=2, steps=3, callback=stop)
    assert len(out.images) == len(out.seeds) == len(out.record["samples"]) == 4
    assert out.images[:2].equal(whole.images[:2])
    assert out.images[2:].equal(resize(estimates[0].float().clamp(-1, 1), 16))
    expected = (
        f"stopped by the callback in stage {stage} after step {step + 1}: 4 of 5 images, the last 2 are unfinished"
    )
    assert out.warnings == [expected]
    assert (out.save(tmp_path / "samples") / "images/000003.png").is_file()


class NoFloat64(TorchDispatchMode):
    """Raises for a float64 tensor on the meta device, as an Apple GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == "meta" and value.dtype == torch.float64:
                raise TypeError(f"{func} makes float64 on a device that lacks it")
        return result


@pytest.mark.parametrize("threshold", ["dynamic", "static"])
@pytest.mark.parametrize("schedule", [ScheduleConfig(), ScheduleConfig(name="linear", timesteps=100)], ids=str)
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_sampling_makes_no_float64_on_the_device(
    monkeypatch: pytest.MonkeyPatch, threshold: str, schedule: ScheduleConfig, sampler: str
) -> None:
    monkeypatch.setattr(
        "fastimagen.cascade.image_noise", lambda seeds, shape, **_: torch.empty(len(seeds), *shape, device="meta")
    )
    module = __import__("sys").modules["fastimagen.ops.dynamic_threshold"]
    monkeypatch.setattr(module, "WITHOUT_FLOAT64", ("meta",))
    base, sr = toy_cascade().stages
    text = TEXT.to(device="meta")
    for config, below in ((base, None), (sr, base)):
        augmentation = config.augmentation and config.augmentation.model_copy(update={"schedule": schedule})
        config = config.model_copy(update={"schedule": schedule, "augmentation": augmentation})
        settings = config.sampling.model_copy(
            update={"sampler": sampler, "threshold": threshold, "steps": 3, "guidance": 2.0, "percentile": 0.9}
        )
        with torch.device("meta"):
            unet = UNet(config.unet).eval()
            lowres = torch.empty(5, 3, 8, 8) if below else None
        with NoFloat64():
            images = Stage(config, below).sample(unet, text, [0] * 5, lowres=lowres, sampling=settings)
        assert images.device.type == "meta"
