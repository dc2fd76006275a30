"""Image files as inputs of sampling: init images, inpainting masks and low-resolution images."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from torch import Tensor

from ..diffusion.inpainting import InitImage
from ..images import open_rgb, to_tensor
from ..sizes import ImageSize

logger = logging.getLogger(__name__)


def read_init_image(
    path: Path,
    mask_path: Path | None = None,
    *,
    size: str | None = None,
    strength: float | None = None,
    resamples: int | None = None,
) -> InitImage:
    """The middle of an image file, and of its inpainting mask, which is white where to inpaint.

    size: WIDTHxHEIGHT of the images to sample, to whose aspect ratio both are cropped; None is a square. strength,
    resamples: as InitImage; None keeps the default. Raises ValueError if a file cannot be read, if image and mask have
    different sizes, and as InitImage does.
    """
    image, mask = read_image(path), None
    if mask_path is not None:
        mask = read_image(mask_path).mean(dim=1, keepdim=True) > 0  # (1, 1, H, W)
        if mask.shape[2:] != image.shape[2:]:
            raise ValueError(
                f"mask and image must have the same size: {mask_path} is {_size(mask)}, {path} is {_size(image)}"
            )
        mask = crop_to_shape(mask, size)
    image = cropped_with_notice(image, path, size)
    chosen = {} if resamples is None else {"num_resamples": resamples}
    return InitImage(image, mask, strength, **chosen)


def read_cropped_image(path: Path, size: str | None = None) -> Tensor:
    """An image file as (1, 3, H, W) in [-1, 1], cropped to the aspect ratio of WIDTHxHEIGHT; None is a square."""
    return cropped_with_notice(read_image(path), path, size)


def cropped_with_notice(image: Tensor, path: Path, size: str | None = None) -> Tensor:
    """The middle of an image (1, C, H, W), as `crop_to_shape` has it. Says what was cropped."""
    cropped = crop_to_shape(image, size)
    if cropped.shape != image.shape:
        logger.info(f"{path} is {_size(image)}: only its central {_size(cropped)} is used")
    return cropped


def crop_to_shape(image: Tensor, size: str | None = None) -> Tensor:
    """The largest middle part of (B, C, H, W) with the aspect ratio of WIDTHxHEIGHT, exactly; None is a square.

    Raises ValueError if the image is too small to have one.
    """
    shape = ImageSize(1, 1) if size is None else ImageSize.parse(size)
    divisor = math.gcd(*shape)
    shape = ImageSize(shape.height // divisor, shape.width // divisor)
    height, width = image.shape[2:]
    times = min(height // shape.height, width // shape.width)
    if not times:
        raise ValueError(f"an image of {_size(image)} has no part with the aspect ratio of {size}")
    rows, columns = times * shape.height, times * shape.width
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, :, top : top + rows, left : left + columns]  # (B, C, rows, columns)


def read_image(path: Path) -> Tensor:
    """An image file as (1, 3, H, W) in [-1, 1]. Raises ValueError that names the file."""
    try:
        return to_tensor(open_rgb(path.read_bytes()))[None]  # (1, 3, H, W)
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _size(image: Tensor) -> str:
    """Width and height of an image (B, C, H, W)."""
    return f"{image.shape[3]}x{image.shape[2]}"
