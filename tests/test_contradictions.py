"""Settings that contradict each other are refused before anything runs; what is accepted trains and samples."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.cascade import Cascade
from fastimagen.config import CascadeConfig, Config
from fastimagen.config_file import config_from_dict
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.stage_setup import plan
from tests.conftest import TOY_STAGES, toy_cascade, write_toy_model

LINEAR = {"name": "linear", "timesteps": 100}
NO_TEXT = {"0.unet.text_dim": None, "1.unet.text_dim": None, "0.sampling.guidance": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tells the width of a text encoder, 64, and a model directory of the toy cascade."""
    folder = tmp_path_factory.mktemp("contradictions")
    write_toy_model(folder / "model")
    (folder / "t5").mkdir()
    (folder / "t5/config.json").write_text('{"model_type": "t5", "d_model": 64}')
    return folder


def configuration(folder: Path, changes: dict[str, Any]) -> Config:
    """The toy configuration with changes: of the stages by number, of anything else by its section's name."""
    settings: dict[str, Any] = {
        "cascade": {"stages": copy.deepcopy(TOY_STAGES)},
        "data": {"shards": str(folder / "data/train"), "validation": None},
        "text": {"encoder": str(folder / "t5"), "max_length": 32},
        "train": {},
    }
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node: Any = settings["cascade"]["stages"] if parents[0].isdecimal() else settings
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[leaf] = str(folder / value) if value == "model" else value
    return config_from_dict({"fastimagen": settings})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # the U-Net with itself
        ({"0.unet.dim": 9, "0.unet.groups": 3}, "dim must be even and at least 4"),
        ({"0.unet.stem_kernels": [3, 5, 7, 9, 11]}, "dim 8 has too few channels for 5 stem_kernels"),
        ({"0.unet.self_attention": False, "0.unet.text_in_self_attention": True}, "needs a level with self_attention"),
        # with the stage and its images
        ({"0.unet.channels": 2, "1.unet.channels": 2}, "unet.channels must be 3 (colour) or 1 (grey), got 2"),
        ({"1.unet.channels": 1}, "unet.channels differs: [3, 1]"),
        ({"0.name": "all"}, "--stage all trains all stages"),
        ({"1.name": "text_encoder"}, "model directories have a folder of that name"),
        ({"0.name": "train"}, "torch.nn.ModuleDict has train"),
        ({"1.name": "BASE"}, "stage names must differ, by more than upper and lower case"),
        ({"1.size": 24, "1.crop": 20}, "a crop of 20 would be enlarged from 6.67 pixels"),
        ({"0.lowres_size": 4}, 'stage "base" has no low-resolution input: remove "lowres_size"'),
        # schedule, objective and sampling
        ({"0.schedule": LINEAR, "0.sampling.steps": 101}, "101 sampling steps, but the schedule has 100 timesteps"),
        (
            {"0.schedule": LINEAR | {"logsnr_range": [-9, 9]}},
            '"logsnr_range" is only for the cosine schedule: remove it',
        ),
        ({"0.schedule": {"name": "flow", "logsnr_range": [-9, 9]}}, '"logsnr_range" is only for the cosine schedule'),
        ({"0.schedule": {"name": "flow", "timesteps": 50}}, "the flow schedule is continuous: remove"),
        ({"1.schedule": {"name": "flow"}}, 'stage "sr": the schedule "flow" needs the prediction "flow"'),
        ({"0.objective.prediction": "flow"}, 'stage "base": the prediction "flow" is the velocity of the straight'),
        ({"0.objective.logit_std": 2.0}, '"logit_std" is only for "times": "logit_normal": remove it'),
        ({"0.schedule": {"name": "linear", "timesteps": 10}}, 'stage "base": the linear schedule needs at least 20'),
        ({"1.augmentation.schedule": {"logsnr_range": [-99, 9]}}, 'stage "sr": logsnr_range [-99.0, 9.0] with shift'),
        (
            {"0.schedule": {"name": "linear", "timesteps": 20}, "0.objective": {"prediction": "epsilon"}},
            'prediction "epsilon" needs alpha > 0',
        ),
        ({"0.objective.min_snr_gamma": 4}, '"min_snr_gamma" is only for "weighting": "min_snr"'),
        ({"0.objective.edm_std": 1}, '"edm_std" is only for "times": "edm"'),
        ({"0.objective.sigma_data": 1}, '"sigma_data" is only for "prediction": "edm"'),
        ({"0.objective.caption_dropout": 0}, 'stage "base": guidance 2 needs a network that was trained without'),
        ({"0.objective.caption_dropout": 1}, "caption_dropout 1 drops every caption"),
        ({**NO_TEXT, "0.sampling.guidance": 2}, 'stage "base" reads no captions, so that nothing can be guided'),
        ({"1.augmentation.sample_level": 0.6}, "sample_level 0.6 lies outside of train_range [0.0, 0.5]"),
        ({"1.sampling.augmentation_level": 0.6}, "augmentation_level 0.6 lies outside of 0 to 0.5"),
        ({"0.sampling.augmentation_level": 0.1}, 'stage "base" has no low-resolution input'),
        ({"1.size": 32, "1.sampling.tile": 18}, 'stage "sr": tile 18 must be a multiple of 4'),
        ({"0.size": 32, "1.size": 64, "0.unet.positional_encoding": True, "0.sampling.tile": 16}, "cannot use tiles"),
        ({"0.sampling.guidance": float("inf")}, "guidance: Input should be a finite number"),
        # stages, text encoder and data
        ({"0.unet.text_dim": 512, "1.unet.text_dim": 512}, "unet.text_dim is 512, but the embeddings of"),
        ({"text.max_length": 33, "1.unet.max_text_length": 32}, 'stage "sr": unet.max_text_length is 32, but'),
        ({"text.max_length": 1}, "fastimagen.text.max_length: Input should be greater than or equal to 2"),
        ({"data.shapes": {"size": 16}, "1.size": 32}, 'shapes.size 16 is smaller than stage "sr": set it to 32'),
        # initial weights
        ({"train.stages.sr.init_from": "nowhere"}, "init_from nowhere: there is no nowhere/sr/model.safetensors"),
        ({"train.stages.base.init_from": "model", "0.unet.num_blocks": 2}, "weights and configuration do not match"),
        ({"train.stages.sr.init_from": "model", "1.unet.dim": 16}, "weights and configuration do not match"),
    ],
)
def test_a_contradiction_is_refused_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(configuration(folder, changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NO_TEXT,
        {"0.unet.channels": 1, "1.unet.channels": 1},
        {"0.unet.dim": 4, "0.unet.stem_kernels": [3, 5, 7], "0.unet.num_blocks": [0, 2], "0.unet.time_tokens": 1},
        {"1.size": 24, "1.crop": 12},
        {"1.size": 20, "1.crop": None},
        {"0.schedule": LINEAR, "0.objective": {"prediction": "epsilon", "weighting": "min_snr", "min_snr_gamma": 1}},
        {"0.schedule": {"name": "linear", "timesteps": 20}, "0.objective": {"prediction": "x0"}},
        {"0.objective": {"prediction": "edm", "times": "edm", "sigma_data": 1}, "0.schedule": {"shift": 3}},
        {"0.objective.caption_dropout": 0, "0.sampling.guidance": 1, "1.augmentation.train_range": [0.1, 0.1]},
        {"0.unet.text_in_self_attention": True, "0.unet.middle_attention": True, "0.unet.qk_norm": True},
        {"0.unet.text_padding": "null", "0.unet.max_text_length": 32, "0.unet.text_pooling": "mean"},
        {"0.size": 16, "1.size": 32, "1.crop": 16, "1.sampling.tile": 16, "1.sampling.augmentation_level": 0.5},
        {"0.unet.positional_encoding": True, "0.unet.stem_stride": 2, "0.unet.checkpoint_levels": [0]},
    ],
    ids=str,
)
def test_what_is_accepted_trains_and_samples(folder: Path, changes: dict[str, Any]) -> None:
    config, _ = plan(configuration(folder, changes))
    cascade = Cascade(config)
    text = TextEmbeddings(torch.randn(2, 32, 64), torch.ones(2, 32, dtype=torch.bool))
    if cascade.text_dim is None:
        text = None
    for stage in cascade.stages:
        side = stage.config.crop or stage.config.size
        images = torch.rand(2, config.channels, side, side) * 2 - 1
        unet = cascade.unets[stage.name].train()
        loss = stage.training_loss(unet, images, text, stage.draw(0, [0, 1], images)).mean()
        loss.backward()
        assert loss.isfinite()
    with torch.inference_mode():
        images = cascade.eval().sample(text, [0, 1], settings=cascade.settings(steps=2))
    size = config.stages[-1].size
    assert images.shape == (2, config.channels, size, size) and images.isfinite().all()


def test_settings_of_a_request_are_held_to_the_same_rules() -> None:
    cascade = Cascade(toy_cascade())
    settings = cascade.settings(augmentation_level=0.3, guidance=1.5)  # only stages with a use for it take one value
    assert [settings[name].augmentation_level for name in ("base", "sr")] == [None, 0.3]
    for wrong, message in (
        ({"augmentation_level": 0.9}, "augmentation_level 0.9 lies outside of 0 to 0.5"),
        ({"augmentation_level": {"base": 0.1}}, 'stage "base" has no low-resolution input'),
        ({"guidance": float("nan")}, "guidance: Input should be"),
        ({"guidance": float("inf")}, "guidance: Input should be a finite number"),
        ({"guidance": {"top": 2}}, "guidance is given for unknown stage top; the cascade has base, sr"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade.settings(**wrong)
    base = cascade.config.stages[0]
    base = base.model_copy(update={"unet": base.unet.model_copy(update={"text_dim": None})})
    with pytest.raises(ValueError, match="nothing can be guided"):
        Cascade(CascadeConfig.model_construct(stages=(base,))).settings(guidance=3)


def test_the_augmentation_level_of_a_request_changes_the_image() -> None:
    cascade = Cascade(toy_cascade()).eval()
    text = TextEmbeddings(torch.ones(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))
    images = [
        cascade.sample(text, [0], settings=cascade.settings(augmentation_level=level)) for level in (None, 0.1, 0.5)
    ]
    assert images[0].equal(images[1])  # 0.1 is the stage's own
    assert not images[0].equal(images[2])
