"""Images, captions and the text encoder, as sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .section import Section
from .sizes import ImageSize


class DataSet(NamedTuple):
    """Shards, and what makes a sample of them: the key of its caption, and the conditions on it, as in DataConfig.

    name: None if it is not one of a mixture.
    """

    shards: str | tuple[str, ...]
    caption_key: str | None = None
    where: tuple[str, ...] = ()
    name: str | None = None


class ShapesConfig(Section):
    """The built-in captioned shapes, which training renders if data.shards is missing."""

    count: int = Field(20000, ge=1)
    """Number of training images."""
    size: int = Field(64, ge=16)
    """Height and width of the images."""
    seed: int = Field(0, ge=0)
    """Random seed of the images."""


class SourceConfig(Section):
    """One data set of a mixture. Each has its own epochs."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Name in the records of training, and in --set fastimagen.data.shards.NAME.weight=2."""
    shards: str | tuple[str, ...]
    """Its tars, as in data.shards."""
    weight: float = Field(gt=0)
    """Its share of the samples, relative to the weights of the others."""
    loss_weight: float = Field(1.0, gt=0)
    """Factor on the loss of its samples, as of the images that preserve what a fine-tuned model can do already."""
    caption_key: str | None = Field(None, min_length=1)
    """Key in KEY.json with its captions; None takes data.caption_key."""
    where: tuple[str, ...] = ()
    """Conditions on its samples, besides those of data.where."""


class HeldOutConfig(Section):
    """Validation samples out of data.shards, chosen by a hash of their keys: new or reordered shards do not move them.

    Training leaves them out. Give one of the two.
    """

    share: float | None = Field(None, gt=0, lt=1)
    """Share of the samples. Whether a sample is held out depends on its key alone."""
    count: int | None = Field(None, ge=1)
    """Number of samples: those with the smallest hashes. New shards never move a training sample into validation."""

    @model_validator(mode="after")
    def _consistent(self) -> HeldOutConfig:
        if (self.share is None) == (self.count is None):
            raise ValueError('give one of "share" and "count", e.g. {"share": 0.01}')
        return self


def _kind_of_validation(value: Any) -> str:
    """The tag of the form that data.validation is given in."""
    return "<held_out>" if isinstance(value, (dict, HeldOutConfig)) else "<shards>"


def _kind_of_shards(value: Any) -> str:
    """The tag of the form that data.shards is given in."""
    listed = value if isinstance(value, (list, tuple)) else ()
    return "<mixture>" if any(isinstance(item, (dict, SourceConfig)) for item in listed) else "<shards>"


class RemoteConfig(Section):
    """Patience with the servers of remote shards."""

    timeout: float = Field(30.0, gt=0)
    """Seconds until a server answers, and between two parts of its answer."""
    tries: int = Field(6, ge=1)
    """Tries in a row that fail for a passing reason (no answer, broken off, HTTP 429 or 5xx), after which a shard is
    lost. The first pause between them has `pause` seconds, each further one twice as many, none more than
    `longest_pause`."""
    pause: float = Field(1.0, gt=0)
    """Seconds before the second try."""
    longest_pause: float = Field(30.0, gt=0)
    """Seconds of the longest pause, also if the server asks for more."""


class DataConfig(Section):
    """Images and captions."""

    shards: Annotated[
        Annotated[str | tuple[str, ...], Tag("<shards>")] | Annotated[tuple[SourceConfig, ...], Tag("<mixture>")],
        Discriminator(_kind_of_shards),
    ] = "data/shapes/train"
    """WebDataset tars: a folder, a glob, a {000..999} range or a list; local paths or URLs. Or a mixture of data sets,
    a list of {"name": "own", "shards": "data/own", "weight": 0.3}."""
    validation: Annotated[
        Annotated[str | tuple[str, ...] | None, Tag("<shards>")] | Annotated[HeldOutConfig, Tag("<held_out>")],
        Discriminator(_kind_of_validation),
    ] = "data/shapes/val"
    """Validation tars; or {"share": 0.01} or {"count": 500} of the samples of data.shards, which training leaves out;
    None trains without validation."""
    shapes: ShapesConfig | None = None
    """Render the built-in shapes into the parent folder of data.shards if they are missing."""
    cache: str | None = None
    """Folder for downloaded shards, on a disk of each node; required for remote shards."""
    cache_gb: float | None = Field(100.0, gt=0)
    """Size of that folder in GB (1e9 bytes): the least recently used shards are removed for new ones; None keeps
    all."""
    remote: RemoteConfig = RemoteConfig()
    """Time-outs and tries of downloads."""
    threads: int = Field(2, ge=1)
    """Threads that decode images, per process."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Training stops if a larger share of the samples is unreadable, has no caption or is in a shard that is lost."""
    caption_key: str | None = None
    """Key in KEY.json with the caption, or with a list of captions, of which every reading takes one; None reads
    KEY.txt."""
    where: tuple[str, ...] = ()
    """Conditions on KEY.json, such as "width >= 256" or "aesthetic > 5"; "side" is the shorter side and "aspect" the
    longer one divided by it. Samples that do not fulfil all of them are left out and counted as filtered."""
    flip: bool = False
    """Mirror half of the training images, except those whose English caption names a side."""
    buckets: tuple[str, ...] = ()
    """Sizes of images that are not square, as WIDTHxHEIGHT in pixels of the first stage: ["64x64", "80x48", "48x80"].
    Every image goes to the bucket with the nearest aspect ratio, and every batch has images of one bucket. Previews,
    and `fastimagen sample` without --size, take the first one. Without buckets images are cropped to squares."""

    @field_validator("buckets")
    @classmethod
    def _different(cls, buckets: tuple[str, ...]) -> tuple[str, ...]:
        sizes = [ImageSize.parse(text) for text in buckets]
        for size in sizes:
            if [other.same_shape(*size) for other in sizes].count(True) > 1:
                raise ValueError(f"every bucket needs an aspect ratio of its own, but another one has that of {size}")
        return buckets

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The data sets of a mixture; none if `shards` is one data set."""
        return tuple(source for source in self.shards if isinstance(source, SourceConfig))

    @property
    def training(self) -> list[DataSet]:
        """The training data sets: those of the mixture, or the one there is."""
        if not self.mixture:
            return [self._data_set(self.shards)]  # type: ignore[arg-type]  # not a mixture
        sets = []
        for source in self.mixture:
            key = source.caption_key or self.caption_key
            sets.append(DataSet(source.shards, key, (*self.where, *source.where), source.name))
        return sets

    @property
    def data_sets(self) -> list[DataSet]:
        """Those of training, and of validation where it names shards of its own."""
        if self.validation is None or isinstance(self.validation, HeldOutConfig):
            return self.training
        return [*self.training, self._data_set(self.validation)]

    def _data_set(self, shards: str | tuple[str, ...]) -> DataSet:
        return DataSet(shards, self.caption_key, self.where)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        names = [source.name for source in self.mixture]
        if len({*names}) < len(names):
            raise ValueError(f"the data sets of shards need different names, got {', '.join(names)}")
        return self


class TextConfig(Section):
    """The text encoder and its embedding cache."""

    encoder: str = "data/shapes/text_encoder"
    """Hugging Face name or folder of a text encoder, T5 or another one of transformers (ByT5, umT5, T5Gemma, BERT,
    ...), or one of the short names (t5_small ... xxl1.1)."""
    random_weights: bool = False
    """Accept an encoder with random weights for other data than the built-in shapes, to try things out: it tells
    captions apart, and knows nothing of what they mean. `fastimagen embed` builds it from the captions if the folder
    `encoder` is missing. Captions with unknown tokens are refused in any case."""
    revision: str | None = None
    """Revision of the encoder on the hub."""
    max_length: int = Field(256, ge=2)
    """Largest number of tokens of a caption, with the end mark; further tokens are cut off. At most the max_text_length
    of the U-Nets."""
    encoding: Literal["words", "if"] = "words"
    """"words": the tokens of a caption. "if": as DeepFloyd IF reads captions, in lower case and always max_length
    tokens, of which the network sees the padding too."""
    cache: str | None = None
    """Folder of the embedding cache; None is next to the shards."""
    batch_size: int = Field(64, ge=1)
    """Captions per batch of the encoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder when it fills the cache. bfloat16 is several times as fast on a GPU; the cache stores
    bfloat16 in any case."""
