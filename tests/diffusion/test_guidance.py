"""Where guidance acts, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastimagen.cascade import Cascade
from fastimagen.config import CascadeConfig, SamplingConfig, ScheduleConfig
from fastimagen.diffusion.schedule import make_schedule
from fastimagen.sampling.model_directory import write_model
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade, write_toy_model

TEXT = TextEmbeddings(
    torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, dtype=torch.bool)
)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    torch.manual_seed(0)
    return Cascade(toy_cascade()).eval()


def sample(cascade: Cascade, guide: Cascade | None = None, **settings: object) -> tuple[Tensor, list[int]]:
    """Images of the base stage, and the rows of every call of its network."""
    rows: list[int] = []
    hook = cascade.unets["base"].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    own = cascade.settings(sampler="ddim", threshold="none", **settings)
    x = cascade.sample(TEXT, [0, 1], settings=own, stop_at="base", guide=guide)
    hook.remove()
    return x, rows


def levels(steps: int) -> list[float]:
    """sigma / alpha at the steps of the toy's schedule."""
    schedule = make_schedule(ScheduleConfig())
    alpha, sigma = schedule.alpha_sigma(schedule.sampling_times(steps)[:-1])
    return (sigma / alpha).tolist()


def test_the_network_runs_once_where_guidance_is_off(cascade: Cascade) -> None:
    noise = levels(6)
    assert noise[2] > 1.5 > noise[3] > noise[4] > 0.3 > noise[5]
    _, rows = sample(cascade, steps=6, guidance=3.0, guidance_range=(0.3, 1.5))
    assert rows == [2, 2, 2, 4, 4, 2]
    assert sample(cascade, steps=6, guidance=1.0, guidance_range=(0.3, 1.5))[1] == [2] * 6
    at_a_bound = sample(cascade, steps=6, guidance=3.0, guidance_range=(noise[4], noise[3]))[1]
    assert at_a_bound == [2, 2, 2, 4, 2, 2]  # above the first number, up to the second


def test_a_range_without_or_with_all_steps_is_no_guidance_or_plain_guidance(cascade: Cascade) -> None:
    everywhere, _ = sample(cascade, steps=4, guidance=3.0, guidance_range=(0.0, 1e9))
    nowhere, _ = sample(cascade, steps=4, guidance=3.0, guidance_range=(1e8, 1e9))
    assert torch.equal(everywhere, sample(cascade, steps=4, guidance=3.0)[0])
    torch.testing.assert_close(nowhere, sample(cascade, steps=4, guidance=1.0)[0], rtol=0, atol=1e-6)
    assert not torch.allclose(everywhere, nowhere, atol=1e-3)


def test_one_range_for_all_stages_leaves_out_those_without_text() -> None:
    config = toy_cascade()
    sr = config.stages[1].model_copy(update={"unet": config.stages[1].unet.model_copy(update={"text_dim": None})})
    cascade = Cascade(config.model_copy(update={"stages": (config.stages[0], sr)}))
    settings = cascade.settings(guidance_range=[0.2, 5])
    assert settings["base"].guidance_range == (0.2, 5.0) and settings["sr"].guidance_range is None


@pytest.mark.parametrize("given", [[5, 0.2], [-1, 2], [1, 1], "0.2", "a:b", "1:2:3", [1]])
def test_a_range_that_does_not_ascend_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"guidance_range"):
        SamplingConfig.model_validate({"guidance_range": given})
    assert SamplingConfig.model_validate({"guidance_range": "0.2:5"}).guidance_range == (0.2, 5.0)


def test_autoguidance_extrapolates_from_the_guide(cascade: Cascade) -> None:
    """x0 is that of the guide plus the weight times the difference; both see the captions."""
    torch.manual_seed(1)
    guide = Cascade(toy_cascade()).eval()
    one_step = {"steps": 1, "guidance": 1.0}
    own, others = sample(cascade, **one_step)[0], sample(guide, **one_step)[0]
    guided, rows = sample(cascade, guide, steps=1, guidance=0.7)
    inside = (own.abs() < 1) & (others.abs() < 1)  # the last step clips images to [-1, 1]
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(guided[inside], (others + 0.7 * (own - others))[inside], rtol=0, atol=1e-5)
    assert rows == [2]
    assert torch.equal(sample(cascade, cascade, steps=3, guidance=2.5)[0], sample(cascade, steps=3, guidance=1.0)[0])


# ---- the pipeline's guide


def write(folder: Path, **base: Any) -> Path:
    return write_toy_model(folder, config=toy_cascade(**base))


def test_a_model_guides_the_stages_that_it_has(tmp_path: Path) -> None:
    """Here another with the same first stage only, in its own weights; the second stage is guided as before."""
    base = CascadeConfig(stages=toy_cascade().stages[:1])
    torch.manual_seed(1)
    other = Cascade(base)
    weights = {"base": other.unets["base"].state_dict()}
    guide = write_model(tmp_path / "guide", base, weights, text_encoder=None, encoder_folder=None, card="# guide")
    own = write(tmp_path / "own")
    pipe, plain = ImagenPipeline.from_pretrained(own, guide=guide), ImagenPipeline.from_pretrained(own)
    settings = {"steps": 2, "guidance": {"base": 2.0, "sr": 2.0}}
    expected = plain.cascade.sample(TEXT, [0, 1], settings=plain.cascade.settings(**settings), guide=other.eval())
    output = pipe(text=TEXT, **settings)
    assert torch.equal(output.images, expected)
    assert not torch.allclose(output.images, plain(text=TEXT, **settings).images, atol=1e-3)
    assert output.record["guide"] == str(guide)
    with pytest.raises(ValueError, match="negative captions and a guide both take the place"):
        pipe(text=TEXT, negative=TEXT[:1], **settings)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"schedule": {"shift": 2.0}}, 'cannot guide stage "base": its schedule is another'),
        ({"objective": {"prediction": "x0"}}, r'cannot guide stage "base": its objective\.prediction is another'),
    ],
)
def test_a_guide_of_another_process_is_refused(base: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ImagenPipeline.from_pretrained(write(tmp_path / "own"), guide=write(tmp_path / "guide", **base))
