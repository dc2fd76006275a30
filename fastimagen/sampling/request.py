"""What to sample and how: one object for the command line, the web page, several processes and the pipeline."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from torch import Tensor

from .. import __version__
from ..config import SamplingConfig
from ..diffusion.inpainting import InitImage
from ..files import read_json_object
from ..images import FileType
from ..sizes import ImageSize
from ..text.embeddings import TextEmbeddings
from .settings import require_known, sampling_settings

EMBEDDINGS = "embeddings"  # in samples.json, in place of text embeddings, which it does not contain


@dataclass(frozen=True, eq=False)
class SamplingRequest:
    """Images to sample: row i of every field belongs to image i.

    captions, text or, for a cascade without text, seeds alone say how many. negative, init_image and lowres have one
    row for each image, or one row for all. Raises ValueError for fields that do not fit together; what depends on the
    model is checked by ImagenPipeline.sample.
    """

    captions: Sequence[str] | None = None
    """Texts to sample from; with `text` they are labels only."""
    text: TextEmbeddings | None = field(default=None, repr=False)
    """Precomputed embeddings: the text encoder is not loaded."""
    seeds: Sequence[int] = ()
    """One for each image; 0, 1, 2, ... if not given."""
    size: str | None = None
    """Of the images, WIDTHxHEIGHT; None is the model's."""
    negative: Sequence[str] | TextEmbeddings | None = field(default=None, repr=False)
    """Captions that guidance steers away from."""
    init_image: InitImage | None = field(default=None, repr=False)
    """Image to start from (img2img) or to fill in (inpainting)."""
    lowres: Tensor | None = field(default=None, repr=False)
    """(B or 1, C, h, w) in [-1, 1]: input of the super-resolution stage `start_at`."""
    start_at: str | None = None
    """First stage to run; None is the first of the cascade."""
    stop_at: str | None = None
    """Last stage to run; None is the last of the cascade."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SamplingConfig, each with one value for all stages or a mapping by stage name. A setting that is
    missing or None keeps the model's value."""

    def __post_init__(self) -> None:
        _check_kinds(self)
        captions = None if self.captions is None else _strings(self.captions, "captions")
        seeds = _integers(self.seeds)
        by_priority = [rows for rows in (self.text, captions, seeds) if rows is not None]
        count = len(by_priority[0])
        if not count:
            raise ValueError("nothing to sample: give captions, text embeddings or seeds")
        seeds = seeds or list(range(count))
        if captions is not None and len(captions) != count:
            raise ValueError(f"{_counted(len(captions), 'caption')} for {_counted(count, 'row')} of text embeddings")
        if len(seeds) != count:
            raise ValueError(
                f"{_counted(len(seeds), 'seed')} for {_counted(count, 'image')}: give one seed for each image"
            )
        if self.size is not None:
            ImageSize.parse(self.size)
        negative = self.negative
        if negative is not None and not isinstance(negative, TextEmbeddings):
            negative = _strings(negative, "negative captions")
        if self.lowres is not None and not bool((self.lowres.abs() <= 1).all()):
            raise ValueError("lowres must lie in [-1, 1]")
        for rows, what in (
            (negative, "negative caption"),
            (self.init_image, "init image"),
            (self.lowres, "lowres image"),
        ):
            if rows is not None and len(rows) not in (1, count):
                raise ValueError(
                    f"{_counted(len(rows), what)} for {_counted(count, 'image')}: give one, or one for each image"
                )
        require_known(self.settings)
        settings = {name: value for name, value in self.settings.items() if value is not None}
        for name, value in (("captions", captions), ("seeds", seeds), ("negative", negative), ("settings", settings)):
            object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def of(
        cls,
        captions: str | Sequence[str] | None = None,
        *,
        text: TextEmbeddings | None = None,
        count: int = 1,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        negative: str | Sequence[str] | TextEmbeddings | None = None,
        **fields: Any,
    ) -> SamplingRequest:
        """`count` images of each caption or row of `text`, one after the other; without either, `count` images.

        seed: of the first image, the next ones count up; 0 if not given. seeds: one for each image instead. Integers of
        any kind, a tensor or an array included. negative: one caption, or one for each of `captions`; blank ones are no
        negative captions. Raises ValueError as the class does.
        """
        if _integer(count, "count") < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if seed is not None and seeds is not None:
            raise ValueError("give seed (of the first image) or seeds (one for each image), not both")
        has_rows = captions is not None or text is not None
        rows = cls(
            captions=[captions] if isinstance(captions, str) else captions,
            text=text,
            seeds=() if has_rows else [0] if seeds is None else seeds,
            negative=_negative(negative),
            **fields,
        )
        request = rows[[row for row in range(len(rows)) for _ in range(count)]]
        if seeds is None:
            first = 0 if seed is None else _integer(seed, "seed")
            seeds = range(first, first + len(request))
        return replace(request, seeds=seeds)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.seeds)

    @property
    def labels(self) -> list[str]:
        """The caption of every image, empty where none was given."""
        return [""] * len(self) if self.captions is None else list(self.captions)

    def __getitem__(self, rows: slice | list[int]) -> SamplingRequest:
        """The same request for some of its images."""
        numbers = list(range(len(self)))[rows] if isinstance(rows, slice) else rows
        return replace(
            self,
            captions=self._rows(self.captions, numbers),
            text=None if self.text is None else self.text[numbers],
            seeds=[self.seeds[number] for number in numbers],
            negative=self._rows(self.negative, numbers),
            init_image=self._rows(self.init_image, numbers),
            lowres=self._rows(self.lowres, numbers),
        )

    def _rows(self, values: Any, numbers: list[int]) -> Any:
        """Rows `numbers` of captions, embeddings or a tensor; one row for all images stays one row."""
        if values is None or len(values) != len(self):
            return values
        return [values[number] for number in numbers] if isinstance(values, list) else values[numbers]

    def batches(self, batch_size: int) -> list[SamplingRequest]:
        """The request in parts of at most `batch_size` images, in order."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return [self[start : start + batch_size] for start in range(0, len(self), batch_size)]

    def record(
        self,
        *,
        model: str,
        stages: Mapping[str, SamplingConfig],
        size: str | None = None,
        guide: str | None = None,
        lora: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """The content of samples.json. stages: the settings of every stage that runs, by name. size: of the images, by
        default that of the request. guide: the other model that guides. lora: the scales of the model's adapters by
        path."""
        negative = self.negative
        samples = [
            {"image": f"images/{index:06d}.png", "caption": caption, "seed": seed}
            for index, (caption, seed) in enumerate(zip(self.labels, self.seeds))
        ]
        return {
            "model": model,
            "guide": guide,
            "lora": dict(lora or {}),
            "version": __version__,
            "size": size or self.size,
            "text": EMBEDDINGS if self.text is not None and self.captions is None else None,
            "negative": EMBEDDINGS if isinstance(negative, TextEmbeddings) else negative,
            "start_at": self.start_at,
            "stop_at": self.stop_at,
            "init_image": None if self.init_image is None else self.init_image.settings(),
            "stages": {name: settings.model_dump(mode="json") for name, settings in stages.items()},
            "samples": samples,
        }

    @classmethod
    def from_record(cls, path: str | Path) -> SamplingRequest:
        """The request that wrote a samples.json: the same model then samples the same images.

        Raises ValueError if the file is not a samples.json, or if the images depend on an init image, a low-resolution
        image or text embeddings, which the file does not hold.
        """
        record = read_json_object(path)
        try:
            captions = [sample["caption"] for sample in record["samples"]]
            seeds = [sample["seed"] for sample in record["samples"]]
            stages = {name: dict(values) for name, values in record["stages"].items()}
            init_image = record["given"] if "given" in record else record["init_image"]  # older files
            negative, start_at, stop_at = (record[key] for key in ("negative", "start_at", "stop_at"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path} does not hold the settings of sampled images, as samples.json does") from None
        if init_image is not None or start_at is not None or EMBEDDINGS in (record.get("text"), negative):
            raise ValueError(
                f"{path} does not hold all inputs: its images were sampled from an init image, a low-resolution image "
                f"or text embeddings; give the flags of the original command instead of --settings"
            )
        settings: dict[str, dict[str, Any]] = {}
        for stage, values in stages.items():
            require_known(values)
            for setting in sampling_settings():
                if setting.name in values:
                    settings.setdefault(setting.name, {})[stage] = values[setting.name]
        size = record.get("size")  # missing in older files
        return cls(captions=captions, seeds=seeds, size=size, negative=negative, stop_at=stop_at, settings=settings)


def recorded_filetype(path: str | Path) -> FileType:
    """The file type of the images that a samples.json names; "png" if it names none, as older files."""
    record = read_json_object(path)
    names = [sample.get("image", "") for sample in record["samples"]]
    ending = Path(names[0]).suffix.removeprefix(".") if names else ""
    return cast(FileType, ending) if ending in get_args(FileType) else "png"


KINDS: dict[str, tuple[type, str]] = {
    "text": (TextEmbeddings, "TextEmbeddings"),
    "init_image": (InitImage, "an InitImage; fastimagen.sampling.image_files.read_init_image reads one from a file"),
    "lowres": (Tensor, "a tensor; fastimagen.sampling.image_files.read_cropped_image reads one from a file"),
}
"""Fields that take no list, and what they take."""


def _check_kinds(request: SamplingRequest) -> None:
    for name, (kind, wanted) in KINDS.items():
        value = getattr(request, name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is of type {type(value).__name__}, but must be {wanted}")


def _strings(captions: Iterable[str], what: str) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"{what} must be a list of strings, got one string; write [{captions!r}]")
    if not isinstance(captions, Iterable):
        raise ValueError(f"{what} must be a list of strings, got {captions!r}")
    captions = list(captions)
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise ValueError(f"{what} must be a list of strings, got {wrong[0]!r}")
    return captions


def _negative(captions: str | Sequence[str] | TextEmbeddings | None) -> list[str] | TextEmbeddings | None:
    """Negative captions as a list; None if all are blank. Raises ValueError if only some are blank."""
    if captions is None or isinstance(captions, TextEmbeddings):
        return captions
    captions = _strings([captions] if isinstance(captions, str) else captions, "negative captions")
    blank = [number for number, caption in enumerate(captions, 1) if not caption.strip()]
    if len(blank) == len(captions):
        return None
    if blank:
        raise ValueError(f"negative caption {blank[0]} is blank: give one for every image, or none")
    return captions


def _integer(value: int, name: str) -> int:
    try:
        return _index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _index(value: int) -> int:
    """An integer of any kind as Python's; True and False, which a forgotten value looks like, are none."""
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def _integers(seeds: Iterable[int]) -> list[int]:
    try:
        return [_index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds must be a list of integers, one for each image, got {seeds!r}") from None


def _counted(count: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
