"""Images at the edges of the model: files -> RGB -> tensors in [-1, 1] -> PNG files and captioned grids.

Letters: B images, C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What `open_rgb` reads, by content and not by name; Pillow knows more, some through outside programs."""

MAX_PIXELS = 1 << 26
"""Larger images are refused: 8192 x 8192."""

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
"""What Pillow's decoders raise when they meet damaged files."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (tag 0x0112) -> what turns the stored pixels upright."""


# ---------------------------------------------------------------- files and tensors


def open_rgb(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decodes an image file into 8-bit RGB, upright.

    Grey, palette and CMYK are converted (CMYK by formula: ICC profiles are not applied); transparency is laid
    over white; 16-bit grey is scaled to 8 bits; the EXIF orientation is applied; of an animation the first
    image is taken.
    at_least: a JPEG with sides of 3, 6 or 12 times this and more is decoded at 1/2, 1/4 or 1/8 of its size:
    for `resize_and_crop` to this size that is about twice as fast, and off by less than 1/255 (RMS).
    Raises ValueError, one line, for anything damaged, truncated, too large (MAX_PIXELS) or not an image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        if at_least is not None:
            image.draft(None, (math.ceil(1.5 * at_least),) * 2)
        image.load()
        turn = UPRIGHT.get(image.getexif().get(0x0112))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"unreadable image: none of {', '.join(FORMATS)}") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"unreadable image: {str(error).strip().partition(chr(10))[0]}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
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


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """An RGB image, PIL or uint8 array (H, W, 3), as float32 tensor (3, H, W): 0 -> -1, 255 -> 1.

    Raises ValueError for other modes, shapes or dtypes.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise ValueError(f'expected an RGB image, got mode "{image.mode}": open files with open_rgb')
    pixels = np.asarray(image)  # (H, W, 3)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 pixels (H, W, 3), got {pixels.dtype} {pixels.shape}")
    # numpy, since torch would start a team of OpenMP threads for each thread that decodes.
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)  # (3, H, W)
    values /= np.float32(127.5)
    values -= 1
    return torch.from_numpy(values)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3), rounded; values beyond the range are clamped.

    Raises ValueError for other shapes, and for NaN or infinity rather than turning them into black.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected floating point images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    finite = images.isfinite().flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"images {broken} of {len(images)} hold NaN or infinity")
    bytes_ = (images.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return bytes_.permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1] as PIL image. Raises ValueError as `to_uint8` does."""
    return Image.fromarray(to_uint8(image[None])[0].cpu().numpy())


def save_png(image: Tensor | Image.Image, path: str | Path) -> None:
    """Writes an image, (3, H, W) in [-1, 1] or PIL, as PNG, and its folder. Raises as `to_uint8` does."""
    pil = image if isinstance(image, Image.Image) else to_pil(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pil.save(path, format="PNG")


# ---------------------------------------------------------------- sizes


def resize_and_crop(
    image: Image.Image, size: int, *, crop: Literal["center"] | tuple[int, int, int] = "center"
) -> Image.Image:
    """Scales the smallest side to `size`, keeping the aspect ratio, and cuts out a square; never mirrors.

    crop: "center" gives the (size, size) square in the middle; (top, left, side) a smaller window of that
    square. Bicubic, antialiased when shrinking. Smaller images are enlarged: count them where that matters.
    Raises ValueError for sizes and windows that make no sense.
    """
    top, left, side = (0, 0, size) if crop == "center" else crop
    if size < 1 or side < 1 or min(top, left) < 0 or max(top, left) + side > size:
        raise ValueError(f"no window {crop} in an image of size {size}")
    width, height = image.size
    smallest = min(width, height)
    if smallest == size:  # no resampling: whole pixels
        x, y = (width - size) // 2 + left, (height - size) // 2 + top
        return image if (width, height) == (side, side) else image.crop((x, y, x + side, y + side))
    pixel = smallest / size  # source pixels per pixel of the result
    x, y = (width - smallest) / 2 + left * pixel, (height - smallest) / 2 + top * pixel
    box = (x, y, min(x + side * pixel, width), min(y + side * pixel, height))  # min: rounding errors
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def resize(images: Tensor, size: int) -> Tensor:
    """Square images (B, C, H, H) in [-1, 1] at another size, (B, C, size, size), antialiased, same dtype.

    Shrinking by a whole number averages areas; anything else is bicubic, clamped to [-1, 1]. The cascade
    makes the low-resolution images of training and enlarges those of sampling with this. Raises ValueError
    if not square.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3] or size < 1:
        raise ValueError(f"expected square images (B, C, H, H) and a size, got {tuple(images.shape)} and {size}")
    side = images.shape[3]
    if side == size:
        return images
    if side % size == 0:
        return F.avg_pool2d(images.float(), side // size).to(images.dtype)  # (B, C, size, size)
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1).to(images.dtype)  # (B, C, size, size)


# ---------------------------------------------------------------- grids

READABLE = 192
"""Images narrower than this are enlarged in grids."""

MAX_LINES = 6
"""Lines of a caption in grids; the rest becomes an ellipsis."""


def grid(
    images: Tensor, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] side by side on white, row by row, each above its caption.

    columns: None is one row up to 4 images, else about square; scale: whole-number enlargement without
    smoothing, None enlarges small images to READABLE pixels. Raises ValueError as `to_uint8` does, and if
    there is not one caption for each image.
    """
    pixels = to_uint8(images).cpu().numpy()  # (B, H, W, 3)
    count, height, width = pixels.shape[:3]
    captions = [""] * count if captions is None else captions
    if not count or len(captions) != count:
        raise ValueError(f"a grid of {count} images and {len(captions)} captions")
    if columns is None:
        columns = count if count <= 4 else math.ceil(math.sqrt(count))
    columns = min(count, columns)
    scale = math.ceil(READABLE / width) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"a grid needs at least one column and a scale of 1, got {columns} and {scale}")
    width, height = width * scale, height * scale
    font = ImageFont.load_default(max(13, round(math.sqrt(width))))
    line = round(1.3 * font.size)
    margin = max(12, width // 12)
    texts = [_wrap(caption, font, width) for caption in captions]

    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    lines = [max(len(texts[i]) for i in row) for row in rows]
    below = [line * n + line // 2 if n else 0 for n in lines]  # pixels
    size = margin + columns * (width + margin), margin + sum(below) + len(rows) * (height + margin)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    top = margin
    for row, space in zip(rows, below):
        for column, i in enumerate(row):
            left = margin + column * (width + margin)
            image = Image.fromarray(pixels[i]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left, top))
            for number, text in enumerate(texts[i]):
                place = left, top + height + line // 3 + number * line
                draw.text(place, text, fill=(48, 48, 48), font=font)
        top += height + space + margin
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into at most MAX_LINES lines of at most `width` pixels; long words are cut up."""
    lines: list[str] = []
    for word in text.split():
        if len(lines) > MAX_LINES:
            break
        if lines and font.getlength(f"{lines[-1]} {word[:width]}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word[: width * MAX_LINES]:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines[MAX_LINES - 1 :] = [f"{last.rstrip()}…"]
    return lines
