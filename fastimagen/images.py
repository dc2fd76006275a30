"""Images before and after the model: files -> RGB or grey -> tensors in [-1, 1] -> PNG files and captioned grids."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .files import first_line
from .lettering import Lettering
from .png_strips import shrink_png
from .sizes import ImageSize

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "AVIF": ("avif", "avifs"),
    "TIFF": ("tif", "tiff"),
    "JPEG2000": ("jp2", "j2k", "jpx", "jpf", "jpc", "j2c"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "TGA": ("tga", "icb", "vda", "vst"),
    "ICO": ("ico",),
    "ICNS": ("icns",),
    "QOI": ("qoi",),
    "PCX": ("pcx",),
    "SGI": ("sgi", "rgb", "rgba", "bw"),
    "DDS": ("dds",),
    "PSD": ("psd",),
}
"""File extensions of each format that `open_rgb` reads; the first one is written. These are the formats that Pillow
decodes itself and that images come in: EPS and WMF run external programs."""

FORMATS = tuple(EXTENSIONS)
"""Formats that `open_rgb` reads, recognized by content."""

IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
"""File extensions of images, in lower case."""

MAX_PIXELS = 1 << 26
"""8192 x 8192; larger images are refused, because a small file can decode to gigabytes."""

DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions that Pillow's decoders raise for damaged files."""

ORIENTATION_TAG = 0x0112
"""EXIF tag of the orientation; 1 is upright."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transpose that turns the stored pixels upright."""


# ---- files and tensors


def open_rgb(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    Grey, palette and CMYK are converted (CMYK by formula; ICC profiles are not applied). Transparent pixels are blended
    with white. 16-bit grey is scaled to 8 bits. The EXIF orientation is applied. An animation gives its first frame.
    at_least: a JPEG whose sides are at least 3, 6 or 12 times this is decoded at 1/2, 1/4 or 1/8 of its size. For
    `resize_and_crop` to this size that is about twice as fast and differs by less than 1 of 255 (RMS;
    benchmarks/studies/decode.py). A large PNG is shrunk as `resize_and_crop` would begin to, in strips (png_strips.py).
    Raises ValueError with one line for data that is damaged, truncated, too large (MAX_PIXELS) or not an image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        if at_least is not None and image.format == "PNG":
            shrunk = shrink_png(data, at_least, _to_rgb, lambda strip: _turn(strip) is not None)
            if shrunk is not None:
                return shrunk
        elif at_least is not None:
            image.draft(None, (math.ceil(1.5 * at_least),) * 2)
        image.load()
        turn = _turn(image)
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"unreadable image: {_not_an_image(data)}") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"unreadable image: {first_line(error)}") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    return UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))


def file_extension(data: bytes) -> str:
    """The extension of an image file, by its content. Raises ValueError if `open_rgb` does not know the format."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # A JPEG with several images (a phone's depth map, for instance) is an MPO to Pillow.
            return EXTENSIONS.get(image.format or "", ("jpg",))[0]
    except DECODE_ERRORS as error:
        raise ValueError(f"unreadable image: {_not_an_image(data)}") from error


def _not_an_image(data: bytes) -> str:
    """What data that Pillow does not recognize look like."""
    if not data:
        return "0 bytes"
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML file"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "HEIC, which Pillow does not read"
    return f"none of {', '.join(FORMATS)}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":  # Pillow would clip them to 0 to 255, and most such files have values in [0, 1]
        raise ValueError("floating point pixels, whose range is unknown")
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= 0xFFFF:
            raise ValueError(f"grey values {grey.min()} to {grey.max()} do not fit into 16 bits")
        eight = (grey + 128) // 257  # 65535 / 255 = 257: white stays white
        if "transparency" in image.info:
            eight[grey == image.info["transparency"]] = 255
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """An RGB image as uint8 (C, H, W): C = 3, or C = 1 for grey, the luma of ITU-R BT.601. White stays white."""
    if channels == 1:
        return np.asarray(image.convert("L"))[None]  # (1, H, W)
    return np.asarray(image).transpose(2, 0, 1)  # (3, H, W)


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """An RGB image, PIL or uint8 array (H, W, 3), as float32 tensor (3, H, W): 0 -> -1, 255 -> 1.

    Raises ValueError for other modes, shapes or dtypes.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise ValueError(f'expected an RGB image, got mode "{image.mode}": open files with open_rgb')
    pixels = np.asarray(image)  # (H, W, 3)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 pixels (H, W, 3), got {pixels.dtype} {pixels.shape}")
    return from_uint8(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))  # (3, H, W)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with `channels` channels, 1 or 3: colour becomes its luma (ITU-R BT.601), grey is
    repeated."""
    if images.shape[1] == channels:
        return images
    if channels == 1:
        luma = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # (3, 1, 1)
        return (images * luma).sum(dim=1, keepdim=True).clamp(-1, 1)  # (B, 1, H, W)
    return images.repeat(1, channels, 1, 1)  # (B, 3, H, W)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1], on their device: 0 -> -1, 255 -> 1. All devices agree bit for
    bit."""
    # A tensor: CUDA would multiply by the reciprocal of a Python number, which rounds differently.
    scale = torch.full((), 127.5, device=images.device)
    return images.float().div_(scale).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C), C = 3 or 1, rounded; values beyond the range are clamped.

    Raises ValueError for other shapes and for NaN or infinity, which would otherwise become black.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"expected floating point images (B, 3, H, W) or (B, 1, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    finite = images.isfinite().flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"images {broken} of {len(images)} contain NaN or infinity")
    bytes_ = (images.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)  # (B, C, H, W)
    return bytes_.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [-1, 1] as PIL image, "RGB" or "L". Raises ValueError as `to_uint8` does."""
    return from_pixels(to_uint8(image[None])[0].cpu().numpy())


def from_pixels(pixels: np.ndarray) -> Image.Image:
    """uint8 pixels (H, W, 3) or (H, W, 1) as PIL image, "RGB" or "L"."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


FileType = Literal["png", "jpg", "webp"]
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True},
}
"""How Pillow writes each file type: png and webp are exact."""


def save_image(image: Tensor | Image.Image, path: str | Path) -> None:
    """Write an image, (C, H, W) in [-1, 1] or PIL, as the file type of its suffix; creates the folder.

    Raises ValueError as `to_uint8` does, and for another suffix.
    """
    path = Path(path)
    options = SAVE_OPTIONS.get(path.suffix.removeprefix("."))
    if options is None:
        raise ValueError(f"cannot write {path}: the suffix must be one of {', '.join(SAVE_OPTIONS)}")
    pil = image if isinstance(image, Image.Image) else to_pil(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.save(path, **options)


# ---- sizes


def resize_and_crop(
    image: Image.Image, size: int | ImageSize, *, crop: Literal["center"] | tuple[int, int, int] = "center"
) -> Image.Image:
    """Scale to cover `size`, keeping the aspect ratio, and crop. Never mirrors.

    size: of a square, or height and width. crop: "center" is the part of that size in the middle; (top, left, side) is
    a square crop of that part. Areas are averaged by the whole number in the factor, as `resize` does for the
    low-resolution images of the cascade, and as ADM prepares its data (Dhariwal and Nichol 2021); the rest is bicubic
    and antialiased. Smaller images are enlarged. Raises ValueError for a crop outside of that part.
    """
    size = ImageSize.of(size)
    top, left, height, width = (0, 0, *size) if crop == "center" else (crop[0], crop[1], crop[2], crop[2])
    if min(*size, height, width) < 1 or min(top, left) < 0 or top + height > size.height or left + width > size.width:
        raise ValueError(f"crop {crop} is outside of an image of size {size}")
    full = ImageSize(image.height, image.width)
    if min(full.height - size.height, full.width - size.width) == 0:  # whole pixels: no resampling
        x, y = (full.width - size.width) // 2 + left, (full.height - size.height) // 2 + top
        return image if full == (height, width) else image.crop((x, y, x + width, y + height))
    if (factor := min(full.height // size.height, full.width // size.width)) > 1:
        columns, rows = full.width // factor * factor, full.height // factor * factor
        x, y = (full.width - columns) // 2, (full.height - rows) // 2  # less than `factor` pixels are left out
        return resize_and_crop(image.reduce(factor, (x, y, x + columns, y + rows)), size, crop=crop)
    # What is covered of the image, in its pixels: all of one side.
    is_wide = full.width * size.height >= full.height * size.width
    covered_height = full.height if is_wide else size.height * full.width / size.width
    covered_width = size.width * full.height / size.height if is_wide else full.width
    pixel = covered_height / size.height  # source pixels per pixel of the result
    x0, y0 = (full.width - covered_width) / 2 + left * pixel, (full.height - covered_height) / 2 + top * pixel
    box = (x0, y0, min(x0 + width * pixel, full.width), min(y0 + height * pixel, full.height))  # rounding errors
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def is_enlarged(image: Image.Image, size: ImageSize) -> bool:
    """Whether `resize_and_crop` to this size enlarges the image."""
    return image.width < size.width or image.height < size.height


def resize(images: Tensor, size: int | ImageSize) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] at another size of the same aspect ratio: (B, C, h, w), antialiased, same dtype.

    size: of a square, or height and width. Shrinking by an integer factor averages areas; everything else is bicubic,
    clamped to [-1, 1]. The cascade uses it for the low-resolution images of training and of sampling. Raises ValueError
    for images of another aspect ratio.
    """
    size = ImageSize.of(size)
    if images.ndim != 4 or min(size) < 1 or not size.same_shape(*images.shape[2:]):
        wanted = (
            "square images (B, C, H, H)" if size.height == size.width else "images (B, C, H, W) of its aspect ratio"
        )
        raise ValueError(f"expected {wanted} for the size {size}, got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if (height, width) == size:
        return images
    if height % size.height == 0 and width % size.width == 0:
        return F.avg_pool2d(images.float(), height // size.height).to(images.dtype)  # (B, C, h, w)
    resized = F.interpolate(images.float(), tuple(size), mode="bicubic", antialias=True)  # (B, C, h, w)
    return resized.clamp(-1, 1).to(images.dtype)  # (B, C, h, w)


def enlarge_by_corners(images: Tensor, size: int | ImageSize) -> Tensor:
    """Images (B, C, H, W) as (B, C, h, w): bilinear, with corner pixels on corner pixels, same dtype.

    size: of a square, or height and width. As in DeepFloyd IF, where other images are shifted by parts of a pixel
    against what the second stage has learned.
    """
    enlarged = F.interpolate(images.float(), tuple(ImageSize.of(size)), mode="bilinear", align_corners=True)
    return enlarged.to(images.dtype)  # (B, C, h, w)


# ---- grids

MIN_GRID_TILE = 192
"""Images narrower than this, in pixels, are enlarged in grids, so that captions fit below them."""

MIN_FONT_SIZE = 13
"""Pixels; smaller letters are hard to read."""

MAX_LINES = 6
"""Lines of a caption in a grid; the rest becomes an ellipsis."""


def grid(
    images: Tensor, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], C = 3 or 1, in rows on white, each above its caption.

    columns: None is one row for up to 4 images, otherwise about a square. scale: integer enlargement without smoothing;
    None enlarges small images to MIN_GRID_TILE pixels. Raises ValueError as `to_uint8` does, and unless there is one
    caption for each image.
    """
    pixels = to_uint8(images).cpu().numpy()  # (B, H, W, C)
    count, height, width = pixels.shape[:3]
    captions = [""] * count if captions is None else captions
    if not count or len(captions) != count:
        raise ValueError(f"a grid needs one caption for each image, got {count} images and {len(captions)} captions")
    if columns is None:
        columns = count if count <= 4 else math.ceil(math.sqrt(count))
    columns = min(count, columns)
    scale = math.ceil(MIN_GRID_TILE / width) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale of a grid must be at least 1, got {columns} and {scale}")
    width, height = width * scale, height * scale
    letters = Lettering.of(captions, max(MIN_FONT_SIZE, round(math.sqrt(width))))
    line = round(1.3 * letters.size)
    margin = max(12, width // 12)
    texts = [_wrap(caption, letters, width) for caption in captions]

    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    lines = [max(len(texts[i]) for i in row) for row in rows]
    below = [line * n + line // 2 if n else 0 for n in lines]  # pixels
    size = margin + columns * (width + margin), margin + sum(below) + len(rows) * (height + margin)
    canvas = Image.new("RGB", size, "white")
    top = margin
    for row, space in zip(rows, below):
        for column, i in enumerate(row):
            left = margin + column * (width + margin)
            image = from_pixels(pixels[i]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left, top))
            for number, text in enumerate(texts[i]):
                letters.draw(canvas, left, top + height + line // 3 + number * line, text, fill=(48, 48, 48))
        top += height + space + margin
    return canvas


def _wrap(text: str, letters: Lettering, width: int) -> list[str]:
    """Break text into at most MAX_LINES lines of at most `width` pixels; long words are broken too."""
    lines: list[str] = []
    for word in text.split():
        if len(lines) > MAX_LINES:
            break
        if lines and letters.width(f"{lines[-1]} {word[:width]}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word[: width * MAX_LINES]:
            if lines[-1] and letters.width(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and letters.width(f"{last}…") > width:
            last = last[:-1]
        lines[MAX_LINES - 1 :] = [f"{last.rstrip()}…"]
    return lines
