from __future__ import annotations

import fcntl
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastimagen.data.embedding_cache import (
    EmbeddingCache,
    EmbedReport,
    cache_path,
    captions_hash,
    embed_shards,
    open_cache,
    write_cache,
)
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.text.t5 import T5Encoder
from fastimagen.text.tiny_t5 import build_tiny_t5

CAPTIONS = ["a red circle", "a small blue square on a white background", "", "a red circle", "a star", "a red circle"]
KEYS = [f"{i:05d}" for i in range(len(CAPTIONS))]
IDENTITY = {"encoder": "org/stub", "revision": "1", "max_length": "8", "tokenizer": "t", "preprocessing": "p"}


@dataclass
class StubEncoder:
    """One token per word, at most 8; records the captions it encoded."""

    dim: int = 4
    truncated: int = 0
    unknown: int = 0
    fails_at: str | None = None
    names: dict[str, str] = field(default_factory=lambda: dict(IDENTITY))
    encoded: list[str] = field(default_factory=list)

    def identity(self) -> dict[str, str]:
        return dict(self.names)

    def count_tokens(self, captions) -> list[int]:
        return [len(caption.split()[:7]) + 1 for caption in captions]

    def encode(self, captions, batch_size) -> TextEmbeddings:
        assert 0 < len(captions) <= batch_size
        if self.fails_at in captions:
            raise RuntimeError("the GPU failed")
        self.encoded += captions
        self.truncated += sum(len(caption.split()) > 7 for caption in captions)
        self.unknown += sum("?" in caption for caption in captions)
        return TextEmbeddings.from_list(
            [
                torch.tensor([[len(word) / 8] * self.dim for word in caption.split()[:7]] + [[0.0] * self.dim])
                for caption in captions
            ]
        )


@dataclass
class StubShard:
    path: Path
    keys: list[str] = field(default_factory=lambda: list(KEYS))
    texts: list[str] = field(default_factory=lambda: list(CAPTIONS))
    counts: None = None

    def captions(self) -> list[str]:
        return list(self.texts)


def shards_in(folder: Path, count: int = 5) -> list[StubShard]:
    return [StubShard(folder / f"{i:05d}.tar", texts=[f"{caption} {i}" for caption in CAPTIONS]) for i in range(count)]


def reopen(path: Path, **changes):
    checks = {"identity": IDENTITY, "keys": KEYS, "captions_hash": captions_hash(KEYS, CAPTIONS)}
    return open_cache(path, **(checks | changes))


@pytest.fixture
def cached(tmp_path) -> Path:
    path = tmp_path / "00000.stub.safetensors"
    write_cache(path, KEYS, CAPTIONS, StubEncoder(), batch_size=2)
    return path


# ---- round trip


def test_the_cache_stores_the_embeddings_of_each_caption_alone(tmp_path):
    encoder = T5Encoder(build_tiny_t5(tmp_path / "tiny", CAPTIONS))
    path = tmp_path / "00000.tiny.safetensors"
    write_cache(path, KEYS, CAPTIONS, encoder, batch_size=3)
    cache = reopen(path, identity=encoder.identity())
    assert len(cache) == len(CAPTIONS) and cache.keys() == KEYS and cache.dim == 64
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption]).embeds[0]  # (L, D)
        assert cache[i].dtype == torch.bfloat16 and cache[i].shape == alone.shape
        torch.testing.assert_close(cache[i].float(), alone, rtol=1e-2, atol=1e-3)
    with pytest.raises(IndexError):
        cache[len(CAPTIONS)]


def test_a_repeated_caption_is_encoded_and_stored_once(tmp_path):
    encoder, path = StubEncoder(), tmp_path / "c.safetensors"
    write_cache(path, KEYS, CAPTIONS, encoder, batch_size=2)
    assert sorted(encoder.encoded) == sorted(set(CAPTIONS))
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("tokens").get_shape() == [4 + 8 + 1 + 3, 4]
        assert file.get_tensor("offsets").tolist() == [0, 4, 12, 13, 16]
        assert file.get_tensor("rows").tolist() == [0, 1, 2, 0, 3, 0]
        assert IDENTITY.items() <= file.metadata().items()
    assert len(reopen(path)[1]) == 8 and len(reopen(path)[2]) == 1


def test_threads_and_processes_read_independent_copies(tmp_path):
    keys, captions = [str(i) for i in range(500)], [" ".join(["x" * (i % 9)] * (i % 7)) for i in range(500)]
    path = tmp_path / "c.safetensors"
    write_cache(path, keys, captions, StubEncoder(), batch_size=64)
    cache = reopen(path, keys=keys, captions_hash=captions_hash(keys, captions))
    cache[5].fill_(9)
    assert cache[5].untyped_storage().nbytes() == cache[5].numel() * 2
    expected = [StubEncoder().encode([caption], 1).embeds[0].bfloat16() for caption in captions]
    copied = pickle.loads(pickle.dumps(cache))

    def agrees(start: int) -> bool:
        source = copied if start % 2 else cache
        order = range(start * 97, start * 97 + 500)
        return all(torch.equal(source[i % 500], expected[i % 500]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(agrees, range(8)))


def test_an_empty_shard_has_a_cache_too(tmp_path):
    write_cache(tmp_path / "c.safetensors", [], [], StubEncoder(), batch_size=2)
    assert len(reopen(tmp_path / "c.safetensors", keys=[], captions_hash=captions_hash([], []))) == 0


def test_wrong_counts_and_infinite_embeddings_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="6 captions expected, but 5"):
        write_cache(path, KEYS, CAPTIONS[:5], StubEncoder(), batch_size=2)

    class Overflowing(StubEncoder):
        def encode(self, captions, batch_size):
            encoded = super().encode(captions, batch_size)
            return TextEmbeddings(encoded.embeds + torch.inf, encoded.mask)

    with pytest.raises(ValueError, match="infinite or NaN"):
        write_cache(path, KEYS, CAPTIONS, Overflowing(), batch_size=2)
    assert list(tmp_path.iterdir()) == []


# ---- names


@pytest.mark.parametrize(
    "folder, expected",
    [
        (None, "data/train/00007.google--t5-v1_1-xxl.safetensors"),
        ("cache", "cache/00007.google--t5-v1_1-xxl.safetensors"),
    ],
)
def test_a_cache_is_named_after_shard_and_encoder(folder, expected):
    identity = IDENTITY | {"encoder": "google/t5-v1_1-xxl"}
    assert cache_path("data/train/00007.tar", identity, folder) == Path(expected)


# ---- mismatches


@pytest.mark.parametrize("name", list(IDENTITY))
def test_another_encoder_is_an_error_that_names_what_differs(cached, name):
    with pytest.raises(ValueError, match=f"with {name} .*, this run has other; rebuild it with: fastimagen ") as caught:
        reopen(cached, identity=IDENTITY | {name: "other"})
    assert "\n" not in str(caught.value) and str(cached) in str(caught.value)


@pytest.mark.parametrize(
    "keys, captions, message",
    [
        (KEYS[:5], CAPTIONS[:5], "it has 6, the shard has 5"),
        (["new", *KEYS[1:]], CAPTIONS, 'sample "new" of the shard was "00000"'),
        (KEYS, [*CAPTIONS[:5], "a ring"], "captions of the shard have changed"),
        (KEYS, [*CAPTIONS[1:], CAPTIONS[0]], "captions of the shard have changed"),
    ],
)
def test_changed_samples_are_an_error(cached, keys, captions, message):
    with pytest.raises(ValueError, match=f"{message}; rebuild it with: fastimagen embed --config CONFIG"):
        reopen(cached, keys=keys, captions_hash=captions_hash(keys, captions))


def test_missing_damaged_and_other_files_are_errors_that_say_how_to_rebuild(cached, tmp_path):
    content = cached.read_bytes()
    with safe_open(cached, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict
    cases = {
        "there is no embedding cache": lambda path: path.unlink(),
        r"is damaged": lambda path: path.write_bytes(content[:-1]),
        r"is damaged \(.*header": lambda path: path.write_bytes(b"not a safetensors file"),
        "is not an embedding cache of schema": lambda path: save_file({"tokens": torch.zeros(1)}, path),
        r"is damaged \(.*offsets": lambda path: save_file({"tokens": tensors["tokens"]}, path, metadata),
        "do not fit together": lambda path: save_file(tensors | {"rows": tensors["rows"] + 1}, path, metadata),
        "do not fit": lambda path: save_file(tensors | {"offsets": torch.ones(5)}, path, metadata),
        "bytes of its tables": lambda path: save_file(tensors | {"rows": tensors["rows"].flip(0)}, path, metadata),
    }
    for message, damage in cases.items():
        cached.write_bytes(content)
        damage(cached)
        with pytest.raises(ValueError, match=message) as caught:
            reopen(cached)
        assert "\n" not in str(caught.value) and "fastimagen embed" in str(caught.value)


# ---- several captions, changed bytes


def test_each_of_several_captions_of_a_sample_has_its_embeddings(tmp_path):
    path, counts = tmp_path / "c.safetensors", np.array([2, 1, 3], dtype=np.int32)
    write_cache(path, KEYS[:3], CAPTIONS, StubEncoder(), 2, counts)
    options = {"keys": KEYS[:3], "captions_hash": captions_hash(KEYS[:3], CAPTIONS)}
    cache = reopen(path, counts=counts, **options)
    captions = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert len(cache) == 3
    assert [len(cache.caption(*where)) for where in captions] == [min(8, len(text.split()) + 1) for text in CAPTIONS]
    assert torch.equal(cache[2], cache.caption(2, 2))
    with pytest.raises(IndexError):
        cache[3]
    for other in (None, np.array([1, 2, 3])):
        with pytest.raises(ValueError, match="do not fit together"):
            reopen(path, counts=other, **options)


def test_changed_bytes_are_never_returned(cached):
    content = bytearray(cached.read_bytes())
    start = content.index(StubEncoder().encode(["star"], 1).embeds[0, 0].bfloat16().view(torch.uint8).numpy().tobytes())
    content[start] ^= 1
    cached.write_bytes(content)
    cache = reopen(cached)
    assert len(cache[0]) == 4
    with pytest.raises(ValueError, match="bytes have changed; delete it and rerun fastimagen embed"):
        cache[1]  # "blue" is the first word of four letters
    with pytest.raises(ValueError, match=str(cached)):
        cache.check()


def test_captions_are_sorted_by_tokens_over_the_whole_shard(tmp_path):
    """By characters, long words and many words would share a batch."""
    captions = [" ".join(["w" * (1 + 9 * (i % 2))] * (1 + i % 7)) + f" {i}" for i in range(70)]
    batches = []

    class Recording(StubEncoder):
        def encode(self, captions, batch_size):
            batches.append([len(caption.split()) for caption in captions])
            return super().encode(captions, batch_size)

    write_cache(tmp_path / "c.safetensors", [str(i) for i in range(70)], captions, Recording(), 10)
    assert len(batches) == 7 and all(max(batch) - min(batch) <= 1 for batch in batches)


def test_a_rank_takes_the_shards_that_another_has_left(tmp_path):
    shards = shards_in(tmp_path)
    first = embed_shards(shards[:1], StubEncoder(), cache_dir=None, batch_size=3)
    assert first.written == 1
    with open(tmp_path / ".00001.org--stub.safetensors.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another process encodes this one
        report = embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=3, rank=0, world_size=2)
    assert (report.written, report.kept) == (3, 1) and not (tmp_path / "00001.org--stub.safetensors").exists()
    assert not list(tmp_path.glob(".0000[0234]*.lock"))


# ---- many shards


def test_captions_with_unknown_tokens_are_counted_once_each_also_in_kept_shards(tmp_path):
    shards, encoder = shards_in(tmp_path), StubEncoder()
    shards[0].texts[:2] = ["? house", "? house"]
    shards[2].texts[0] = "?"
    reports = [embed_shards(shards, encoder, cache_dir=None, batch_size=3) for _ in range(2)]
    assert [(report.kept, report.unknown) for report in reports] == [(0, 2), (5, 2)]


def test_caches_that_did_not_count_unknown_tokens_say_so(tmp_path):
    shards = shards_in(tmp_path)
    shards[0].texts[:2] = ["? house", "? home"]
    embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=3)
    for name in ("00001", "00003"):  # as an earlier version wrote them
        path = tmp_path / f"{name}.org--stub.safetensors"
        metadata = {key: value for key, value in EmbeddingCache(path).metadata.items() if key != "unknown"}
        save_file(load_file(path), path, metadata)
    report = embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=3)
    assert (report.kept, report.unknown, report.uncounted) == (5, 2, 2)


def test_embedding_resumes_and_replaces_only_what_changed(tmp_path, caplog):
    shards, encoder = shards_in(tmp_path), StubEncoder()
    seen = []
    report = embed_shards(shards, encoder, cache_dir=None, batch_size=3, progress=lambda *step: seen.append(step))
    tokens = sum(len(text.split()) + 1 for text in {f"{c} 0" for c in CAPTIONS} if len(text.split()) < 8) + 8
    assert report == EmbedReport(written=5, captions=30, truncated=5, tokens=5 * tokens)
    assert seen == [(i, 5) for i in range(1, 6)]
    assert len(list(tmp_path.glob("*.org--stub.safetensors"))) == 5 == len(list(tmp_path.iterdir()))

    before = len(encoder.encoded)
    shards[1].texts[2] = "something else"
    (tmp_path / "00003.org--stub.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        report = embed_shards(shards, encoder, cache_dir=None, batch_size=3)
    assert (report.written, report.kept, report.truncated, report.captions) == (2, 3, 5, 30)
    assert len(encoder.encoded) == before + 2 * 4
    assert "captions of the shard have changed" in caplog.text and "damaged" in caplog.text
    assert embed_shards(shards, encoder, cache_dir=None, batch_size=3).kept == 5
    assert len(encoder.encoded) == before + 2 * 4

    longer = StubEncoder(names=IDENTITY | {"max_length": "9"})
    assert embed_shards(shards, longer, cache_dir=None, batch_size=3).written == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_ranks_share_the_shards(tmp_path):
    shards = shards_in(tmp_path)
    options = {"cache_dir": tmp_path / "cache", "batch_size": 4}
    with ThreadPoolExecutor(3) as pool:
        reports = pool.map(
            lambda rank: embed_shards(shards, StubEncoder(), rank=rank, world_size=3, **options), range(3)
        )
    assert sum(report.written for report in reports) == 5
    assert embed_shards(shards, StubEncoder(), **options).kept == 5


def test_empty_captions_are_counted_and_logged(tmp_path, caplog):
    report = embed_shards(
        [StubShard(tmp_path / "a.tar", ["0", "1", "2"], ["", "a", " "])], StubEncoder(), cache_dir=None, batch_size=4
    )
    assert report.empty == 2 and "2 of 3 captions are empty" in caplog.text


def test_shards_that_would_share_a_cache_file_are_refused(tmp_path):
    shards = [StubShard(tmp_path / folder / "00000.tar") for folder in "ab"]
    assert embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=4).written == 2
    with pytest.raises(ValueError, match="would share the embedding cache"):
        embed_shards(shards, StubEncoder(), cache_dir=tmp_path, batch_size=4)


def test_a_shard_for_training_and_validation_is_refused(tmp_path):
    shards = [StubShard(tmp_path / "00000.tar"), StubShard(tmp_path / "00000.tar")]
    with pytest.raises(ValueError, match=r"00000\.tar is listed twice"):
        embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=4)


def test_a_failure_keeps_finished_caches_and_leaves_no_partial_file(tmp_path):
    shards = shards_in(tmp_path)
    with pytest.raises(RuntimeError, match="the GPU failed"):
        embed_shards(shards, StubEncoder(fails_at="a star 2"), cache_dir=None, batch_size=2)
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["00000.", "00001."]
    report = embed_shards(shards, StubEncoder(), cache_dir=None, batch_size=2)
    assert (report.kept, report.written) == (2, 3)


def test_a_process_killed_while_writing_leaves_the_old_cache(cached):
    """The process ends without clean-up after writing the temporary file and before renaming it."""
    before = cached.read_bytes()
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fastimagen.files, test_embedding_cache as tests
fastimagen.files.os.replace = lambda *names: os._exit(9)
tests.write_cache({str(cached)!r}, tests.KEYS, ["other"] * 6, tests.StubEncoder(), 2)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 9, result.stderr
    assert cached.read_bytes() == before
    assert len(reopen(cached)) == len(KEYS)
