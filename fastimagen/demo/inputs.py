"""What the page's controls say, as a request. Everything that a visitor can send is checked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..sampling.image_files import read_init_image
from ..sampling.request import SamplingRequest
from ..sampling.settings import sampling_settings
from .drawing import MAX_IMAGES

MAX_SEED = 2**53 - MAX_IMAGES  # a browser's numbers are exact up to 2^53, and the seeds of a request count up
MAX_CHARACTERS = 10_000  # of all captions of a request: a text encoder reads up to 256 tokens of each
MAX_UPLOAD = 10 * 2**20  # bytes of an image
MAX_BODY = 2**18  # bytes of any other request: captions and settings


def page_request(
    stages: list[str],
    captions: str,
    negative: str,
    seed: int | None,
    count: int,
    image: tuple[str | None, str | None, float, int],
    values: tuple[Any, ...],
) -> SamplingRequest:
    """The request that the page's controls describe.

    image: files of init image and mask, strength and resampling count. values: those of all settings, stage by stage.
    Raises ValueError that tells the visitor what to change.
    """
    captions, negative = captions or "", negative or ""
    for name, text in (("captions", captions), ("negative caption", negative)):
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text)} characters of {name} are too many: the maximum is {MAX_CHARACTERS}")
    lines = [line.strip() for line in captions.splitlines() if line.strip()]
    if not lines:
        raise ValueError("Enter a caption first")
    if seed is None:
        raise ValueError("Enter a seed: an integer of 0 or more")
    if len(lines) * count > MAX_IMAGES:
        raise ValueError(f"{len(lines) * count} images at once are too many: the maximum is {MAX_IMAGES}")
    repeated = [line for line in lines for _ in range(count)]
    settings: dict[str, dict[str, Any]] = {}
    remaining = iter(values)
    for stage in stages:
        for setting in sampling_settings():
            value = next(remaining)
            if value not in (None, ""):
                settings.setdefault(setting.name, {})[stage] = setting.check(value, f"Stage {stage}, {setting.name}")
    return SamplingRequest(
        captions=repeated,
        seeds=list(range(int(seed), int(seed) + len(repeated))),
        negative=[negative.strip()] if negative.strip() else None,
        init_image=_init_image(*image),
        settings=settings,
    )


def _init_image(image: str | None, mask: str | None, strength: float, resamples: int) -> Any:
    if image is None:
        if mask is not None:
            raise ValueError("A mask needs an init image: add one, or remove the mask")
        return None
    try:
        return read_init_image(
            Path(image), None if mask is None else Path(mask), strength=strength, resamples=int(resamples)
        )
    except ValueError as error:  # without the names of files on the server
        text = str(error)
        for path, name in ((image, "the init image"), (mask, "the mask")):
            text = text if path is None else text.replace(path, name)
        raise ValueError(text) from None
