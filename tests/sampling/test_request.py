"""Sampling requests: slices, batches, samples.json, and the settings that every user interface takes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastimagen.cli import parser
from fastimagen.commands.sample import settings_from
from fastimagen.config import SamplingConfig
from fastimagen.diffusion.inpainting import InitImage
from fastimagen.sampling.request import SamplingRequest
from fastimagen.sampling.settings import Setting, sampling_settings
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade

CAPTIONS = ["a", "b", "c"]
TEXT = TextEmbeddings(torch.arange(3.0)[:, None, None].expand(3, 2, 4).clone(), torch.ones(3, 2, dtype=torch.bool))


def images(batch: int) -> torch.Tensor:
    return torch.arange(float(batch))[:, None, None, None].expand(batch, 3, 4, 4) / 10


# ---- slices and batches


def test_a_slice_takes_the_same_rows_of_every_field() -> None:
    request = SamplingRequest(
        captions=CAPTIONS,
        text=TEXT,
        seeds=[7, 8, 9],
        negative=["x", "y", "z"],
        init_image=InitImage(images(3)),
        lowres=images(3),
        stop_at="base",
        settings={"steps": 3},
    )
    for rows, numbers in ((slice(1, 3), [1, 2]), ([2, 0], [2, 0])):
        part = request[rows]
        assert len(part) == 2
        assert part.captions == [CAPTIONS[number] for number in numbers]
        assert part.seeds == [7 + number for number in numbers]
        assert part.negative == ["xyz"[number] for number in numbers]
        assert part.text is not None and part.text.embeds[:, 0, 0].tolist() == numbers
        assert part.init_image is not None and part.init_image.image.equal(images(3)[numbers])
        assert part.lowres is not None and part.lowres.equal(images(3)[numbers])
        assert (part.stop_at, part.settings) == ("base", {"steps": 3})


def test_count_repeats_the_rows_of_every_field() -> None:
    request = SamplingRequest.of(
        CAPTIONS,
        text=TEXT,
        count=2,
        seed=7,
        negative=["x", "y", "z"],
        init_image=InitImage(images(3)),
        lowres=images(1),
    )
    assert request.captions == ["a", "a", "b", "b", "c", "c"] and request.negative == ["x", "x", "y", "y", "z", "z"]
    assert request.seeds == [7, 8, 9, 10, 11, 12]
    assert request.text is not None and request.text.embeds[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert request.init_image is not None and request.init_image.image.equal(images(3)[[0, 0, 1, 1, 2, 2]])
    assert request.lowres is not None and len(request.lowres) == 1


@pytest.mark.parametrize(
    "seeds", [[5, 2], (5, 2), range(5, -1, -3), np.array([5, 2]), torch.tensor([5, 2]), np.uint8([5, 2])]
)
def test_seeds_are_integers_of_any_kind(seeds: Any) -> None:
    """They become Python's integers, which samples.json can hold."""
    request = SamplingRequest.of("a", count=2, seeds=seeds)
    assert json.dumps(request.seeds) == "[5, 2]"
    without_text = SamplingRequest.of(seeds=seeds)
    assert without_text.seeds == [5, 2] and without_text.labels == ["", ""]


@pytest.mark.parametrize("seeds", [[0.0, 1.0], np.array([0.5, 1]), torch.tensor([0.0, 1.0]), ["0", "1"], [True, 2], 3])
def test_seeds_that_are_not_integers_are_refused(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds must be a list of integers"):
        SamplingRequest.of("a", count=2, seeds=seeds)


def test_blank_negative_captions_are_none() -> None:
    for blank in ("", "  ", ["", " ", ""]):
        assert SamplingRequest.of(CAPTIONS, negative=blank).negative is None
    assert SamplingRequest.of(CAPTIONS, negative="blurred").negative == ["blurred"]
    with pytest.raises(ValueError, match="negative caption 2 is blank"):
        SamplingRequest.of(CAPTIONS, negative=["x", "", "z"])


def test_one_row_for_all_images_stays_one_row_in_a_slice() -> None:
    request = SamplingRequest(captions=CAPTIONS, negative=["x"], lowres=images(1))
    part = request[1:]
    assert part.negative == ["x"] and part.lowres is not None and len(part.lowres) == 1


def test_batches_cover_all_images_in_order() -> None:
    batches = SamplingRequest(captions=CAPTIONS).batches(2)
    assert [batch.captions for batch in batches] == [["a", "b"], ["c"]]
    assert [batch.seeds for batch in batches] == [[0, 1], [2]]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SamplingRequest(captions=CAPTIONS).batches(0)


# ---- samples.json


def write_record(path: Path, request: SamplingRequest, **changes: Any) -> Path:
    record = request.record(model="model", stages={"base": SamplingConfig(steps=3), "sr": SamplingConfig(guidance=2)})
    path.write_text(json.dumps(record | changes))
    return path


def test_a_record_is_read_back_as_the_request_that_wrote_it(tmp_path: Path) -> None:
    request = SamplingRequest(captions=CAPTIONS, seeds=[3, 1, 2], negative=["x"], stop_at="sr")
    found = SamplingRequest.from_record(write_record(tmp_path / "samples.json", request))
    assert (found.captions, found.seeds) == (CAPTIONS, [3, 1, 2])
    assert (found.negative, found.stop_at, found.init_image) == (["x"], "sr", None)
    assert found.settings["steps"] == {"base": 3, "sr": 32} and found.settings["guidance"] == {"base": 5, "sr": 2}


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It says "given" instead of "init_image", nothing about text embeddings, and may lack a setting."""
    path = write_record(tmp_path / "samples.json", SamplingRequest(captions=["a"]))
    record = json.loads(path.read_text())
    del record["init_image"], record["text"], record["stages"]["base"]["tile"]
    path.write_text(json.dumps(record | {"given": None}))
    assert SamplingRequest.from_record(path).captions == ["a"]
    path.write_text(json.dumps(record | {"given": {"mask": False, "strength": 0.5}}))
    with pytest.raises(ValueError, match="does not hold all inputs"):
        SamplingRequest.from_record(path)


@pytest.mark.parametrize(
    ("request_", "changes", "message"),
    [
        (SamplingRequest(captions=["a"], init_image=InitImage(images(1))), {}, "does not hold all inputs"),
        (SamplingRequest(captions=["a"], negative=TEXT[:1]), {}, "does not hold all inputs"),
        (SamplingRequest(text=TEXT), {}, "does not hold all inputs"),
        (SamplingRequest(captions=["a"], lowres=images(1), start_at="sr"), {}, "does not hold all inputs"),
        (SamplingRequest(captions=["a"]), {"samples": 3}, "does not hold the settings of sampled images"),
        (SamplingRequest(captions=["a"]), {"stages": {"base": {"stepz": 3}}}, 'did you mean "steps"'),
    ],
)
def test_a_record_that_cannot_be_reproduced_is_refused(
    request_: SamplingRequest, changes: dict, message: str, tmp_path: Path
) -> None:
    path = write_record(tmp_path / "samples.json", request_, **changes)
    with pytest.raises(ValueError, match=message):
        SamplingRequest.from_record(path)


# ---- every field of SamplingConfig reaches the command line, the page and the record


def another_value(setting: Setting) -> Any:
    """A valid value of a setting that is not its default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if setting.kind is bool:
        return not setting.default
    if setting.kind is tuple:
        return (0.25, 5.0)
    if setting.kind is str:
        return "smart27"  # of respacing
    if setting.default is None:
        return setting.kind(setting.minimum or 1)
    return setting.kind(setting.default / 2)


OTHERS = {setting.name: another_value(setting) for setting in sampling_settings()}


def test_every_field_of_the_configuration_is_a_setting() -> None:
    assert [setting.name for setting in sampling_settings()] == list(SamplingConfig.model_fields)
    assert all(value != getattr(SamplingConfig(), name) for name, value in OTHERS.items())


@pytest.mark.parametrize("command", [["sample", "--captions", "a"], ["evaluate"]], ids=["sample", "evaluate"])
def test_every_setting_is_a_flag(command: list[str]) -> None:
    flags = [word for setting in sampling_settings() for word in (setting.flag, setting.text(OTHERS[setting.name]))]
    assert settings_from(parser().parse_args([*command, "--model", "m", *flags])) == OTHERS
    assert settings_from(parser().parse_args([*command, "--model", "m"])) == {}


def test_every_flag_takes_a_value_for_each_stage() -> None:
    flags = []
    for setting in sampling_settings():
        value = setting.text(OTHERS[setting.name])
        flags += [setting.flag, f"base={value},sr={value}"]
    found = settings_from(parser().parse_args(["sample", "--captions", "a", "--model", "m", *flags]))
    assert found == {name: {"base": value, "sr": value} for name, value in OTHERS.items()}


def test_every_setting_is_a_control_of_the_page() -> None:
    pytest.importorskip("gradio")
    from fastimagen.demo.inputs import page_request
    from fastimagen.demo.page import control

    for setting in sampling_settings():
        found = control(setting, OTHERS[setting.name])
        value = OTHERS[setting.name]
        assert (
            found.value == (setting.text(value) if setting.optional else value)
            and found.label.lower().replace(" ", "_") == setting.name
        )
    values = (*OTHERS.values(), *(setting.default for setting in sampling_settings()))
    request = page_request(["base", "sr"], "a", "", 0, 1, (None, None, 1.0, 5), values)
    assert {name: by_stage["base"] for name, by_stage in request.settings.items()} == OTHERS


def test_the_page_shows_the_controls_of_what_a_stage_takes() -> None:
    pytest.importorskip("gradio")
    from fastimagen.demo.page import stage_controls

    hidden = [
        {control.label for control in stage_controls(stage) if not control.visible} for stage in toy_cascade().stages
    ]
    assert hidden == [{"Augmentation level"}, set()]


def test_every_setting_is_in_the_record(tmp_path: Path) -> None:
    request = SamplingRequest(captions=["a"], settings=OTHERS)
    record = request.record(model="m", stages={"base": SamplingConfig(**OTHERS)})
    (tmp_path / "samples.json").write_text(json.dumps(record))
    found = SamplingRequest.from_record(tmp_path / "samples.json").settings
    written = json.loads(json.dumps(OTHERS))  # a range is a list
    assert found == {name: {"base": value} for name, value in written.items()}


# ---- wrong values


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "--steps: Input should be a valid integer, .* \\(given: 'many'\\)"),
        ("steps", "0", "--steps: Input should be greater than or equal to 1 \\(given: '0'\\)"),
        ("steps", "base=20,sr=x", "--steps sr: Input should be a valid integer"),
        ("steps", "base=20,8", "--steps: give one value, or one for each stage as in base=A,sr=B"),
        ("steps", "base=1,base=2", "--steps: give one value, or one for each stage"),
        ("guidance_range", "5", "--guidance-range: give two numbers, low:high, as in 0.2:5 \\(given: '5'\\)"),
        ("guidance_range", "base=5:0.2", "--guidance-range base: must ascend from 0 or above, got 5:0.2"),
        ("sampler", "euler", "--sampler: Input should be 'ddpm', 'ddim', 'dpmpp_2m' or 'heun' \\(given: 'euler'\\)"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_allowed(name: str, text: str, message: str) -> None:
    setting = next(setting for setting in sampling_settings() if setting.name == name)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        setting.parse(text, setting.flag)
    assert "\n" not in str(error.value)
