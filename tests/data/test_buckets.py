"""Images that are not square: buckets, the order of their batches, and the sizes that the index knows."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastimagen.config_file import config_from_dict
from fastimagen.data.batch import Batch
from fastimagen.data.buckets import BucketOrder, bucket_numbers, bucket_sizes
from fastimagen.data.image_header import stored_size
from fastimagen.data.loader import Loader
from fastimagen.data.mixture import Part
from fastimagen.data.order import Order
from fastimagen.data.shard import PLAIN, Reading, Shard
from fastimagen.data.shard_index import index_shard
from fastimagen.data.shards import open_shards
from fastimagen.data.source import open_data
from fastimagen.images import resize_and_crop, to_pixels
from fastimagen.sizes import ImageSize
from fastimagen.train.resume import check_resuming
from fastimagen.train.run import Run

SIZES = Reading(sizes=True)
BUCKETS = [ImageSize.parse(text) for text in ("8x8", "12x6", "6x12")]
SHAPES = {0: (30, 32), 1: (40, 20), 2: (16, 40)}
"""Width and height of an image that belongs to a bucket."""


def stub(*numbers: int) -> Any:
    """A shard of images that belong to these buckets."""
    return SimpleNamespace(image_sizes=np.array([SHAPES[number] for number in numbers], dtype=np.uint16).reshape(-1, 2))


def make_tar(path: Path, numbers: list[int], *, first: int = 0, bad: frozenset[int] = frozenset()) -> Path:
    """Images of these buckets in colours of their own; the caption is the key."""
    with tarfile.open(path, "w") as tar:
        for key, number in enumerate(numbers, first):
            data = io.BytesIO()
            Image.new("RGB", SHAPES[number], (key, 255 - key, 9)).save(data, "PNG")
            image = data.getvalue()[:-30] if key in bad else data.getvalue()  # whose header is intact
            for name, content in ((f"{key:04d}.png", image), (f"{key:04d}.txt", f"{key:04d}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def take(loader: Loader, start: int, count: int) -> list[Batch]:
    batches = loader.batches(start)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


# ---- the order


def test_every_image_comes_once_an_epoch_in_batches_of_one_bucket() -> None:
    shards = [stub(*[0] * 12, *[1] * 5), stub(*[1] * 3, *[2] * 4, *[0] * 4), stub(), stub(*[0] * 8, *[2] * 4)]
    order = BucketOrder(shards, BUCKETS, batch=4, seed=3)
    assert order.total == 40 and order.counts.sum(axis=0).tolist() == [24, 8, 8]
    epochs = [[order[position] for position in range(first, first + 40)] for first in (0, 40)]
    everything = {(number, index) for number, shard in enumerate(shards) for index in range(len(shard.image_sizes))}
    for read in epochs:
        assert len(read) == len(everything) and {*read} == everything
        shapes = [tuple(shards[shard].image_sizes[index].tolist()) for shard, index in read]
        assert all(len({*shapes[first : first + 4]}) == 1 for first in range(0, 40, 4))
    assert epochs[0] != epochs[1]
    assert [order.bucket(position) for position in range(40)] == [
        next(number for number, shape in SHAPES.items() if shape == tuple(shards[s].image_sizes[i].tolist()))
        for s, i in epochs[0]
    ]
    assert {shard for position in range(40) for shard in order.ahead(position, 12)} == {0, 1, 2, 3}


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any), batch=st.integers(1, 7))
def test_incomplete_batches_continue_with_the_next_epoch_of_their_bucket(counts: list[int], batch: int) -> None:
    shards = [stub(*(number for number, count in enumerate(counts) for _ in range(count)))]
    order = BucketOrder(shards, BUCKETS, batch, seed=1)
    batches = 3 * max(1, order.total // batch)
    read = [(order.bucket(position), order[position]) for position in range(batches * batch)]
    for number, total in enumerate(counts):
        own = [origin for bucket, origin in read if bucket == number]
        assert len(own) % batch == 0
        assert abs(len(own) - len(read) * total / order.total) < 3 * batch  # one for each bucket
        for epoch in range(len(own) // total if total else 0):
            assert len({*own[epoch * total : (epoch + 1) * total]}) == total


def test_the_order_of_buckets_is_the_same_in_every_version() -> None:
    order = BucketOrder([stub(*[0, 1, 2, 1] * 5), stub(*[0, 0, 2] * 5)], BUCKETS, batch=3, seed=1)
    assert [order[position] for position in range(300, 309)] == PINNED


PINNED = [(0, 12), (1, 7), (0, 16), (1, 13), (1, 1), (1, 6), (1, 9), (0, 0), (1, 3)]


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect_ratio() -> None:
    sizes = np.array([(100, 100), (100, 69), (100, 71), (69, 100), (9000, 10), (0, 0), (65535, 2)], dtype=np.uint16)
    assert bucket_numbers(sizes, BUCKETS).tolist() == [0, 1, 0, 2, 1, 0, 1]
    assert bucket_numbers(sizes, BUCKETS[:1]).tolist() == [0] * len(sizes)


def test_data_sets_of_a_mixture_keep_their_shares_whatever_their_shapes() -> None:
    shards = [stub(*[0] * 30), stub(*[1] * 30), stub(*[0] * 10, *[1] * 50, *[2] * 40)]
    parts = [Part("squares", 3, 1), Part("wide", 1, 1, 0.5), Part("all", 2, 1)]
    order = BucketOrder(shards, BUCKETS, batch=5, seed=2, parts=parts)
    count = 5 * 3 * 1024 // 1
    read = Counter(order[position][0] for position in range(count))
    for shard, part in enumerate(parts):
        assert read[shard] / count == pytest.approx(float(Fraction(part.weight) / 6), abs=0.01)
    assert order.part_of(1).name == "wide" and order.epochs(count)["all"] == pytest.approx(read[2] / 100)
    assert order.epochs(503)["wide"] == pytest.approx(sum(order[p][0] == 1 for p in range(503)) / 30)
    one = [order[position] for position in range(count) if order[position][0] == 2]
    wide = [origin for origin in one if 10 <= origin[1] < 60]
    assert all(len({*wide[first : first + 50]}) == 50 for first in range(0, len(wide) - 50, 50))


# ---- batches


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    numbers = [0, 1, 2, 1, 0, 2, 1] * 4
    paths = [make_tar(tmp_path / f"{n}.tar", numbers, first=28 * n, bad=frozenset(range(30, 40))) for n in range(3)]
    return [index_shard(path, SIZES) for path in paths]


def make_loader(shards: list[Shard], **options: Any) -> Loader:
    options = {"global_batch": 8, "micro_batch": 8, "crop_seed": 7, "max_bad_share": 1.0} | options
    order = BucketOrder(shards, BUCKETS, options["global_batch"], seed=5)
    return Loader(shards, None, order, size=8, buckets=BUCKETS, **options)


def test_ranks_and_resumed_runs_read_the_batches_of_one_run(shards: list[Shard]) -> None:
    whole = take(make_loader(shards, threads=3), 0, 24)
    shapes = {tuple(batch.images.shape[2:]) for batch in whole}
    assert shapes == {*BUCKETS}
    by_position = {int(p): (key, image) for b in whole for p, key, image in zip(b.positions, b.keys, b.images)}
    for world_size, micro_batch in ((2, 4), (4, 1), (1, 2)):
        for rank in range(world_size):
            options = dict(rank=rank, world_size=world_size, micro_batch=micro_batch)
            for batch in take(make_loader(shards, **options), 80, 12 * 8 // world_size // micro_batch):
                for position, key, image in zip(batch.positions.tolist(), batch.keys, batch.images):
                    assert key == by_position[position][0] and torch.equal(image, by_position[position][1])
    with pytest.raises(ValueError, match="position 12 is not the start of a batch of 8 of one bucket"):
        take(make_loader(shards), 12, 1)


def test_an_unreadable_image_is_replaced_by_one_of_its_bucket(shards: list[Shard]) -> None:
    loader = make_loader(shards, global_batch=1, micro_batch=1)  # the next position may have another bucket
    batches = take(loader, 0, 90)
    assert loader.counters["bad"] >= 10
    sizes = {key: size for shard in shards for key, size in zip(shard.keys, shard.image_sizes.tolist())}  # type: ignore[union-attr]
    for batch in batches:
        (key,) = batch.keys
        (bucket,) = bucket_numbers(np.array([sizes[key]]), BUCKETS)
        assert batch.images.shape[2:] == BUCKETS[bucket] and not 30 <= int(key) < 40
        size = ImageSize(*batch.images.shape[2:])
        for key, image in zip(batch.keys, batch.images):
            stored = Image.new("RGB", tuple(sizes[key]), (int(key), 255 - int(key), 9))
            assert (to_pixels(resize_and_crop(stored, size), 3) == image.numpy()).all()


def test_crops_of_buckets_are_square(shards: list[Shard]) -> None:
    loader = make_loader(shards, crop_size=4)
    assert {batch.images.shape for batch in take(loader, 0, 6)} == {(8, 3, 4, 4)}
    assert loader.samples_by_size() == {ImageSize(4, 4): 84}
    assert make_loader(shards).samples_by_size() == {BUCKETS[0]: 24, BUCKETS[1]: 36, BUCKETS[2]: 24}
    with pytest.raises(ValueError, match="crop_size must lie between 1 and size 6, got 7"):
        make_loader(shards, crop_size=7)


def test_small_buckets_are_named(shards: list[Shard]) -> None:
    assert make_loader(shards, global_batch=32, micro_batch=32).describe_buckets() == [
        "samples of buckets: 8x8 24 (28.6%), 12x6 36 (42.9%), 6x12 24 (28.6%)",
        "bucket 8x8 has 24 samples, fewer than a batch of 32: its batches repeat them",
        "bucket 6x12 has 24 samples, fewer than a batch of 32: its batches repeat them",
    ]
    plain = Loader(shards, None, Order([28] * 3, 0), size=8, global_batch=4, micro_batch=4, crop_seed=0)
    assert plain.describe_buckets() == [] and plain.samples_by_size() == {ImageSize(8, 8): 84}


# ---- sizes in index and manifest


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_the_size_of_an_image_is_known_from_its_header(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    stored, reads = data.getvalue(), []

    def read(length: int) -> bytes:
        reads.append(length)
        return stored[:length]

    assert stored_size(read, len(stored)) == (200, 120)
    if kind in ("PNG", "JPEG", "BMP"):
        assert reads == [4096]


def test_a_turned_image_has_its_upright_size_and_long_headers_are_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        Image.new("RGB", (200, 120)).save(data, kind, exif=exif, icc_profile=b"x" * 200_000)
        stored = data.getvalue()
        assert stored_size(lambda length, stored=stored: stored[:length], len(stored)) == (120, 200)  # type: ignore[misc]
    assert stored_size(lambda length: b"rubbish"[:length], 7) == (0, 0)


def test_manifest_and_index_keep_the_sizes_and_other_readings_none(tmp_path: Path, monkeypatch: Any) -> None:
    for number in range(2):
        make_tar(tmp_path / f"{number}.tar", [number] * 3 + [2], first=4 * number)
    assert open_shards(tmp_path)[0].row.image_sizes is None
    first = open_shards(tmp_path, reading=SIZES)
    assert [shard.image_sizes.tolist() for shard in first] == [[[30, 32]] * 3 + [[16, 40]], [[40, 20]] * 3 + [[16, 40]]]
    assert SIZES.suffix and len({*tmp_path.glob("*.manifest")}) == 2 and PLAIN.suffix == ""
    monkeypatch.setattr("fastimagen.data.listing.load_or_build_index", None)
    again = open_shards(tmp_path, reading=SIZES)
    assert [shard.image_sizes.tolist() for shard in again] == [shard.image_sizes.tolist() for shard in first]
    monkeypatch.undo()
    monkeypatch.setattr("fastimagen.data.shard_index.index_shard", None)
    whole, _ = again[0].opened()  # with the index beside the tar
    assert whole.image_sizes is not None and whole.image_sizes.tolist() == first[0].image_sizes.tolist()


# ---- configuration


@pytest.fixture
def config(toy_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A base of 8 pixels, and 16 above it, on images of three shapes."""
    (tmp_path / "own").mkdir()
    make_tar(tmp_path / "own/0.tar", [0, 1, 2, 1] * 8)
    for stage in toy_config["fastimagen"]["cascade"]["stages"]:
        stage["unet"] |= {"text_dim": None, "cross_attention": False}
        stage["sampling"]["guidance"] = 1.0
    toy_config["fastimagen"]["cascade"]["stages"][1]["crop"] = None
    toy_config["fastimagen"]["data"] = {
        "shards": str(tmp_path / "own"),
        "validation": {"count": 6},
        "buckets": ["8x8", "12x6", "6x12"],
        "where": [],
    }
    return toy_config


def test_later_stages_have_the_buckets_of_the_first_enlarged(config: dict[str, Any]) -> None:
    run = Run(config_from_dict(config), None, "all")
    assert [[str(size) for size in run.sizes(stage)] for stage in run.stages] == [
        ["8x8", "12x6", "6x12"],
        ["16x16", "24x12", "12x24"],
    ]
    section = config_from_dict(config).fastimagen.model_copy(update={"data": config_from_dict({}).fastimagen.data})
    assert bucket_sizes(section, run.stages[0]) == []


def test_validation_and_training_of_buckets_share_no_sample(config: dict[str, Any]) -> None:
    section = config_from_dict(config).fastimagen
    train, validation = open_data(section, with_text=False)
    assert validation is not None
    chunks = validation.in_chunks(5, 2, BUCKETS)
    assert sorted(index for indices, _ in chunks for index in indices) == [0, 1, 2, 3, 4]
    for indices, bucket in chunks:
        batch = validation.fixed_batch(section, indices, size=BUCKETS[bucket], crop=None)
        assert batch.images.shape == (len(indices), 3, *BUCKETS[bucket]) and len(indices) <= 2
    options = dict(crop=None, global_batch=4, rank=0, world_size=1, micro_batch=4, seed=1, crop_seed=1)
    loader = train.loader(section, size=8, buckets=BUCKETS, **options)
    keys = {key for batch in take(loader, 0, 24) for key in batch.keys}
    held_out = {validation.shards[0].key(index) for index in range(6)}
    assert len(keys) == 26 and not keys & held_out


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (["8x8", "12"], r'fastimagen.data.buckets: "12" is not a size: write WIDTHxHEIGHT in pixels, such as "80x48"'),
        (["8x8", "16x16"], "every bucket needs an aspect ratio of its own, but another one has that of 8x8"),
        (
            ["9x8"],
            r'data.buckets: 9x8: stage "base" would have 9x8, but sides must be multiples of 2, the total stride',
        ),
        (["10x6", "0x8"], r'"0x8" is not a size'),
    ],
)
def test_wrong_buckets_are_one_line(config: dict[str, Any], buckets: list[str], message: str) -> None:
    config["fastimagen"]["data"]["buckets"] = buckets
    with pytest.raises(ValueError, match=message) as raised:
        Run(config_from_dict(config), None, "all")
    assert "\n" not in str(raised.value)


def test_crops_and_parts_of_pixels_are_refused(config: dict[str, Any]) -> None:
    stages = config["fastimagen"]["cascade"]["stages"]
    stages[1]["crop"] = 16
    with pytest.raises(ValueError, match='12x6: stage "sr" has images of 24x12, and cannot take crops of 16 pixels'):
        Run(config_from_dict(config), None, "all")
    stages[1] |= {"crop": None, "size": 20}
    config["fastimagen"]["data"]["buckets"] = ["8x8", "14x6"]
    with pytest.raises(ValueError, match=r'data.buckets: 14x6: stage "sr" would have 35x15, but sides must be'):
        Run(config_from_dict(config), None, "all")
    with pytest.raises(ValueError, match=r"14x5 becomes 21x7.5 where 8 pixels become 12: choose sizes that stay whole"):
        ImageSize.parse("14x5").scaled(12, 8)


def test_other_buckets_and_other_batches_do_not_resume(config: dict[str, Any], tmp_path: Path) -> None:
    def settings_now(batch: int) -> dict[str, Any]:
        run = Run(config_from_dict(config), tmp_path / "run", "base")
        return run.resume_settings(run.stages[0], {"train_batch_size": batch}, run.data[0].shards)

    saved = settings_now(4)
    assert check_resuming(tmp_path, "base", saved, settings_now(4), step=1, samples=4) == []
    with pytest.raises(ValueError, match=r"train_batch_size 4 -> 8 \(with data.buckets every batch has one size"):
        check_resuming(tmp_path, "base", saved, settings_now(8), step=1, samples=4)
    config["fastimagen"]["data"]["buckets"].pop()
    with pytest.raises(ValueError, match=r"data.buckets .* \(positions in the data would mean other samples\)"):
        check_resuming(tmp_path, "base", saved, settings_now(4), step=1, samples=4)
    del config["fastimagen"]["data"]["buckets"]
    assert "data.buckets" not in settings_now(4)  # as in checkpoints of earlier versions
