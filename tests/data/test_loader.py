"""The loader: batches for any number of ranks and threads, replacements for unreadable images, end of threads."""

from __future__ import annotations

import io
import itertools
import logging
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastimagen.data.batch import Batch
from fastimagen.data.loader import Loader
from fastimagen.data.order import Order
from fastimagen.data.shard_index import index_shard
from fastimagen.images import resize_and_crop

WIDTH = 4


def image(number: int, side: int = 8) -> bytes:
    """An image whose colour encodes its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side + 3, side), (number % 256, number // 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(folder, sizes, bad=(), side=8):
    """Shards of numbered samples (key = number); images whose number is in `bad` are damaged."""
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        path = folder / f"{shard:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(size):
                content = b"rubbish" if number in bad else image(number, side)
                for name, data in ((f"{number}.png", content), (f"{number}.txt", b"text")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
        shards.append(index_shard(path) if size else None)
    return [shard for shard in shards if shard is not None]


class Numbered(list):
    """Embeddings of samples with one caption each."""

    def caption(self, index, number):
        assert number == 0
        return self[index]


def embeddings(shards):
    """One to three tokens for each sample, all of them its number."""
    return [
        Numbered(torch.full((1 + int(key) % 3, WIDTH), float(key), dtype=torch.bfloat16) for key in shard.keys)
        for shard in shards
    ]


def make_loader(shards, *, seed=5, **options):
    options = {"size": 8, "global_batch": 12, "micro_batch": 12} | options
    order = Order([len(shard) for shard in shards], seed, block=2)
    return Loader(shards, embeddings(shards), order, crop_seed=seed, **options)


def take(loader: Loader, start: int, count: int) -> list[Batch]:
    batches = loader.batches(start * loader.global_batch)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def numbers(batch: Batch) -> list[int]:
    """The numbers that the colours of the images encode."""
    colors = batch.images[:, :, 2, 2].int()  # (b, 3)
    assert (colors[:, 2] == 77).all()
    return (colors[:, 0] + 256 * colors[:, 1]).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [40, 25, 60, 3, 50])


# ---- order


@pytest.mark.parametrize(
    "world, micro, threads, prefetch",
    [(1, 12, 1, 1), (2, 6, 2, 2), (2, 3, 3, 1), (4, 3, 2, 2), (3, 2, 1, 3), (12, 1, 2, 1)],
)
@pytest.mark.parametrize("start", [0, 17])
def test_global_batches_do_not_depend_on_ranks_micro_batches_and_threads(
    shards, world, micro, threads, prefetch, start
):
    order = Order([len(shard) for shard in shards], 5, block=2)
    steps, per_step = 16, 12 // world // micro  # 178 samples: the 14th step crosses the end of an epoch
    parts = []
    for rank in range(world):
        loader = make_loader(shards, world_size=world, rank=rank, micro_batch=micro, threads=threads, prefetch=prefetch)
        parts.append(take(loader, start, steps * per_step))
    for step in range(steps):
        batches = [batch for part in parts for batch in part[step * per_step : (step + 1) * per_step]]
        found = {int(p): key for batch in batches for p, key in zip(batch.positions, batch.keys)}
        expected = {}
        for position in range((start + step) * 12, (start + step + 1) * 12):
            shard, index = order[position]
            expected[position] = shards[shard].key(index)
        assert found == expected and sum(map(len, batches)) == 12


def test_image_text_and_key_belong_together(shards):
    for batch in take(make_loader(shards, micro_batch=6), 3, 20):
        keys = [int(key) for key in batch.keys]
        assert batch.images.shape == (6, 3, 8, 8) and batch.images.dtype == torch.uint8 and len(batch) == 6
        assert numbers(batch) == keys
        assert batch.text.lengths.tolist() == [1 + key % 3 for key in keys]
        assert batch.text.embeds[:, 0, 0].tolist() == [float(torch.tensor(key).bfloat16()) for key in keys]
        assert batch.positions.dtype == torch.int64


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    world=st.integers(1, 3),
    micro=st.integers(1, 4),
    steps=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_no_sample_is_lost_or_repeated_in_an_epoch(tmp_path_factory, sizes, world, micro, steps, seed):
    shards = make_shards(tmp_path_factory.mktemp("any"), sizes)
    total, share = sum(sizes), micro * steps
    needed = -(-2 * total // (world * share)) * steps  # micro-batches of two epochs
    seen: dict[int, str] = {}
    for rank in range(world):
        loader = make_loader(
            shards, seed=seed, world_size=world, rank=rank, micro_batch=micro, global_batch=world * share
        )
        for batch in take(loader, 0, needed):
            for position, key in zip(batch.positions.tolist(), batch.keys):
                assert seen.setdefault(position, key) is key
    for epoch in (0, 1):
        keys = Counter(seen[epoch * total + offset] for offset in range(total))
        assert keys == Counter(str(number) for number in range(total))


def test_fixed_batch_is_in_the_order_of_the_shards(shards):
    loader = make_loader(shards)
    indices = [0, 1, 39, 40, 64, 65, 177, 5]
    batch = loader.fixed_batch(indices)
    assert numbers(batch) == indices == batch.positions.tolist() and batch.keys == [str(i) for i in indices]
    with pytest.raises(IndexError, match="178"):
        loader.fixed_batch([3, 178])


def test_a_loader_without_embeddings_has_no_text(shards):
    order = Order([len(shard) for shard in shards], 0)
    (batch,) = take(Loader(shards, None, order, size=8, global_batch=4, micro_batch=4, crop_seed=0), 0, 1)
    assert batch.text is None and numbers(batch) == [int(key) for key in batch.keys]


# ---- sizes


def test_random_crops_depend_on_the_position_only(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, size=(3, 48, 40, 3), dtype=np.uint8)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, pixels in enumerate(noise):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            for name, data in ((f"{i}.png", buffer.getvalue()), (f"{i}.txt", b"text")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = [index_shard(tmp_path / "0.tar")]
    options = dict(size=40, crop_size=16, global_batch=6)
    batches = take(make_loader(shards, micro_batch=6, **options), 0, 10)
    apart = take(make_loader(shards, micro_batch=1, world_size=2, rank=1, **options), 4, 3)
    assert torch.equal(torch.cat([batch.images for batch in apart]), batches[4].images[3:])
    offsets = set()
    for batch in batches:
        assert batch.images.shape == (6, 3, 16, 16)
        for window, key in zip(batch.images, batch.keys):
            square = torch.from_numpy(np.array(resize_and_crop(Image.fromarray(noise[int(key)]), 40)))  # (40, 40, 3)
            square = square.permute(2, 0, 1)  # (3, 40, 40)
            hits = [
                (y, x) for y in range(25) for x in range(25) if torch.equal(square[:, y : y + 16, x : x + 16], window)
            ]
            assert len(hits) == 1
            offsets.add(hits[0])
    rows, columns = zip(*offsets)
    assert len(offsets) > 50 and min(rows) < 3 and max(rows) > 21 and min(columns) < 3 and max(columns) > 21


def test_upscaled_images_are_counted(shards):
    loader = make_loader(shards, size=16)
    (batch,) = take(loader, 0, 1)
    assert batch.images.shape == (12, 3, 16, 16) and loader.counters["upscaled"] == 12
    others = dict.fromkeys(("bad", "excluded", "filtered", "held_out", "lost"), 0)
    assert loader.counters == {"read": 12, "upscaled": 12, **others}


# ---- bad samples


def test_unreadable_images_are_replaced_by_the_same_samples_in_every_run(tmp_path, caplog):
    bad = {3, 17, 44, 45, 46, 90}
    shards = make_shards(tmp_path, [50, 30, 40], bad)
    order, total = Order([50, 30, 40], 5, block=2), 120
    loader = make_loader(shards, max_bad_share=1.0)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 0, 20)  # two epochs
    replaced = 0
    for batch in batches:
        assert numbers(batch) == [int(key) for key in batch.keys] and not bad & set(numbers(batch))
        for position, key in zip(batch.positions.tolist(), batch.keys):
            wanted = position
            while int(shards[order[wanted][0]].key(order[wanted][1])) in bad:
                wanted, replaced = wanted + 1, replaced + 1
            assert key == shards[order[wanted][0]].key(order[wanted][1])
    assert loader.counters["bad"] == replaced >= 2 * len(bad)
    assert loader.counters["read"] == 2 * total + replaced
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(bad) and sum('"90" of' in line and "002.tar" in line for line in lines) == 1
    resumed = take(make_loader(shards, max_bad_share=1.0, world_size=3, rank=2, micro_batch=2), 7, 2)
    assert [key for batch in resumed for key in batch.keys] == batches[7].keys[8:]


def test_one_unreadable_image_of_two_does_not_stop_training(tmp_path):
    loader = make_loader(make_shards(tmp_path, [2], bad={0}), global_batch=2, micro_batch=2)
    assert [key for batch in take(loader, 0, 3) for key in batch.keys] == ["1"] * 6


def test_too_large_a_share_of_unreadable_images_stops_training_but_chance_does_not(tmp_path):
    rare = make_shards(tmp_path, [300], bad={10, 20, 30})  # 1.0 %
    assert len(take(make_loader(rare), 0, 100)) == 100
    often = make_shards(tmp_path, [300], bad=set(range(0, 300, 20)))  # 5 %
    loader = make_loader(often)
    with pytest.raises(ValueError, match=r'unreadable, more than fastimagen.data.max_bad_share = 0.01 .*"\d*0" of'):
        take(loader, 0, 100)
    assert 100 <= loader.counters["read"] < 600
    assert len(take(make_loader(often, max_bad_share=0.05), 0, 50)) == 50
    with pytest.raises(ValueError, match="unreadable"):
        take(make_loader(rare, max_bad_share=0.0), 0, 100)


def test_a_data_set_of_unreadable_images_stops_training(tmp_path):
    loader = make_loader(make_shards(tmp_path, [5], bad=set(range(5))), max_bad_share=1.0)
    with pytest.raises(ValueError, match='100 images in a row are unreadable, first "'):
        take(loader, 0, 1)


def test_samples_that_the_index_excludes_count_as_bad(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(200):
            for name, data in ((f"{i}.png", image(i)), (f"{i}.txt", b"" if i % 10 == 0 else b"text")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = [index_shard(path)]
    with pytest.raises(ValueError, match=r"20 of 200 samples cannot be used \(20 empty caption\), more than"):
        make_loader(shards)
    assert make_loader(shards, max_bad_share=0.1).counters["excluded"] == 20


# ---- threads and errors


def decoding_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


def test_decoding_threads_end_with_the_iterator(shards):
    batches = make_loader(shards, threads=3).batches(0)
    next(batches)
    assert decoding_threads() > 0
    batches.close()
    assert decoding_threads() == 0
    with pytest.raises(ZeroDivisionError):
        for _batch in make_loader(shards).batches(0):
            raise ZeroDivisionError
    del _batch
    assert decoding_threads() == 0


def test_errors_in_decoding_threads_reach_the_consumer(shards):
    class Broken(Numbered):
        def __getitem__(self, index):
            raise OSError("disk failure")

    order = Order([len(shard) for shard in shards], 0)
    caches = [Broken(cache) for cache in embeddings(shards)]
    with pytest.raises(OSError, match="disk failure"):
        take(Loader(shards, caches, order, size=8, global_batch=4, micro_batch=4, crop_seed=0), 0, 1)
    assert decoding_threads() == 0


def test_a_shard_overwritten_during_training_is_an_error_not_an_unreadable_image(tmp_path):
    shards = make_shards(tmp_path, [30])
    (tmp_path / "000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has changed since"):
        take(make_loader(shards, max_bad_share=1.0), 0, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(global_batch=10, micro_batch=4), "global batch of 10"),
        (dict(world_size=5), "on 5 ranks"),
        (dict(crop_size=9), "crop_size must lie between 1 and size 8, got 9"),
        (dict(micro_batch=0), "micro-batches of 0"),
    ],
)
def test_inconsistent_sizes_are_refused(shards, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(shards, **options)


def test_embeddings_of_other_shards_are_refused(shards):
    order = Order([len(shard) for shard in shards], 0)
    with pytest.raises(ValueError, match="fastimagen embed"):
        Loader(shards, embeddings(shards)[::-1], order, size=8, global_batch=4, micro_batch=4, crop_seed=0)


def test_a_grey_loader_gives_the_luma_of_colour_images(tmp_path):
    shards = make_shards(tmp_path, [12])
    loader = make_loader(shards, channels=1)
    batch = loader.fixed_batch(range(12))
    assert batch.images.shape == (12, 1, 8, 8)
    expected = [Image.new("RGB", (1, 1), (number, 0, 77)).convert("L").getpixel((0, 0)) for number in range(12)]
    assert batch.images[:, 0, 0, 0].tolist() == expected
