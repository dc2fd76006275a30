"""Tars -> batches of images and text embeddings, in an order that depends on the seed and the position only.

Global batches of M samples that begin at position p hold positions p to p + M - 1 of the data order, then the next M,
for any number of ranks, micro-batches and threads. So a run resumes from the number of samples that it has read, with
any batch size. Threads decode images in advance (Pillow and NumPy release Python's global interpreter lock).
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..images import is_enlarged, open_rgb, resize_and_crop, to_pixels
from ..seeds import random_bits
from ..sizes import ImageSize
from ..text.embeddings import PackedEmbeddings
from ..words import counted
from .batch import Batch, Origin
from .buckets import BucketOrder
from .mixture import Mixture
from .order import CAPTIONS, CROPS, FLIPS, Order
from .remote.ahead import Ahead
from .remote.transfer import TransferError
from .samples import Embeddings, Samples

logger = logging.getLogger(__name__)

MIN_READ = 100
"""Images read before the share of bad ones is checked. As many unreadable images in a row also stop the run."""


@dataclass(frozen=True, eq=False)
class _Sample:
    key: str
    origin: Origin
    tokens: Tensor | None
    upscaled: bool
    bad: list[tuple[int, int, str]]  # (shard, index, reason) of the unreadable images that this sample replaces


SIDE = re.compile(r"\b(left|right|leftmost|rightmost|(anti|counter)?-?clockwise|east|west)", re.IGNORECASE)


def names_side(caption: str) -> bool:
    """Whether a caption (in English) may be wrong for the mirrored image."""
    return SIDE.search(caption) is not None


Locate = Callable[[int, int], tuple[int, int]]
"""(position, count) -> (shard, index) of the sample there, or of the count-th one that may replace it."""


class Loader:
    """The micro-batches of one rank.

    shards, caches: the tars, and the text embeddings of each (None: no text); order: of their samples. size: of the
    middle of the scaled image, a square by its side; buckets: their sizes instead, for a BucketOrder. crop_size: of a
    random square crop of it, which depends on (crop_seed, position).
    channels: 3 for colour, 1 for grey; other files are converted.
    global_batch: samples per optimizer step on all ranks, a multiple of world_size * micro_batch. threads: that decode
    images; prefetch: micro-batches prepared in advance; ahead: downloads remote shards before they are read; pin: in
    pinned memory, for copies to a GPU.

    An unreadable image is replaced by the next readable sample of the order, and logged once. Training stops if the
    share of bad samples (unreadable, or excluded by the index) exceeds max_bad_share: at once if the index alone
    exceeds it, or when at least MIN_READ images were read and more are bad than max_bad_share explains by chance
    (three standard deviations). The index is not checked for data sets of fewer than MIN_READ samples.

    Of several captions of a sample, (crop_seed, position) chooses one; fixed batches have the first. flip: mirror half
    of the images, chosen by (crop_seed, position), except those whose caption names a side.

    counters: images read (attempts), bad (unreadable) and upscaled (smaller than size) on this rank so far; excluded:
    samples that the index excludes, in all shards; filtered: those that data.where leaves out; held_out: samples that
    validation takes out of them; lost: positions whose shard could not be downloaded, replaced like those of unreadable
    images. Raises ValueError for sizes that do not fit together, and if training must stop.
    """

    def __init__(
        self,
        shards: Sequence[Samples],
        caches: Sequence[Embeddings] | None,
        order: Order | Mixture | BucketOrder,
        *,
        size: int | ImageSize,
        buckets: Sequence[ImageSize] = (),
        crop_size: int | None = None,
        channels: int = 3,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        prefetch: int = 2,
        ahead: Ahead | None = None,
        max_bad_share: float = 0.01,
        pin: bool = False,
        held_out: int = 0,
        flip: bool = False,
        crop_seed: int,
    ) -> None:
        sizes = order.sizes.tolist()
        assert [len(shard) for shard in shards] == sizes, "the order belongs to other shards"
        assert 0 <= rank < world_size and threads > 0 and prefetch > 0
        if global_batch < 1 or micro_batch < 1 or global_batch % (world_size * micro_batch):
            raise ValueError(
                f"a global batch of {global_batch} cannot be split into micro-batches of "
                f"{micro_batch} on {world_size} ranks"
            )
        self.image_sizes = list(buckets) or [ImageSize.of(size)]
        smallest = min(map(min, self.image_sizes))
        if crop_size is not None and not 1 <= crop_size <= smallest:
            raise ValueError(f"crop_size must lie between 1 and size {smallest}, got {crop_size}")
        assert not isinstance(order, BucketOrder) or (len(buckets), order.batch) == (len(order.buckets), global_batch)
        if caches is not None and [len(cache) for cache in caches] != sizes:
            raise ValueError("the text embeddings belong to other shards: rebuild them with fastimagen embed")
        self.shards, self.caches, self.order = shards, caches, order
        self.crop_size, self.channels, self.crop_seed = crop_size, channels, crop_seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.threads, self.prefetch, self.max_bad_share, self.pin = threads, prefetch, max_bad_share, pin
        self.flip, self.ahead = flip, ahead
        self._ends = np.cumsum(order.sizes)
        self._bad: dict[tuple[int, int], str] = {}
        self._delivered: Counter[str] = Counter()  # samples of each data set of a mixture
        self._lost: dict[int, str] = {}  # shards that could not be downloaded, and why
        self._reported: set[int] = set()  # of them
        reasons: Counter[str] = Counter()
        for shard in shards:
            reasons.update(shard.excluded)
        filtered = sum(sum(shard.filtered.values()) for shard in shards)
        self.counters: dict[str, float] = {"read": 0, "bad": 0, "upscaled": 0, "excluded": reasons.total()}
        self.counters |= {"filtered": filtered, "held_out": held_out, "lost": 0}
        known = order.total + filtered + reasons.total()
        self._known = known
        self._excluded_share = reasons.total() / known if known >= MIN_READ else 0.0
        if self._excluded_share > max_bad_share:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise ValueError(
                f"{reasons.total()} of {known} samples cannot be used ({counts}), more than "
                f"fastimagen.data.max_bad_share = {max_bad_share} allows"
            )

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches, without end. The first global batch begins at position `start`.

        Closing the generator stops the decoding threads; their errors are raised here. Raises ValueError if buckets of
        this batch size do not begin at `start`.
        """
        if isinstance(self.order, BucketOrder) and start % self.global_batch:
            raise ValueError(f"position {start} is not the start of a batch of {self.global_batch} of one bucket")
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        pending: deque[Future[tuple[Batch, list[_Sample]]]] = deque()
        try:
            for positions in self._schedule(start):
                if self.ahead is not None:
                    self.ahead.reach(positions[0])
                pending.append(self._submit(pool, positions, self.order.after))
                if len(pending) > self.prefetch:
                    yield self._count(*pending.popleft().result())
        finally:
            if self.ahead is not None:
                self.ahead.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def describe_buckets(self) -> list[str]:
        """Lines about the samples of each bucket; none without buckets."""
        return self.order.describe() if isinstance(self.order, BucketOrder) else []

    def samples_by_size(self) -> dict[ImageSize, int]:
        """The sizes of training images, crops or whole ones, and the samples that have them."""
        if self.crop_size is not None or not isinstance(self.order, BucketOrder):
            return {self.image_sizes[0] if self.crop_size is None else ImageSize.of(self.crop_size): self.order.total}
        return dict(zip(self.image_sizes, self.order.counts.sum(axis=0).tolist()))

    def fixed_batch(self, indices: Sequence[int]) -> Batch:
        """Samples by their index in the unshuffled sequence of all shards: the same in every run.

        The batch's positions are these indices. Raises IndexError beyond the last sample.
        """
        if not all(0 <= index < self.order.total for index in indices):
            raise IndexError(f"indices {min(indices)} to {max(indices)} of {self.order.total} samples")
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            return self._count(*self._submit(pool, indices, self._in_sequence).result())

    def _schedule(self, start: int) -> Iterator[range]:
        """The positions of each micro-batch of this rank; its part of a global batch is contiguous."""
        share = self.global_batch // self.world_size
        for batch_start in itertools.count(start, self.global_batch):
            first = batch_start + self.rank * share
            for position in range(first, first + share, self.micro_batch):
                yield range(position, position + self.micro_batch)

    def _in_sequence(self, number: int, count: int = 0) -> tuple[int, int]:
        number = (number + count) % self.order.total
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.order.sizes[shard])

    def _submit(
        self, pool: ThreadPoolExecutor, positions: Sequence[int], locate: Locate
    ) -> Future[tuple[Batch, list[_Sample]]]:
        size = self._size(positions[0], locate)
        # Filled by the decoding threads.
        shape = (len(positions), self.channels, *(size if self.crop_size is None else (self.crop_size,) * 2))
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)  # (B, C, H, W)
        rows = images.numpy()
        samples = [pool.submit(self._read, position, locate, size, rows[i]) for i, position in enumerate(positions)]
        # The pool starts tasks in order: the images that _assemble waits for are being decoded already, so that it
        # cannot keep their threads from them.
        return pool.submit(self._assemble, images, positions, samples)

    def _size(self, position: int, locate: Locate) -> ImageSize:
        """The size to which the images of a batch are scaled, before they are cropped."""
        if isinstance(self.order, BucketOrder) and locate != self._in_sequence:
            return self.image_sizes[self.order.bucket(position)]
        return self.image_sizes[0]

    def _read(self, position: int, locate: Locate, size: ImageSize, pixels: np.ndarray) -> _Sample:
        """Decode one image into `pixels` (C, H, W); runs in a decoding thread."""
        bad = []
        for count in range(MIN_READ):
            shard, index = locate(position, count)
            try:
                data = self.shards[shard].image(index)
                number = self._caption_number(shard, index, position, locate)
                tokens = self._tokens(shard, index, number)
            except TransferError as error:
                self._lost[shard] = str(error)
                bad.append((shard, index, str(error)))
                continue
            try:
                image = open_rgb(data, at_least=max(size))
            except ValueError as error:
                bad.append((shard, index, str(error)))
                continue
            cropped = resize_and_crop(image, size, crop=self._crop(position, size))
            pixels[:] = to_pixels(cropped, self.channels)  # (C, H, W)
            if locate != self._in_sequence and self._mirrored(shard, index, position, number):
                pixels[:] = pixels[:, :, ::-1].copy()  # (C, H, W)
            return _Sample(self.shards[shard].key(index), (shard, index), tokens, is_enlarged(image, size), bad)
        raise ValueError(f"{len(bad)} images in a row are unreadable, first {self._describe(*bad[0])}")

    def _caption_number(self, shard: int, index: int, position: int, locate: Locate) -> int:
        """Which of a sample's captions a position has."""
        captions = self.shards[shard].number_of_captions(index)
        if captions == 1 or locate == self._in_sequence:
            return 0
        return int(random_bits(self.crop_seed, CAPTIONS, (position, 0), 1)[0] % np.uint64(captions))

    def _tokens(self, shard: int, index: int, number: int) -> Tensor | None:
        """The embeddings (L, E) of a caption."""
        return None if self.caches is None else self.caches[shard].caption(index, number)

    def _mirrored(self, shard: int, index: int, position: int, number: int) -> bool:
        """Whether the image of a position is mirrored."""
        if not self.flip or random_bits(self.crop_seed, FLIPS, (position, 0), 1)[0] % np.uint64(2):
            return False
        return not names_side(self.shards[shard].captions_of(index)[number])

    def _crop(self, position: int, size: ImageSize) -> Literal["center"] | tuple[int, int, int]:
        if self.crop_size is None:
            return "center"
        top, left = random_bits(self.crop_seed, CROPS, (position, 0), 2).tolist()
        return top % (size.height - self.crop_size + 1), left % (size.width - self.crop_size + 1), self.crop_size

    def _assemble(
        self, images: Tensor, positions: Sequence[int], futures: list[Future[_Sample]]
    ) -> tuple[Batch, list[_Sample]]:
        samples = [future.result() for future in futures]
        text = None
        if self.caches is not None:
            text = PackedEmbeddings.from_list([sample.tokens for sample in samples if sample.tokens is not None])
            assert len(text) == len(samples)
            if self.pin:
                text = text.pin_memory()
        order_positions = torch.tensor(list(positions), dtype=torch.int64)  # (B,)
        keys, origins = [sample.key for sample in samples], [sample.origin for sample in samples]
        return Batch(images, text, order_positions, keys, origins, self._loss_weights(origins)), samples

    def _loss_weights(self, origins: Sequence[Origin]) -> Tensor | None:
        """Factors (B,) on the losses of samples of a mixture; None if all of its data sets have 1."""
        if isinstance(self.order, Order) or all(part.loss_weight == 1 for part in self.order.parts):
            return None
        weights = torch.tensor([self.order.part_of(shard).loss_weight for shard, _ in origins])  # (B,)
        return weights.pin_memory() if self.pin else weights

    def _count(self, batch: Batch, samples: list[_Sample]) -> Batch:
        """Count the samples of a batch; runs in the consumer's thread. Raises ValueError if too many were bad."""
        for sample in samples:
            lost = sum(shard in self._lost for shard, _, _ in sample.bad)
            self.counters["read"] += 1 + len(sample.bad)
            self.counters["bad"] += len(sample.bad) - lost
            self.counters["lost"] += lost
            self.counters["upscaled"] += sample.upscaled
            if not isinstance(self.order, Order) and self.order.parts:
                self._delivered[self.order.part_of(sample.origin[0]).name] += 1
            for shard, index, reason in sample.bad:
                if shard in self._lost:
                    self._count_lost(shard, reason)
                elif (shard, index) not in self._bad:
                    self._bad[shard, index] = self._describe(shard, index, reason)
                    logger.warning("replaced sample %s", self._bad[shard, index])
        read, bad = self.counters["read"], self.counters["bad"]
        expected = (self.max_bad_share - self._excluded_share) * read
        if read >= MIN_READ and bad > expected + 3 * math.sqrt(expected):
            first = "; ".join(list(self._bad.values())[:3])
            raise ValueError(
                f"{bad} of {read} images read are unreadable, more than fastimagen.data.max_bad_share = "
                f"{self.max_bad_share} allows: {first}{' ...' if len(self._bad) > 3 else ''}"
            )
        return batch

    def captions(self, batch: Batch) -> list[str]:
        """The captions of a batch of `batches`, each the one whose embeddings the sample has."""
        return [
            self.shards[shard].captions_of(index)[self._caption_number(shard, index, position, self.order.after)]
            for (shard, index), position in zip(batch.origins, batch.positions.tolist())
        ]

    def mixture_values(self, position: int) -> dict[str, float]:
        """For the record at a position in a mixture: each data set's share of the samples of this rank since the start
        of the process, and how often its samples have been read; {} for one data set."""
        if isinstance(self.order, Order) or not self.order.parts:
            return {}
        values, delivered = {}, self._delivered.total()
        for name, epochs in self.order.epochs(position).items():
            values[f"share/{name}"] = round(self._delivered[name] / max(1, delivered), 4)
            values[f"epochs/{name}"] = round(epochs, 4)
        return values

    def _count_lost(self, shard: int, reason: str) -> None:
        """Report a shard that could not be downloaded. Raises ValueError if too many samples are in such shards."""
        if shard in self._reported:
            return
        self._reported.add(shard)
        logger.warning("lost shard, replacing its %s: %s", counted(len(self.shards[shard]), "sample"), reason)
        samples = sum(len(self.shards[other]) for other in self._reported)
        if samples > (self.max_bad_share - self._excluded_share) * self._known:
            raise ValueError(
                f"{samples} of {self._known} samples are in shards that cannot be downloaded, more than "
                f"fastimagen.data.max_bad_share = {self.max_bad_share} allows: {reason}"
            )

    def has_finite_text(self, origin: Origin) -> bool:
        """Whether the embeddings of a sample are finite; True without embeddings."""
        shard, index = origin
        numbers = range(self.shards[shard].number_of_captions(index))
        tokens = [self._tokens(shard, index, number) for number in numbers]
        return all(bool(caption.isfinite().all()) for caption in tokens if caption is not None)

    def describe(self, origin: Origin) -> str:
        """The name of a sample for a message: "KEY" of SHARD."""
        shard, index = origin
        return f'"{self.shards[shard].key(index)}" of {self.shards[shard].path}'

    def _describe(self, shard: int, index: int, reason: str) -> str:
        return reason if shard in self._lost else f"{self.describe((shard, index))}: {reason}"
