"""Sampling that starts from an image, with any sampler: img2img (SDEdit) and inpainting (RePaint)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import resize
from ..sizes import ImageSize
from .samplers import Callback, Denoise, Noise, Update, take_step
from .schedule import Schedule

DEFAULT_NOISE = 2.0
"""Noise level sigma / alpha where sampling from an image starts by default: its layout and main colours remain, its
details do not. The strength that leads there depends on the noise schedule: 0.7 for the cosine, less for a shifted
one."""


@dataclass(frozen=True)
class InitImage:
    """An image to start from, and an inpainting mask.

    Raises ValueError for shapes, dtypes and values that are not allowed.
    """

    image: Tensor
    """(B, C, H, W) floating point in [-1, 1], of the aspect ratio of the images to sample."""
    mask: Tensor | None = None
    """(B, 1, H, W) bool, true where to sample and false in the known region; None samples everywhere."""
    strength: float | None = None
    """Share of the sampling steps that run, in (0, 1]; SDEdit's t_0 (Meng et al. 2022, section 3). At 1 sampling starts
    from pure noise: without a mask nothing of the image is left. None is 1 with a mask, and otherwise the
    `default_strength` of the stage."""
    num_resamples: int = 5
    """With a mask: how often each interval is sampled, so that the sampled and the known region agree (Lugmayr et al.
    2022, section 4.2)."""
    jump_length: int = 5
    """With a mask: steps per interval. RePaint uses 10 of 250 steps, and 10 resamples; with the 20 to 50 steps of
    DPM-Solver++ an interval of 5 leaves several of them."""

    def __post_init__(self) -> None:
        if self.strength is None and self.mask is not None:
            object.__setattr__(self, "strength", 1.0)  # the class is frozen
        for name, value in (("init image", self.image), ("inpainting mask", self.mask)):
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(
                    f"the {name} is of type {type(value).__name__}, but must be a tensor (B, C, H, W); "
                    f"fastimagen.sampling.image_files.read_init_image reads both from files"
                )
        shape = tuple(self.image.shape)
        if len(shape) != 4 or not self.image.is_floating_point():
            raise ValueError(f"the init image must be floating point (B, C, H, W), got {self.image.dtype} {shape}")
        if not bool((self.image.abs() <= 1).all()):
            raise ValueError("the init image must lie in [-1, 1]")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")
        if min(self.num_resamples, self.jump_length) < 1:
            raise ValueError(
                f"num_resamples (--resamples) and jump_length must be at least 1, "
                f"got {self.num_resamples} and {self.jump_length}"
            )
        if self.mask is not None:
            expected = (shape[0], 1, *shape[2:])
            if self.mask.dtype != torch.bool or tuple(self.mask.shape) != expected:
                raise ValueError(
                    f"the inpainting mask of an image {shape} must be bool {expected}, "
                    f"got {self.mask.dtype} {tuple(self.mask.shape)}"
                )
            if not bool(self.mask.any(dim=(1, 2, 3)).all()):
                raise ValueError("the inpainting mask of at least one image is empty: it must be true where to sample")

    def __len__(self) -> int:
        return len(self.image)

    def settings(self) -> dict[str, float | int | bool | None]:
        """What samples.json records. A strength of None is the default."""
        record: dict[str, float | int | bool | None] = {"mask": self.mask is not None, "strength": self.strength}
        if self.mask is not None:
            record |= {"num_resamples": self.num_resamples, "jump_length": self.jump_length}
        return record

    def __getitem__(self, rows: slice | list[int]) -> InitImage:
        return replace(self, image=self.image[rows], mask=None if self.mask is None else self.mask[rows])

    def at(self, size: int | ImageSize, device: torch.device) -> InitImage:
        """The same for images of `size` (h, w), or of a square, fp32. A pixel is known if all pixels that it covers
        are known.

        Resized on the CPU: Apple GPUs lack some of the operations.
        """
        size = ImageSize.of(size)
        image = resize(self.image.cpu().float(), size).to(device)  # (B, C, h, w)
        if self.mask is None:
            return replace(self, image=image)
        sampled = self.mask.cpu().float()  # (B, 1, H, W)
        if sampled.shape[-1] > size.width:
            sampled = F.adaptive_max_pool2d(sampled, tuple(size))  # (B, 1, h, w)
        elif sampled.shape[-1] < size.width:
            sampled = F.interpolate(sampled, tuple(size), mode="area")  # (B, 1, h, w)
        return replace(self, image=image, mask=(sampled > 0).to(device))

    def with_known_region(self, denoise: Denoise) -> Denoise:
        """`denoise` with the known region copied into every x0."""
        return denoise if self.mask is None else KnownRegionDenoiser(denoise, self.image, self.mask)

    def intervals(self, steps: int, schedule: Schedule) -> Iterator[tuple[int, int]]:
        """(first, last) step of every interval to sample, in order. A repeated interval starts with added noise."""
        strength = default_strength(schedule, steps) if self.strength is None else self.strength
        first = steps - max(1, round(strength * steps))
        length, times = (self.jump_length, self.num_resamples) if self.mask is not None else (steps, 1)
        for start in range(first, steps, length):
            for _ in range(times):
                yield start, min(start + length, steps)


def default_strength(schedule: Schedule, steps: int) -> float:
    """The strength with which sampling starts at DEFAULT_NOISE, or at the step below it."""
    alpha, sigma = schedule.alpha_sigma(schedule.sampling_times(steps)[:-1])  # (steps,), falling noise
    return max(1, int((sigma <= DEFAULT_NOISE * alpha).sum())) / steps


class KnownRegionDenoiser:
    """A denoiser whose x0 (B, C, H, W) is `image` wherever the mask (B, 1, H, W) is false."""

    def __init__(self, denoise: Denoise, image: Tensor, mask: Tensor) -> None:
        self.denoise, self.image, self.mask = denoise, image, mask

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.where(self.mask, self.denoise(x, time), self.image.to(x.dtype))  # (B, C, H, W)

    def step(
        self, x: Tensor, time: Tensor, update: Update, *, previous: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_next, x0). A step is linear in x0, so a change of x0 changes x_next by c_x0 times as much."""
        x_next, x0 = take_step(self.denoise, x, time, update, previous=previous, noise=noise)
        known = torch.where(self.mask, x0, self.image.to(x.dtype))  # (B, C, H, W)
        return x_next + update.c_x0 * (known - x0), known


def sample_from_image(
    sampler: Callable[..., Tensor],
    denoise: Denoise,
    init_image: InitImage,
    times: Tensor,
    *,
    schedule: Schedule,
    noise: Noise,
    callback: Callback | None = None,
) -> Tensor:
    """Run a sampler of samplers.py from `init_image`, at the stage's size, to the clean image: (B, C, H, W).

    noise(-1) starts; every further draw has the next number, however often an interval is repeated.
    """
    denoise = init_image.with_known_region(denoise)
    image, mask = init_image.image, init_image.mask
    draws = count()
    x, x_step = image, -1  # x is at times[x_step] from the first interval on
    for first, last in init_image.intervals(len(times) - 1, schedule):
        if x_step < 0:
            x = add_noise(image, times[first], noise(-1), schedule)
            if first == 0:  # full strength: no trace of the image where there is something to sample
                x = noise(-1) if mask is None else torch.where(mask, noise(-1), x)
        elif x_step != first:
            x = add_more_noise(x, times[x_step], times[first], noise(next(draws)), schedule)
        x = sampler(
            denoise,
            x,
            times[first : last + 1],
            schedule=schedule,
            noise=lambda step: noise(next(draws)),
            callback=_shifted(callback, first),
        )
        x_step = last
    return x if mask is None else torch.where(mask, x, image)  # exactly the known region, without rounding


def _shifted(callback: Callback | None, first: int) -> Callback | None:
    """A callback that counts the steps of an interval from `first`."""
    if callback is None:
        return None
    return lambda step, x, x0: callback(first + step, x, x0)


def add_noise(image: Tensor, time: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """alpha image + sigma noise at `time` (Ho et al. 2020, eq. 4)."""
    alpha, sigma = (value.item() for value in schedule.alpha_sigma(time))
    return alpha * image.to(noise) + sigma * noise


def add_more_noise(x: Tensor, time: Tensor, noisier: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """From x_s at `time` to x_t at the noisier time (Kingma et al. 2021, section 3.1: q(z_t | z_s))."""
    alpha_s, sigma_s = (value.item() for value in schedule.alpha_sigma(time))
    alpha_t, sigma_t = (value.item() for value in schedule.alpha_sigma(noisier))
    ratio = alpha_t / alpha_s
    return ratio * x + math.sqrt(max(sigma_t**2 - ratio**2 * sigma_s**2, 0.0)) * noise
