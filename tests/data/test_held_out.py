"""Validation samples held out of the training shards."""

from __future__ import annotations

import io
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastimagen.config import FastimagenConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.held_out import choose_held_out
from fastimagen.data.key_hash import hash_keys
from fastimagen.data.loader import Loader
from fastimagen.data.shard import Shard
from fastimagen.data.shard_index import index_shard
from fastimagen.data.source import Split, count_training_samples, open_data
from fastimagen.data_config import HeldOutConfig


def shard(*keys: str) -> Shard:
    """A shard of samples with these keys, without a file."""
    names = np.array([key.encode() for key in keys], dtype=np.bytes_)
    return Shard("none.tar", "", np.arange(6 * len(keys)).reshape(-1, 6), names, {})


def held_out(shards: list[Shard], **config: Any) -> set[str]:
    largest = choose_held_out(shards, HeldOutConfig(**config))
    return {name.decode() for shard in shards for name in shard.names[shard.hashes <= largest]}


def numbered(first: int, last: int) -> Shard:
    """Keys as img2dataset numbers them."""
    return shard(*(f"{number:09d}" for number in range(first, last)))


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1, unique=True))
def test_the_hash_of_a_key_depends_on_nothing_else(keys: list[str]) -> None:
    """Longer keys in the same shard pad the array that holds it."""
    together = hash_keys(shard(*keys, "x" * 60).names)
    alone = [int(hash_keys(shard(key).names)[0]) for key in keys]
    assert together[:-1].tolist() == alone and len(set(alone)) == len(keys)


def test_a_share_of_numbered_keys_is_held_out() -> None:
    shards = [numbered(first, first + 10_000) for first in range(0, 50_000, 10_000)]
    for share in (0.01, 0.3):
        found = len(held_out(shards, share=share)) / 50_000
        assert abs(found - share) < 4 * (share * (1 - share) / 50_000) ** 0.5  # four standard deviations


def test_new_and_reordered_shards_move_no_sample_of_a_share() -> None:
    first, second, new = numbered(0, 500), numbered(500, 1000), shard(*(f"cat-{n}" for n in range(400)))
    before = held_out([first, second], share=0.1)
    after = held_out([new, second, first], share=0.1)
    assert before and before == {key for key in after if not key.startswith("cat-")} != after


def test_a_count_is_exact_and_new_shards_move_no_training_sample_into_validation() -> None:
    first, second, new = numbered(0, 500), numbered(500, 1000), numbered(1000, 1400)
    before = held_out([first, second], count=37)
    assert len(before) == 37 and before == held_out([second, first], count=37)
    after = held_out([new, first, second], count=37)
    assert len(after) == 37
    assert not {key for key in after - before if int(key) < 1000}, "these were trained on"


def test_a_key_that_several_shards_repeat_is_on_one_side() -> None:
    shards = [shard("a", "b", "c", "d")] * 3
    assert len(held_out(shards, count=4)) == 2  # 6 samples


@pytest.mark.parametrize(
    ("config", "what"),
    [({"count": 6}, "count 6 holds out 6 of 6"), ({"share": 1e-9}, "share 1e-09 holds out 0 of 6")],
)
def test_a_split_without_samples_on_one_side_is_refused(config: dict, what: str) -> None:
    with pytest.raises(ValueError, match=f"fastimagen.data.validation: {what} samples: choose another"):
        choose_held_out([shard("a", "b", "c", "d", "e", "f")], HeldOutConfig(**config))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, 'fastimagen.data.validation: give one of "share" and "count"'),
        ({"share": 0.1, "count": 5}, 'fastimagen.data.validation: give one of "share" and "count"'),
        ({"share": 1.0}, r"fastimagen.data.validation.share: Input should be less than 1 \(given: 1.0\)"),
        ({"shar": 0.1}, 'unknown key fastimagen.data.validation.shar; did you mean "share"?'),
    ],
)
def test_a_wrong_split_is_one_line(value: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"fastimagen": {"data": {"validation": value}}})


# ---- a data set


@pytest.fixture
def split_config(toy_config: dict[str, Any]) -> FastimagenConfig:
    toy_config["fastimagen"]["data"]["validation"] = {"count": 10}
    return config_from_dict(toy_config).fastimagen


def keys(split: Split) -> set[str]:
    return {key for shard in split.shards for key in shard.keys}


def loader(split: Split, config: FastimagenConfig, **changes: Any) -> Loader:
    batch = {"global_batch": 6, "micro_batch": 6, "rank": 0, "world_size": 1}
    return split.loader(config, **{"size": 16, "crop": None, "seed": 0, "crop_seed": 0, **batch, **changes})


def test_training_never_reads_a_held_out_sample_and_counts_them(split_config: FastimagenConfig) -> None:
    train, validation = open_data(split_config, with_text=True)
    assert validation is not None and (len(train), len(validation)) == (54, 10)
    assert count_training_samples(split_config) == 54
    batches = loader(train, split_config)
    read = list(islice(batches.batches(0), 18))  # two epochs
    assert {key for batch in read for key in batch.keys} == keys(train)
    assert not keys(train) & keys(validation)
    assert batches.counters["held_out"] == 10


def test_both_sides_have_the_captions_and_embeddings_of_their_samples(
    split_config: FastimagenConfig, toy_config: dict[str, Any]
) -> None:
    toy_config["fastimagen"]["data"]["validation"] = None
    whole, _ = open_data(config_from_dict(toy_config).fastimagen, with_text=True)
    assert whole.caches is not None
    expected = {
        shard.key(index): (shard.caption(index), cache[index])
        for shard, cache in zip(whole.shards, whole.caches)
        for index in range(len(shard))
    }
    for split in open_data(split_config, with_text=True):
        assert split is not None
        batch = split.fixed_batch(split_config, range(len(split)), size=16, crop=None)
        captions, _, _ = split.examples(len(split), split_config, size=16)
        assert batch.text is not None and len(batch.keys) == len(split)
        for key, caption, tokens in zip(batch.keys, captions, batch.text.unpadded()):
            assert caption == expected[key][0] and tokens.equal(expected[key][1])


def test_samples_that_the_index_excludes_count_once(toy_data: Path, tmp_path: Path, toy_config: dict) -> None:
    """A small validation split must not be stopped by the whole data set's excluded samples."""
    folder = tmp_path / "train"
    shutil.copytree(toy_data / "train", folder, ignore=shutil.ignore_patterns("*.index"))
    (path, *_) = sorted(folder.glob("*.tar"))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("alone.jpg"), io.BytesIO())
    assert index_shard(path).excluded == {"no caption": 1}
    toy_config["fastimagen"]["data"] |= {"shards": str(folder), "shapes": None, "validation": {"count": 1}}
    config = config_from_dict(toy_config).fastimagen
    train, validation = open_data(config, with_text=False)
    assert validation is not None
    assert loader(train, config).counters["excluded"] == 1
    assert loader(validation, config).counters["excluded"] == 0
