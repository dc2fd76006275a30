"""Sampling images that are not square: sizes that a model knows, others, and those that its stages cannot have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastimagen.cascade import Cascade
from fastimagen.cli import main
from fastimagen.diffusion.inpainting import InitImage
from fastimagen.images import resize_and_crop
from fastimagen.sampling.image_files import crop_to_shape, read_init_image
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.sampling.request import SamplingRequest
from fastimagen.sizes import ImageSize
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade

SIZES = {"base": ["12x6", "8x8"], "sr": ["24x12", "16x16"]}
TEXT = TextEmbeddings.from_list([torch.linspace(-1, 1, 3 * 64).reshape(3, 64)])


@pytest.fixture(scope="module")
def pipe() -> ImagenPipeline:
    """A model with random weights that was trained on two sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cascade = Cascade(toy_cascade())
    sizes = {stage: [ImageSize.parse(text) for text in texts] for stage, texts in SIZES.items()}
    return ImagenPipeline(cascade, text_encoder=None, sizes=sizes)


def test_images_have_the_size_that_is_asked_for_or_the_first_of_the_model(pipe: ImagenPipeline) -> None:
    first, square, other = (pipe(text=TEXT, size=size) for size in (None, "16x16", "8x32"))
    assert first.images.shape == (1, 3, 12, 24) and not first.warnings and first.record["size"] == "24x12"
    assert square.images.shape == (1, 3, 16, 16) and not square.warnings
    assert other.images.shape == (1, 3, 32, 8)
    assert other.warnings == ["stage sr was trained on 24x12, 16x16: images of 8x32 may be worse"]
    assert pipe(text=TEXT, stop_at="base").images.shape == (1, 3, 6, 12)
    assert pipe(text=TEXT, size="8x8", stop_at="base").images.shape == (1, 3, 8, 8)


def test_a_square_is_what_a_model_without_sizes_samples(pipe: ImagenPipeline) -> None:
    plain = ImagenPipeline(pipe.cascade, text_encoder=None)
    output = plain(text=TEXT)
    torch.testing.assert_close(output.images, pipe(text=TEXT, size="16x16").images, rtol=0, atol=0)
    assert plain(text=TEXT, size="24x12").warnings == ["stage sr was trained on 16x16: images of 24x12 may be worse"]


def test_low_resolution_and_init_images_have_the_aspect_ratio_of_the_images(pipe: ImagenPipeline) -> None:
    wide, square = torch.zeros(1, 3, 6, 12), torch.zeros(1, 3, 8, 8)
    for lowres, shape in ((wide, (12, 24)), (square, (16, 16))):
        output = pipe(text=TEXT, lowres=lowres, start_at="sr")
        assert tuple(output.images.shape[2:]) == shape and not output.warnings
    small = pipe(text=TEXT, lowres=wide[:, :, :3, :6], start_at="sr")
    assert small.warnings == ["the low-resolution image is 6 pixels wide, stage sr was trained on 12"]
    mask = torch.zeros(1, 1, 24, 48, dtype=torch.bool)
    mask[:, :, :, :24] = True
    image = InitImage(torch.rand(1, 3, 24, 48) * 2 - 1, mask)
    output = pipe(text=TEXT, init_image=image)
    assert output.images.shape == (1, 3, 12, 24)
    known = torch.nn.functional.avg_pool2d(image.image, 2)[:, :, :, 12:]
    torch.testing.assert_close(output.images[:, :, :, 12:], known)
    with pytest.raises(ValueError, match="the init image is 48x24, but images of 16x16 are to be sampled: crop it to"):
        pipe(text=TEXT, init_image=image, size="16x16")
    with pytest.raises(ValueError, match="the lowres image is 8x8, but images of 24x12 are to be sampled"):
        pipe(text=TEXT, lowres=square, start_at="sr", size="24x12")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("24", '^"24" is not a size: write WIDTHxHEIGHT'),
        ("22x12", 'size 22x12: stage "base" would have 11x6, but sides must be multiples of 2'),
        ("17x16", 'size 17x16: stage "base": 17x16 becomes 8.5x8 where 16 pixels become 8'),
    ],
)
def test_sizes_that_a_stage_cannot_have_are_one_line(pipe: ImagenPipeline, size: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        pipe(text=TEXT, size=size)
    assert "\n" not in str(raised.value)


def test_tiles_cover_the_longer_side(pipe: ImagenPipeline) -> None:
    assert pipe(text=TEXT, size="32x16", tile={"sr": 16}).images.shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match='stage "sr": tile 18 must be a multiple of 4'):
        pipe(text=TEXT, size="32x16", tile={"sr": 18})


def test_the_model_directory_and_the_record_keep_the_size(pipe: ImagenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/model_index.json").read_text())["sizes"] == SIZES
    ImagenPipeline(pipe.cascade, text_encoder=None).save_pretrained(tmp_path / "plain")
    assert "sizes" not in json.loads((tmp_path / "plain/model_index.json").read_text())
    loaded = ImagenPipeline.from_pretrained(tmp_path / "model")
    output = loaded(text=TEXT, captions=["a"], size="16x16")
    assert output.images.shape == (1, 3, 16, 16)
    output.save(tmp_path / "samples")
    request = replace(SamplingRequest.from_record(tmp_path / "samples/samples.json"), text=TEXT)
    torch.testing.assert_close(loaded.sample(request).images, output.images, rtol=0, atol=0)
    TEXT.save(tmp_path / "text.safetensors", ["a"])
    embeddings = str(tmp_path / "text.safetensors")
    main(["sample", "--model", str(tmp_path / "model"), "--embeddings", embeddings, "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/images/000000.png").size == (24, 12)
    Image.new("RGB", (50, 40)).save(tmp_path / "init.png")
    command = ["sample", "--model", str(tmp_path / "model"), "--embeddings", embeddings, "--image"]
    main([*command, str(tmp_path / "init.png"), "--size", "16x16", "--out", str(tmp_path / "square")])
    assert Image.open(tmp_path / "square/images/000000.png").size == (16, 16)
    main([*command, str(tmp_path / "init.png"), "--size", "24x12", "--out", str(tmp_path / "wide")])
    assert Image.open(tmp_path / "wide/images/000000.png").size == (24, 12)


def test_files_are_cropped_to_the_aspect_ratio_of_the_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_init_image(tmp_path / "a.png").image.shape == (1, 3, 50, 50)
    assert read_init_image(tmp_path / "a.png", size="96x64").image.shape == (1, 3, 50, 75)
    assert crop_to_shape(torch.zeros(1, 3, 50, 90), "64x128").shape == (1, 3, 50, 25)
    with pytest.raises(ValueError, match="an image of 3x2 has no part with the aspect ratio of 5x3"):
        crop_to_shape(torch.zeros(1, 3, 2, 3), "5x3")


@pytest.mark.parametrize(("height", "width"), [(120, 160), (160, 120), (300, 100), (30, 41), (48, 100), (96, 200)])
@pytest.mark.parametrize("size", [ImageSize(24, 50), ImageSize(40, 12), ImageSize(24, 24)])
def test_scaling_covers_the_size_and_keeps_the_aspect_ratio(height: int, width: int, size: ImageSize) -> None:
    """Against the linear image that is sampled where the pixels of the result lie."""
    scale = max(size.height / height, size.width / width)
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * y / height, 255 * x / width, np.full_like(x, 7)], axis=2)
    result = np.asarray(resize_and_crop(Image.fromarray(image.round().astype(np.uint8)), size)).astype(float)
    assert result.shape == (*size, 3)
    for axis, (side, length) in enumerate(zip(size, (height, width))):
        middle = np.arange(2, side - 2)
        source = (middle + 0.5 - side / 2) / scale + length / 2 - 0.5
        found = result[:, :, axis].mean(axis=1 - axis)[2:-2]
        left_out = 1 / scale / 2  # pixels at an edge, less than the factor in all
        assert np.abs(found - 255 * source / length).max() < 255 * (1 + left_out) / length + 1
