"""Image files as inputs of sampling: init images, inpainting masks and low-resolution images."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from ..diffusion.inpainting import InitImage
from ..images import open_rgb, to_tensor

logger = logging.getLogger(__name__)


def read_init_image(
    path: Path, mask_path: Path | None = None, *, strength: float | None = None, resamples: int | None = None
) -> InitImage:
    """The central square of an image file, and of its inpainting mask, which is white where to inpaint.

    strength, resamples: as InitImage; None keeps the default. Raises ValueError if a file cannot be read, if image and
    mask have different sizes, and as InitImage does.
    """
    image, mask = read_image(path), None
    if mask_path is not None:
        mask = read_image(mask_path).mean(dim=1, keepdim=True) > 0  # (1, 1, H, W)
        if mask.shape[2:] != image.shape[2:]:
            raise ValueError(
                f"mask and image must have the same size: {mask_path} is {_size(mask)}, {path} is {_size(image)}"
            )
        mask = center_square(mask)
    image = cropped_with_notice(image, path)
    chosen = {} if resamples is None else {"num_resamples": resamples}
    return InitImage(image, mask, strength, **chosen)


def read_square_image(path: Path) -> Tensor:
    """An image file as (1, 3, H, H) in [-1, 1], cropped if it is not square."""
    return cropped_with_notice(read_image(path), path)


def cropped_with_notice(image: Tensor, path: Path) -> Tensor:
    """The central square of an image (1, C, H, W). Says what was cropped."""
    square = center_square(image)
    if square.shape != image.shape:
        logger.info(f"{path} is {_size(image)}: only its central {_size(square)} is used")
    return square


def center_square(image: Tensor) -> Tensor:
    """The central square of (B, C, H, W): (B, C, S, S), S the smaller side."""
    height, width = image.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, :, top : top + side, left : left + side]  # (B, C, S, S)


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
