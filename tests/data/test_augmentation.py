"""What a position makes of a sample: which of its captions it has, and whether its image is mirrored."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image

from fastimagen.data.batch import Batch
from fastimagen.data.loader import Loader, names_side
from fastimagen.data.order import Order
from fastimagen.data.shard import Reading, Shard
from fastimagen.data.shard_index import index_shard

COUNT = 24
CAPTIONS = {0: ["a cat"], 1: ["a cat left of a dog"], 2: ["a cat", "a dog on the right", "a horse"]}
"""Of a sample, by its number modulo 3."""


class NumberedEmbeddings:
    """One token for each caption: (the sample's number, the caption's number)."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.caption(index, 0)

    def caption(self, index: int, number: int) -> torch.Tensor:
        return torch.tensor([[float(index), float(number)]])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Images whose left half is white and whose right half is black."""
    buffer, image = io.BytesIO(), Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 4, 8))
    image.save(buffer, "PNG")
    path = tmp_path_factory.mktemp("captions") / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            metadata = json.dumps({"captions": CAPTIONS[number % 3]}).encode()
            for name, content in ((f"{number:02d}.png", buffer.getvalue()), (f"{number:02d}.json", metadata)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return index_shard(path, Reading(caption_key="captions"))


def make_loader(shard: Shard, *, crop_seed: int = 7, **options) -> Loader:
    options = {"global_batch": COUNT, "micro_batch": COUNT} | options
    return Loader([shard], [NumberedEmbeddings()], Order([COUNT], 5, block=1), size=8, crop_seed=crop_seed, **options)


def take(loader: Loader, start: int, epochs: int) -> list[Batch]:
    """The micro-batches of as many epochs, from position `start`."""
    batches = loader.batches(start)
    try:
        return [next(batches) for _ in range(epochs * COUNT // (loader.world_size * loader.micro_batch))]
    finally:
        batches.close()


def seen(batches: list[Batch]) -> dict[int, tuple[int, int, bool]]:
    """(sample, number of its caption, whether mirrored), by position."""
    found = {}
    for batch in batches:
        tokens, left = batch.text.embeds[:, 0].int().tolist(), batch.images[:, 0, 4, 1].tolist()
        for position, key, (sample, number), value in zip(batch.positions.tolist(), batch.keys, tokens, left):
            assert sample == int(key) and value in (0, 255)
            found[position] = sample, number, value == 0
    return found


def test_the_position_chooses_caption_and_side_for_any_ranks_threads_and_resumption(shard):
    expected = seen(take(make_loader(shard, flip=True), 0, 4))
    ranks = [make_loader(shard, flip=True, world_size=2, rank=rank, micro_batch=4, threads=3) for rank in (0, 1)]
    assert {key: value for loader in ranks for key, value in seen(take(loader, 0, 4)).items()} == expected
    resumed = seen(take(make_loader(shard, flip=True), 2 * COUNT, 2))
    assert resumed == {position: expected[position] for position in range(2 * COUNT, 4 * COUNT)}
    assert seen(take(make_loader(shard, flip=True, crop_seed=8), 0, 4)) != expected


def test_every_caption_of_a_sample_is_read_as_often(shard):
    found = Counter((sample % 3, number) for sample, number, _ in seen(take(make_loader(shard), 0, 30)).values())
    assert set(found) == {(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)}
    assert all(190 < found[2, number] * 240 / 80 < 290 for number in range(3))  # 80 of 240 each, and chance


def test_half_of_the_images_are_mirrored_except_where_the_caption_of_the_position_names_a_side(shard):
    mirrored: dict[tuple[int, int], list[bool]] = {}
    for sample, number, flipped in seen(take(make_loader(shard, flip=True), 0, 30)).values():
        mirrored.setdefault((sample % 3, number), []).append(flipped)
    assert not any(mirrored[1, 0]) and not any(mirrored[2, 1])
    for captions in ((0, 0), (2, 0), (2, 2)):
        share = sum(mirrored[captions]) / len(mirrored[captions])
        assert 0.35 < share < 0.65, captions


def test_without_flip_and_in_fixed_batches_nothing_is_mirrored_and_the_first_caption_is_read(shard):
    assert not any(flipped for *_, flipped in seen(take(make_loader(shard), 0, 2)).values())
    fixed = seen([make_loader(shard, flip=True).fixed_batch(range(COUNT))])
    assert fixed == {number: (number, 0, False) for number in range(COUNT)}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A dog to the LEFT of a tree", True),
        ("the rightmost house", True),
        ("a dial turned anti-clockwise", True),
        ("a cat that cleft a rock", False),
        ("bright light", False),
        ("a copyright notice", False),
    ],
)
def test_captions_that_name_a_side(caption, expected):
    assert names_side(caption) == expected
