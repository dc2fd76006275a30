"""A cascade with one channel draws grey images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastimagen.config import CascadeConfig
from fastimagen.config_file import config_from_dict
from fastimagen.diffusion.inpainting import InitImage
from fastimagen.evaluation.shapes import evaluate_shapes
from fastimagen.images import with_channels
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade, write_toy_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> ImagenPipeline:
    stages = toy_cascade().model_dump(mode="json")["stages"]
    for stage in stages:
        stage["unet"]["channels"] = 1
    config = CascadeConfig.model_validate({"stages": stages})
    return ImagenPipeline.from_pretrained(write_toy_model(tmp_path_factory.mktemp("grey") / "model", config=config))


@pytest.fixture(scope="module")
def text() -> TextEmbeddings:
    return TextEmbeddings(torch.ones(1, 2, 64), torch.ones(1, 2, dtype=torch.bool))


def test_images_and_files_are_grey(pipe: ImagenPipeline, text: TextEmbeddings, tmp_path: Path) -> None:
    out = pipe(text=text)
    assert out.images.shape == (1, 1, 16, 16)
    files = out.save(tmp_path / "samples")
    assert Image.open(files / "images/000000.png").mode == "L"
    assert Image.open(files / "grid.png").mode == "RGB"


def test_colour_images_are_taken_as_their_luma_and_this_is_said(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    colour = torch.rand(1, 3, 8, 8) * 2 - 1
    out, same = (
        pipe(text=text, init_image=InitImage(image, strength=0.5)) for image in (colour, with_channels(colour, 1))
    )
    assert out.images.equal(same.images)
    assert (out.warnings, same.warnings) == (["the init image was converted to grey, as the model draws"], [])
    out, same = (pipe(text=text, lowres=image, start_at="sr") for image in (colour, with_channels(colour, 1)))
    assert out.images.equal(same.images)
    assert out.warnings == ["the low-resolution image was converted to grey, as the model draws"]


def test_reading_colours_from_grey_images_is_refused(pipe: ImagenPipeline) -> None:
    with pytest.raises(ValueError, match="this model draws grey images"):
        evaluate_shapes(pipe)


def test_other_numbers_of_channels_are_refused() -> None:
    stages = toy_cascade().model_dump(mode="json")["stages"]
    stages[0]["unet"]["channels"] = 4
    with pytest.raises(ValueError, match=r"unet.channels must be 3 \(colour\) or 1 \(grey\), got 4"):
        config_from_dict({"fastimagen": {"cascade": {"stages": stages}}})
    stages[0]["unet"]["channels"] = 1
    with pytest.raises(ValueError, match=r"unet.channels differs: \[1, 3\]"):
        config_from_dict({"fastimagen": {"cascade": {"stages": stages}}})
