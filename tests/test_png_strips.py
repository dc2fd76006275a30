"""Large PNG files: decoded in strips, with the pixels of the whole image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastimagen import images, png_strips
from fastimagen.images import open_rgb, resize_and_crop


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(png_strips, "MIN_PIXELS", 1)
    monkeypatch.setattr(png_strips, "STRIP_PIXELS", 700)


def random_image(mode: str, width: int, height: int) -> Image.Image:
    """Noise beside gradients: rows with each of the five filters."""
    y, x = np.mgrid[:height, :width]
    channels = len(Image.new(mode, (1, 1)).getbands())
    smooth = np.stack([x * (3 + c) + y * (2 * c + 1) for c in range(channels)], axis=-1)  # (H, W, C)
    noise = np.random.default_rng(0).integers(0, 256, smooth.shape)
    pixels = np.where((y // 9 % 2 == 0)[..., None], smooth, smooth // 2 + noise // 4).astype(np.uint8)
    return Image.fromarray(pixels.squeeze(), "L" if mode == "P" else mode).convert(mode)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode, options",
    [
        ("RGB", {}),
        ("RGBA", {}),
        ("L", {}),
        ("LA", {}),
        ("P", {}),
        ("P", {"transparency": 3}),
        ("RGB", {"compress_level": 0}),
    ]
    + [("RGB", {"transparency": (0, 0, 0)})],
)
@pytest.mark.parametrize("width, height, size", [(97, 131, 16), (256, 64, 32), (90, 45, 20)])
def test_strips_have_the_pixels_of_the_whole_image(mode, options, width, height, size):
    data = png(random_image(mode, width, height), **options)
    shrunk = open_rgb(data, at_least=size)
    assert shrunk.size == (width // (factor := min(width, height) // size), height // factor)
    assert resize_and_crop(shrunk, size).tobytes() == resize_and_crop(open_rgb(data), size).tobytes()


def turned() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


@pytest.mark.parametrize(
    "data, size",
    [
        (png(random_image("RGB", 64, 64)), 40),  # less than twice as large
        (png(random_image("RGB", 64, 64), **turned()), 16),
        (png(Image.fromarray(np.full((64, 64), 40000, np.uint16))), 16),
        (png(random_image("L", 64, 64).convert("1")), 16),
        (png(random_image("RGB", 64, 64), save_all=True, append_images=[random_image("RGB", 64, 64)]), 16),
    ],
)
def test_what_needs_the_whole_image_is_decoded_whole(data, size):
    assert open_rgb(data, at_least=size).size == (64, 64)


def test_an_orientation_that_is_upright_and_texts_do_not_matter():
    upright, texts = Image.Exif(), PngImagePlugin.PngInfo()
    upright[0x0112] = 1
    texts.add_itxt("comment", "ä" * 500, zip=True)
    assert open_rgb(png(random_image("RGB", 64, 64), exif=upright, pnginfo=texts), at_least=16).size == (16, 16)


def test_damaged_files_are_errors_of_one_line():
    data = png(random_image("RGB", 97, 131))
    for part in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(ValueError, match=r"^unreadable image: .*truncated") as error:
            open_rgb(data[: int(len(data) * part)], at_least=16)
        assert "\n" not in str(error.value)
    random, found = np.random.default_rng(1), 0
    for position in random.integers(60, len(data) - 20, 40):  # of the compressed pixels
        damaged = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        try:
            open_rgb(damaged, at_least=16)
        except ValueError as error:
            found += str(error).startswith("unreadable image: ") and "\n" not in str(error)
    assert found > 10


def test_memory_is_that_of_a_strip(monkeypatch):
    """No image of more pixels than a strip, and the row above it, is made."""
    largest, open_image = [], Image.open

    def opened(file, *arguments, **options):
        image = open_image(file, *arguments, **options)
        largest.append(image.width * image.height if isinstance(file, io.BytesIO) else 0)
        return image

    data = png(random_image("RGB", 128, 512))
    monkeypatch.setattr(png_strips.Image, "open", opened)
    images.open_rgb(data, at_least=16)
    assert len(largest) > 50 and max(largest[1:]) <= (8 + 1) * 128 and largest[0] == 128 * 512
