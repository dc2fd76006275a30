"""Images: every kind of file to RGB, tensors and back, sizes, grids."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.sbixGlyph import Glyph
from fontTools.ttLib.tables.sbixStrike import Strike
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastimagen import lettering
from fastimagen.images import (
    from_uint8,
    grid,
    open_rgb,
    resize,
    resize_and_crop,
    save_image,
    to_pil,
    to_pixels,
    to_tensor,
    to_uint8,
    with_channels,
)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    """An image without symmetry that JPEG hardly changes."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(5 * x + 3 * y), np.cos(4 * x * y + 1), np.sin(7 * y - 2 * x * x)]
    return Image.fromarray((np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    checked = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


# ---- open_rgb


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_color_image_keeps_its_pixels(format):
    image = smooth(40, 56)
    options = {"PNG": {}, "JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}[format]
    difference = np.abs(values(open_rgb(encode(image, format, **options))) - values(image))
    assert difference.max() <= (4 if format == "JPEG" else 0)


def test_grey_becomes_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (values(open_rgb(encode(Image.fromarray(grey)))) == grey[..., None]).all()
    black_and_white = open_rgb(encode(Image.fromarray(grey > 99)))
    assert (values(black_and_white) == 255 * (grey > 99)[..., None]).all()


def test_palette_with_a_transparent_color_shows_white():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert values(open_rgb(encode(image))).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    transparent = encode(image, transparency=1)
    assert values(open_rgb(transparent)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("mode, color", [("RGBA", (200, 100, 0)), ("LA", (60,))])
@pytest.mark.parametrize("alpha", [0, 64, 128, 255])
def test_transparency_is_laid_over_white(mode, color, alpha):
    image = Image.new(mode, (2, 2), (*color, alpha))
    expected = [(value * alpha + 255 * (255 - alpha)) / 255 for value in (color * 3)[:3]]
    assert np.abs(values(open_rgb(encode(image)))[0, 0] - expected).max() <= 1


def test_cmyk_jpeg_has_the_right_colors():
    for color in ((255, 0, 0), (0, 128, 0), (20, 30, 200), (255, 255, 255), (0, 0, 0)):
        data = encode(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=98)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert np.abs(values(open_rgb(data)) - color).max() <= 4


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 12_850, 30_000, 65_535]], dtype=np.uint16)
    result = values(open_rgb(encode(Image.fromarray(grey))))
    assert np.abs(result[..., 0] - grey / 65_535 * 255).max() <= 0.5 and result[0, -1, 0] == 255
    assert (result == result[..., :1]).all()
    rows, transparency = b"\0" + struct.pack(">2H", 30_000, 0), (b"tRNS", struct.pack(">H", 30_000))
    transparent = png(2, 1, 16, 0, rows, transparency)
    assert values(open_rgb(transparent))[0, :, 0].tolist() == [255, 0]
    color = values(open_rgb(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65_535, 12_850, 0))))
    assert np.abs(color[0, 0] - [255, 50, 0]).max() <= 1


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, format):
    stored = smooth(20, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert (values(open_rgb(data)) == UPRIGHT[orientation](values(stored))).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_one_line_errors(format, part):
    data = encode(smooth(64, 64), format)
    with pytest.raises(ValueError, match=r"^unreadable image: .") as error:
        open_rgb(data[: int(len(data) * part)])
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.data())
def test_damage_never_raises_anything_but_valueerror(format, data):
    damaged = bytearray(encode(smooth(24, 24), format))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        assert open_rgb(bytes(damaged)).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("unreadable image: ") and "\n" not in str(error)  # noqa: PT017 - may not raise


@pytest.mark.parametrize("side", [9_000, 100_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(side):
    with pytest.raises(ValueError, match=r"unreadable image: .*pixels"):
        open_rgb(png(side, side, 8, 2, b""))


def test_other_files_are_no_images():
    cases = {
        b"<html>404 Not Found</html>": "an HTML page",
        b"": "0 bytes",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>': "an SVG",
        b"\0\0\0\x18ftypheic" + bytes(99): "HEIC, which Pillow does not read",
        b"%!PS-Adobe-3.0 EPSF-3.0": "none of JPEG, PNG",
    }
    for data, message in cases.items():
        with pytest.raises(ValueError, match=f"unreadable image: {message}"):
            open_rgb(data)
    with pytest.raises(ValueError, match="floating point"):
        open_rgb(encode(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))


def test_reduced_decoding_stays_large_enough_and_alike():
    data = encode(smooth(600, 801), "JPEG", quality=95)
    whole, reduced = open_rgb(data), open_rgb(data, at_least=90)
    assert whole.size == (801, 600) and 135 <= min(reduced.size) < 300
    assert open_rgb(data, at_least=250).size == whole.size
    a, b = (values(resize_and_crop(image, 90)) for image in (whole, reduced))
    assert np.sqrt(np.mean((a - b) ** 2)) < 1


# ---- tensors


def test_from_uint8_is_the_float32_formula_of_numpy_for_all_256_values():
    values = np.arange(256, dtype=np.uint8)
    expected = values.astype(np.float32) / np.float32(127.5) - np.float32(1)
    converted = from_uint8(torch.from_numpy(values).view(2, 4, 32))  # (2, 4, 32)
    assert converted.dtype == torch.float32 and converted.flatten().numpy().tobytes() == expected.tobytes()


def test_all_256_values_survive_the_way_to_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[1].flatten().tolist() == pytest.approx([2 * i / 255 - 1 for i in range(256)], abs=1e-7)
    assert tensor.min() == -1 and tensor.max() == 1
    assert torch.equal(to_uint8(tensor[None]), torch.from_numpy(pixels)[None])
    assert torch.equal(to_tensor(pixels), tensor)


def test_to_uint8_rounds_and_clamps():
    row = torch.tensor([-7.0, -1.0, -0.9999, 0.0, 0.5 / 127.5 - 1 + 1e-4, 1.0, 3.0])
    images = row.view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(images)[0, 0, :, 2].tolist() == [0, 0, 0, 128, 1, 255, 255]
    assert to_uint8(images.bfloat16()).dtype == torch.uint8


def test_images_that_are_none_are_refused():
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, 0, 0] = float("nan")
    images[2, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"\[1, 2\] of 3 contain NaN"):
        to_uint8(images)
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected floating point images"):
            to_uint8(wrong)
    for wrong in (Image.new("L", (4, 4)), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected"):
            to_tensor(wrong)


def test_png_keeps_pixels(tmp_path):
    image = to_tensor(smooth(12, 17))
    save_image(image, tmp_path / "new" / "a.png")
    assert torch.equal(to_tensor(open_rgb((tmp_path / "new" / "a.png").read_bytes())), image)
    assert to_pil(image).size == (17, 12)


# ---- sizes


@pytest.mark.parametrize("height, width", [(120, 160), (160, 120), (300, 100), (30, 41)])
def test_crop_is_the_middle_of_the_scaled_image(height, width):
    image, size = smooth(height, width), 40
    scale = size / min(height, width)
    result = values(resize_and_crop(image, size))
    assert result.shape == (size, size, 3)
    # Independent: sample the analytic image at the places where the pixels of the crop should lie.
    source = values(image)
    for i, j in ((0, 0), (0, 39), (20, 7), (39, 39)):
        y, x = ((n + 0.5 - size / 2) / scale + side / 2 - 0.5 for n, side in ((i, height), (j, width)))
        nearest = source[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)]
        assert np.abs(result[i, j] - nearest).max() <= 12


def test_whole_image_resized_first_gives_the_same():
    image = smooth(100, 200)
    expected = image.resize((100, 50), Image.Resampling.BICUBIC).crop((25, 0, 75, 50))
    assert np.abs(values(resize_and_crop(image, 50)) - values(expected)).max() <= 1


@pytest.mark.parametrize("height, width", [(64, 64), (64, 90), (150, 200), (33, 50)])
def test_window_is_a_part_of_the_square(height, width):
    image = smooth(height, width)
    square = values(resize_and_crop(image, 64))
    window = values(resize_and_crop(image, 64, crop=(10, 30, 32)))
    assert np.abs(window - square[10:42, 30:62]).max() <= (0 if height == 64 else 1)


@pytest.mark.parametrize("factor, rest", [(2, 0), (3, 2)])
def test_shrinking_by_whole_numbers_averages_pixels(factor, rest):
    pixels = np.random.default_rng(0).integers(0, 256, (10 * factor + rest, 16 * factor, 3), dtype=np.uint8)
    result = values(resize_and_crop(Image.fromarray(pixels), 10))
    rows = pixels[rest // 2 : rest // 2 + 10 * factor].reshape(10, factor, 16, factor, 3)
    assert np.abs(result - rows.mean(axis=(1, 3))[:, 3:13]).max() <= 0.6


def test_fitting_images_are_not_resampled():
    image = smooth(32, 47)
    assert (values(resize_and_crop(image, 32)) == values(image)[:, 7:39]).all()


@pytest.mark.parametrize("size, crop", [(0, "center"), (8, (0, 0, 9)), (8, (5, 0, 4)), (8, (-1, 0, 4)), (8, (0, 0, 0))])
def test_senseless_windows_are_refused(size, crop):
    with pytest.raises(ValueError, match="crop"):
        resize_and_crop(smooth(16, 16), size, crop=crop)


def test_shrinking_by_whole_numbers_averages():
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = images.double().reshape(2, 3, 8, 3, 8, 3).mean(dim=(3, 5))
    assert torch.allclose(resize(images, 8).double(), expected, atol=1e-6)
    assert resize(images.bfloat16(), 8).dtype == torch.bfloat16
    assert resize(images, 24) is images


@pytest.mark.parametrize("side, size", [(16, 64), (20, 48), (64, 48), (48, 20)])
def test_other_sizes_are_pillow_bicubic(side, size):
    plane = (torch.rand(side, side, generator=torch.Generator().manual_seed(1)) - 0.5).sign()
    expected = np.array(Image.fromarray(plane.numpy()).resize((size, size), Image.Resampling.BICUBIC))
    result = resize(plane[None, None], size)[0, 0]
    assert torch.allclose(result, torch.from_numpy(expected).clamp(-1, 1), atol=1e-5)
    assert result.max() <= 1 and (expected.max() > 1 or side > 2 * size)  # sharp edges overshoot


def test_resize_refuses_what_is_not_square():
    with pytest.raises(ValueError, match="expected square images"):
        resize(torch.zeros(1, 3, 8, 9), 4)


# ---- grids


def dark(image: Image.Image) -> np.ndarray:
    return (values(image) < 200).any(axis=-1)


def test_grid_shows_every_image_and_every_caption():
    colors = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0], [1, 1, -1]])
    images = colors[:, :, None, None].expand(5, 3, 32, 32)
    long = "a very long caption that has to be broken into several lines of text " * 2
    captions = ["red", "green", long, "", "yellow"]
    plain, captioned = grid(images), grid(images, captions)
    for color in to_uint8(images)[:, 0, 0].tolist():
        for image in (plain, captioned):
            assert (values(image) == color).all(axis=-1).sum() >= 192 * 192 - 1
    assert captioned.width == plain.width and captioned.height > plain.height + 60
    text = dark(captioned) & (values(captioned).std(axis=-1) < 3) & (values(captioned)[..., 0] != 128)
    assert text.sum() > 200
    assert not text[:, -12:].any() and not text[-8:].any()  # nothing runs over the edge


def test_grid_layout_follows_columns_and_scale():
    images = torch.zeros(6, 3, 8, 8)
    wide, tall = grid(images, columns=6, scale=2), grid(images, columns=1, scale=2)
    assert wide.width > wide.height and tall.height > tall.width
    assert dark(wide).sum() == dark(tall).sum() == 6 * 16 * 16
    assert dark(grid(torch.zeros(1, 3, 300, 300))).sum() == 300 * 300  # large images stay as they are


def test_endless_words_and_captions_stay_inside():
    image = grid(torch.ones(1, 3, 32, 32), ["w" * 3000])
    assert image.height < 192 + 200 and not dark(image)[:, :8].any() and not dark(image)[:, -8:].any()


@pytest.mark.parametrize("arguments", [dict(captions=["one"]), dict(columns=0), dict(scale=0)])
def test_wrong_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="grid"):
        grid(torch.zeros(2, 3, 8, 8), **arguments)


# ---- grey


def test_grey_pixels_are_pillows_luma_in_files_and_in_tensors():
    image = smooth(9, 7)
    luma = np.asarray(image.convert("L"), dtype=float)
    assert np.array_equal(to_pixels(image, 1), luma[None])
    assert np.array_equal(to_pixels(image, 3), np.asarray(image).transpose(2, 0, 1))
    converted = with_channels(to_tensor(image)[None], 1)  # (1, 1, H, W)
    assert np.abs((converted[0, 0].numpy() + 1) * 127.5 - luma).max() < 0.51
    grey = to_tensor(image.convert("L").convert("RGB"))[None, :1]  # (1, 1, H, W)
    assert with_channels(with_channels(grey, 3), 1).allclose(grey, atol=1e-6)


def test_grey_tensors_become_grey_files_and_grids(tmp_path):
    shade = torch.full((2, 1, 8, 8), -1.0)
    shade[1] = 1.0
    save_image(shade[0], tmp_path / "black.png")
    black = Image.open(tmp_path / "black.png")
    assert black.mode == "L" and black.size == (8, 8) and black.getextrema() == (0, 0)
    overview = np.asarray(grid(shade, columns=2, scale=1))
    assert overview.shape[2] == 3
    assert (overview[12:20, 12:20] == 0).all() and (overview[12:20, 32:40] == 255).all()
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\), got torch.float32 \(1, 4, 8, 8\)"):
        to_uint8(torch.zeros(1, 4, 8, 8))


def test_a_grid_shows_any_script_that_a_font_of_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = [path for path in lettering.font_files() if Path(path).name == "DejaVuSans.ttf"]
    if not fonts:
        pytest.skip("DejaVu Sans is not installed")
    monkeypatch.setattr(lettering, "font_files", lambda: tuple(fonts))
    letters = lettering.Lettering.of(["a café", "красный круг"], 20)
    assert [(part, font.getname()[0]) for part, font in letters.runs("a café")] == [("a café", "DejaVu Sans")]
    assert next(letters.runs("a cafe"))[1].getname()[0] != "DejaVu Sans"
    image = torch.zeros(1, 3, 64, 64)
    shown = [np.asarray(grid(image, [caption])) for caption in ("красный", "краснай", "\uffff" * 7)]
    assert not np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])


def write_emoji_font(path: Path) -> None:
    """A font of one red square, as fonts of colour emoji are: bitmaps of one size."""
    builder = FontBuilder(1000, isTTF=True)
    names = {" ": "space", "\u200d": "joiner", "🟥": "square"}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(letter): name for letter, name in names.items()})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", *names.values())})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares"})
    builder.setupPost()
    png = io.BytesIO()
    Image.new("RGBA", (109, 109), "red").save(png, "PNG")
    strike = Strike(ppem=109, resolution=72)
    strike.glyphs = {name: Glyph(glyphName=name) for name in (".notdef", "space", "joiner")}
    strike.glyphs["square"] = Glyph(glyphName="square", graphicType="png ", imageData=png.getvalue())
    builder.font["sbix"] = sbix = newTable("sbix")
    sbix.version, sbix.flags, sbix.numStrikes, sbix.strikes = 1, 1, 1, {109: strike}
    builder.save(path)


def test_a_grid_shows_emoji_in_colour_and_in_the_size_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_emoji_font(tmp_path / "emoji.ttf")
    monkeypatch.setattr(lettering, "font_files", lambda: (str(tmp_path / "emoji.ttf"),))
    pixels = np.asarray(grid(torch.zeros(1, 3, 64, 64), ["a 🟥"])).astype(int)
    red = (pixels == (255, 0, 0)).all(axis=2)
    height, width = red.any(axis=1).sum(), red.any(axis=0).sum()
    size = lettering.Lettering.of(["a"], 14).size
    assert size - 2 <= height <= size + 2 and size - 2 <= width <= size + 2 and red.sum() == height * width
    letters = lettering.Lettering.of(["🟥"], 20)
    assert letters.width("🟥 a") == pytest.approx(20 + letters.width(" a"), abs=0.5)
    assert [part for part, _ in letters.runs("1 🟥\u200d🟥")] == ["1 ", "🟥\u200d🟥"]
    assert not caplog.text


def test_letters_that_no_font_has_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(lettering, "font_files", lambda: (__file__,))  # not a font
    drawn = grid(torch.zeros(2, 3, 64, 64), ["a 象", "круг"])
    assert "no font here has гкру象: grids show boxes instead" in caplog.text
    assert drawn.size == grid(torch.zeros(2, 3, 64, 64), ["a b", "abcd"]).size
