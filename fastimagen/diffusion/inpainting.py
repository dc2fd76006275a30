"""Sampling that starts from an image: img2img (SDEdit) and inpainting (RePaint), with any sampler.

Letters: B batch, C channels, H height and width of the given image, S side of a stage's images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from ..images import resize
from .samplers import Denoise, Noise, Update, advance
from .schedule import Schedule


@dataclass(frozen=True)
class InitImage:
    """An image to start from, and which of its pixels stay.

    image (B, C, H, H) in [-1, 1]. strength in (0, 1] is the share of the sampling steps that are walked: at 1 only
    noise is left of what is drawn anew (Meng et al. 2022, section 3). mask (B, 1, H, H) is true where to draw, None
    everywhere. With a mask every stretch of `jump_length` steps is walked `num_resamples` times, noised back in between (Lugmayr
    et al. 2022, section 4.2), so that what is drawn and what is given agree. Raises ValueError for what does not fit.
    """

    image: Tensor
    mask: Tensor | None = None
    strength: float = 1.0
    num_resamples: int = 5
    jump_length: int = 5

    def __post_init__(self) -> None:
        shape = tuple(self.image.shape)
        if len(shape) != 4 or shape[2] != shape[3] or not self.image.is_floating_point():
            raise ValueError(f"the given image must be square and floating point (B, C, H, H), got {shape}")
        if not bool((self.image.abs() <= 1).all()):
            raise ValueError("the given image must lie in [-1, 1]")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")
        if min(self.num_resamples, self.jump_length) < 1:
            raise ValueError(
                f"num_resamples and jump_length must be at least 1, got {self.num_resamples} and {self.jump_length}"
            )
        if self.mask is not None:
            if self.mask.dtype != torch.bool or tuple(self.mask.shape) != (shape[0], 1, *shape[2:]):
                raise ValueError(
                    f"the mask of an image {shape} must be bool {(shape[0], 1, *shape[2:])}, "
                    f"got {self.mask.dtype} {tuple(self.mask.shape)}"
                )
            if not bool(self.mask.any(dim=(1, 2, 3)).all()):
                raise ValueError("the mask leaves nothing to draw in one of the images")

    def __len__(self) -> int:
        return len(self.image)

    def settings(self) -> dict[str, float | int | bool]:
        """What samples.json records."""
        painted = (
            {"num_resamples": self.num_resamples, "jump_length": self.jump_length} if self.mask is not None else {}
        )
        return {"mask": self.mask is not None, "strength": self.strength, **painted}

    def __getitem__(self, rows: slice | list[int]) -> InitImage:
        return replace(self, image=self.image[rows], mask=None if self.mask is None else self.mask[rows])

    def at(self, size: int, device: torch.device) -> InitImage:
        """The same for a stage of size S, fp32: a pixel is kept where all that it shows is kept."""
        image, mask = resize(self.image.to(device).float(), size), self.mask  # (B, C, S, S)
        if mask is not None and mask.shape[-1] != size:
            drawn = mask.to(device).float()
            if mask.shape[-1] > size:
                drawn = torch.nn.functional.adaptive_max_pool2d(drawn, size)
            else:
                drawn = torch.nn.functional.interpolate(drawn, (size, size), mode="area")
            mask = drawn > 0  # (B, 1, S, S)
        return replace(self, image=image, mask=None if mask is None else mask.to(device))

    def with_known_region(self, denoise: Denoise) -> Denoise:
        """`denoise` with the kept pixels put into every x0."""
        return denoise if self.mask is None else KnownRegionDenoiser(denoise, self.image, self.mask)

    def intervals(self, steps: int) -> Iterator[tuple[int, int]]:
        """(first, last) step of every stretch to walk, in order; one that repeats begins by noising back."""
        first = steps - max(1, round(self.strength * steps))
        length, times = (self.jump_length, self.num_resamples) if self.mask is not None else (steps, 1)
        for start in range(first, steps, length):
            yield from [(start, min(start + length, steps))] * times


class KnownRegionDenoiser:
    """A denoiser that knows x0 (B, C, S, S) of the pixels where the mask (B, 1, S, S) is false."""

    def __init__(self, denoise: Denoise, image: Tensor, mask: Tensor) -> None:
        self.denoise, self.image, self.mask = denoise, image, mask

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.where(self.mask, self.denoise(x, time), self.image.to(x.dtype))

    def step(self, x: Tensor, time: Tensor, update: Update, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x_next, x0): steps are linear in x0, so what is put right there is put right in x_next."""
        x_next, x0 = advance(self.denoise, x, time, update, **inputs)
        kept = torch.where(self.mask, x0, self.image.to(x.dtype))
        return x_next + update.c_x0 * (kept - x0), kept


def sample_from_image(
    sampler: Callable[..., Tensor],
    denoise: Denoise,
    init_image: InitImage,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """As a sampler of samplers.py, from `init_image` at the stage's size, down to the clean image at the end of `times`.

    noise(-1) begins; every further draw is of the next number, however often a stretch is walked.
    """
    denoise = init_image.with_known_region(denoise)
    draws = count()
    x, here = None, None
    for first, last in init_image.intervals(len(times) - 1):
        if x is None:
            x = _noised(init_image.image, times[first], noise(-1), schedule)
            if first == 0:  # full strength: nothing shows through where something is drawn
                x = noise(-1) if init_image.mask is None else torch.where(init_image.mask, noise(-1), x)
        elif here != first:
            x = _noised_further(x, times[here], times[first], noise(next(draws)), schedule)
        x = sampler(
            denoise,
            x,
            times[first : last + 1],
            schedule=schedule,
            noise=lambda step: noise(next(draws)),
            callback=callback and (lambda step, x, x0, first=first: callback(first + step, x, x0)),
        )
        here = last
    return x if init_image.mask is None else torch.where(init_image.mask, x, init_image.image)  # steps round


def _noised(image: Tensor, time: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """alpha image + sigma noise at `time`."""
    alpha, sigma = (value.item() for value in schedule.alpha_sigma(time))
    return alpha * image.to(noise) + sigma * noise


def _noised_further(x: Tensor, time: Tensor, later: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """From `time` back to the noisier `later`: x_t given x_s (Kingma et al. 2021, section 2.1)."""
    alpha_s, sigma_s = (value.item() for value in schedule.alpha_sigma(time))
    alpha_t, sigma_t = (value.item() for value in schedule.alpha_sigma(later))
    ratio = alpha_t / alpha_s
    return ratio * x + math.sqrt(max(sigma_t**2 - ratio**2 * sigma_s**2, 0.0)) * noise
