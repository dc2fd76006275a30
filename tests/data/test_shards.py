"""Shards: what counts as a sample, broken tars, where shards are looked for, the order of samples."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import threading

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastimagen.data.order import Order
from fastimagen.data.shard import Reading
from fastimagen.data.shard_index import index_shard
from fastimagen.data.shards import list_shards, open_shards
from fastimagen.data.where import parse_conditions
from fastimagen.seeds import random_bits


def make_tar(path, files: dict[str, bytes], format=tarfile.USTAR_FORMAT):
    """A tar of these files, in their order."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample_files(count: int, prefix: str = "", start: int = 0) -> dict[str, bytes]:
    files = {}
    for i in range(start, start + count):
        files[f"{prefix}{i:05d}.jpg"] = b"image %d " % i * (i + 1)
        files[f"{prefix}{i:05d}.txt"] = f"caption {i} ä".encode()
    return files


# ---- the index


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "a.b/c/", "d" * 90 + "/" + "e" * 60 + "/", "ü/"])
def test_index_reads_what_webdataset_reads(tmp_path, format, prefix):
    files = sample_files(7, prefix) | {f"{prefix}00003.json": b'{"url": "u"}'}
    path = make_tar(tmp_path / "a.tar", files, format)
    shard = index_shard(path)
    reference = {}  # webdataset would take the json at the end for a sample of its own
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        reference.setdefault(sample["__key__"], {}).update(sample)
    assert shard.keys == list(reference) and len(shard) == 7
    assert [shard.key(i) for i in range(7)] == shard.keys
    for i, key in enumerate(shard.keys):
        assert shard.image(i) == reference[key]["jpg"]
        assert shard.caption(i) == shard.captions()[i] == reference[key]["txt"].decode()
    assert shard.metadata(3) == {"url": "u"} and shard.metadata(0) == {}
    assert not shard.excluded


def test_image_extensions_in_upper_and_lower_case_are_read(tmp_path):
    files = {}
    for i, extension in enumerate(["jpg", "jpeg", "png", "webp", "JPG", "PnG"]):
        files |= {f"{i}.{extension}": bytes([i]), f"{i}.txt": b"text"}
    shard = index_shard(make_tar(tmp_path / "a.tar", files))
    assert shard.keys == list("012345")
    assert [shard.image(i) for i in range(6)] == [bytes([i]) for i in range(6)]


def test_keys_that_are_not_samples_are_counted_by_reason(tmp_path):
    files = sample_files(3) | {
        "lonely.jpg": b"x",
        "orphan.txt": b"x",
        "note.json": b"{}",
        "blank.png": b"x",
        "blank.txt": b" \n\t",
        "void.png": b"x",
        "void.txt": b"",
        "latin.png": b"x",
        "latin.txt": "é".encode("latin-1"),
        "00001.png": b"second",
        "00002.seg.png": b"a mask beside an image is fine",
        "__notes__": b"",
        "README": b"",
    }
    shard = index_shard(make_tar(tmp_path / "a.tar", files))
    assert len(shard) == 3 and shard.image(1).startswith(b"image 1")
    assert shard.excluded == {
        "no caption": 1,
        "no image": 2,
        "empty caption": 2,
        "caption not in UTF-8": 1,
        "duplicate": 1,
    }


def test_keys_with_dots_are_merged_by_webdataset_and_counted(tmp_path):
    files = {}
    for i in range(5):
        files |= {f"photo.b{i}.jpg": b"x", f"photo.b{i}.txt": b"text"}
    shard = index_shard(make_tar(tmp_path / "a.tar", files | sample_files(2)))
    assert len(shard) == 2 and shard.excluded == {"dot in the key": 5}


def test_files_of_a_sample_need_not_be_adjacent(tmp_path):
    files = sample_files(3)
    names = sorted(files, key=lambda name: name[-3:])  # all images first
    shard = index_shard(make_tar(tmp_path / "a.tar", {name: files[name] for name in names}))
    assert len(shard) == 3
    assert shard.image(2).startswith(b"image 2") and shard.caption(2).startswith("caption 2")


def test_links_and_folders_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        folder, link = tarfile.TarInfo("d"), tarfile.TarInfo("d/" + "l" * 120 + ".jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "t" * 120
        tar.addfile(folder)
        tar.addfile(link)
        for name, content in sample_files(2, "d/").items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert index_shard(tmp_path / "a.tar").keys == ["d/00000", "d/00001"]


def broken_tar(tmp_path, what: str):
    path = tmp_path / "bad.tar"
    whole = make_tar(tmp_path / "whole.tar", sample_files(20)).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(
        {
            "0 bytes": b"",
            "no files": bytes(10240),
            "cut in a header": whole[: 5 * 512 + 100],
            "cut in a file": whole[: whole.index(b"image 9") + 5],
            "cut between files": whole[:end],
            "html": b"<html>" * 1000,
            "gzip": b"\x1f\x8b" + bytes(2000),
            "flipped": whole[:2048] + b"\xff" + whole[2049:],
            "two tars": whole + whole,
        }[what]
    )
    return path


@pytest.mark.parametrize(
    "what, message",
    [
        ("0 bytes", "is empty: 0 bytes"),
        ("no files", "is empty: a tar without files"),
        ("cut in a header", "is truncated"),
        ("cut in a file", "is truncated"),
        ("cut between files", "is truncated: .* without a tar's end"),
        ("html", "is not a tar"),
        ("gzip", "is not a tar: it is compressed"),
        ("flipped", "is damaged at byte 2048"),
        ("two tars", "several tars in one file"),
    ],
)
def test_broken_tars_are_one_line_errors_that_name_the_file(tmp_path, what, message):
    path = broken_tar(tmp_path, what)
    with pytest.raises(ValueError, match=message) as error:
        index_shard(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_tar_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"cannot open shard .*gone.tar: No such file"):
        index_shard(tmp_path / "gone.tar")


def test_threads_read_more_shards_than_stay_open(tmp_path):
    shards = []
    for i in range(150):  # more than stay open
        shards.append(index_shard(make_tar(tmp_path / f"{i:03d}.tar", sample_files(2, start=2 * i))))
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 150, size=600):
            if not shards[i].image(1).startswith(b"image %d " % (2 * i + 1)):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_index_is_stored_and_rebuilt_when_the_tar_changes(tmp_path):
    path = make_tar(tmp_path / "a.tar", sample_files(3) | {"lonely.jpg": b"x"})
    first = open_shards(path)[0]
    image, captions = first.image(2), first.captions()
    stat = os.stat(path)
    headers_destroyed = bytearray(path.read_bytes())
    headers_destroyed[148:156] = bytes(8)  # the checksum: indexing this tar would fail
    path.write_bytes(headers_destroyed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = open_shards(path)[0]
    assert again.keys == first.keys and again.excluded == first.excluded == {"no caption": 1}
    assert again.image(2) == image and again.captions() == captions
    files = {name.replace("0", "9"): content for name, content in sample_files(3).items()}
    make_tar(path, files | {"l.jpg": b"x"})  # as large as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_shards(path)[0].keys == ["99999", "99991", "99992"]
    (tmp_path / "a.tar.index").write_bytes(b"rubbish")
    assert open_shards(path)[0].keys == ["99999", "99991", "99992"]


def test_a_new_tar_under_an_old_name_is_never_read_with_the_old_index(tmp_path):
    path = make_tar(tmp_path / "a.tar", sample_files(3))
    old = index_shard(path)
    assert old.caption(0) == "caption 0 ä"
    os.replace(make_tar(tmp_path / "b.tar", {"x.txt": b"other", "x.jpg": b"x"}), path)
    assert index_shard(path).caption(0) == "other"
    assert old.caption(0) == "caption 0 ä"  # still open
    for i in range(200):
        index_shard(make_tar(tmp_path / "c.tar", sample_files(1, start=i))).image(0)
    with pytest.raises(ValueError, match="has changed since"):
        old.caption(0)


def test_a_tar_truncated_after_indexing_is_an_error_not_an_unreadable_image(tmp_path):
    path = make_tar(tmp_path / "a.tar", sample_files(3))
    shard = index_shard(path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match="has changed since"):
        shard.image(2)


# ---- finding shards


def test_shards_are_found_by_folder_pattern_range_list_and_url(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for i in (10, 2, 0):
            make_tar(tmp_path / folder / f"{i:03d}.tar", sample_files(1))
    train = [str(tmp_path / "train" / f"{name}.tar") for name in ("000", "002", "010")]
    val = [path.replace("train", "val") for path in train]
    assert list_shards(tmp_path / "train") == train
    assert list_shards(f"{tmp_path}/train/0?0.tar") == [train[0], train[2]]
    assert list_shards(f"{tmp_path}/train/{{000,010,002}}.tar") == [train[0], train[2], train[1]]
    assert list_shards(f"{tmp_path}/{{val,train}}/*.tar") == val + train
    assert list_shards([train[2], tmp_path / "val"]) == [train[2], *val]
    urls = [f"http://host/{i:03d}.tar?a=*" for i in range(8, 12)]
    assert list_shards("http://host/{008..011}.tar?a=*") == urls
    assert list_shards("pipe:cat {a,b}.tar | cat") == ["pipe:cat a.tar | cat", "pipe:cat b.tar | cat"]


def test_a_source_without_shards_is_an_error_that_names_it(tmp_path):
    make_tar(tmp_path / "000.tar", sample_files(1))
    (tmp_path / "none").mkdir()
    for source, missing in (
        ("none", "none"),
        ("*.tarr", "tarr"),
        ("{001..002}.tar", "001.tar"),
        ("gone.tar", "gone.tar"),
    ):
        with pytest.raises(ValueError, match=f"no .*{tmp_path}/.*{missing}"):
            list_shards(f"{tmp_path}/{source}")
    with pytest.raises(ValueError, match="listed twice"):
        list_shards([f"{tmp_path}/000.tar", str(tmp_path)])
    with pytest.raises(ValueError, match="empty"):
        list_shards([])
    with pytest.raises(ValueError, match="brace"):
        list_shards("http://host/{000..001.tar")


def test_opening_logs_how_many_samples_are_excluded(tmp_path, caplog):
    for i in range(3):
        make_tar(tmp_path / f"{i}.tar", sample_files(2) | {"lonely.jpg": b"x"})
    with caplog.at_level(logging.INFO):
        shards = open_shards(tmp_path, rank=2, world_size=3)
    assert [os.path.basename(shard.path) for shard in shards] == ["0.tar", "1.tar", "2.tar"]
    assert "6 samples in 3 shards; excluded: 3 no caption" in caplog.text
    make_tar(tmp_path / "only.tar", {"a.jpg": b"x", "b.jpg": b"x"})
    with pytest.raises(ValueError, match=r"no samples in 1 shard .*2 no caption"):
        open_shards(tmp_path / "only.tar")


def test_shards_in_a_read_only_folder_are_opened_without_storing_the_index(tmp_path, monkeypatch, caplog):
    make_tar(tmp_path / "0.tar", sample_files(2))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastimagen.data.shard_index.write_safetensors", refuse)
    monkeypatch.setattr("fastimagen.data.manifest.write_safetensors", refuse)
    assert len(open_shards(tmp_path)[0]) == 2
    assert "Permission denied" in caplog.text and not (tmp_path / "0.tar.index").exists()


# ---- shards that cannot be read, captions in the json, conditions


def test_lost_shards_are_counted_by_name_under_the_ceiling(tmp_path, caplog):
    for i in range(8):
        make_tar(tmp_path / f"{i}.tar", sample_files(10, f"{i}/"))
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:3000])
    (tmp_path / "5.tar").write_bytes(b"")
    source = f"{tmp_path}/{{0..8}}.tar"  # 8.tar is missing
    shards = open_shards(source, max_lost=0.4)
    assert [len(shard) for shard in shards] == [10, 10, 10, 0, 10, 0, 10, 10, 0]
    assert [sum(shard.excluded.values()) for shard in shards] == [0, 0, 0, 10, 0, 10, 0, 0, 10]
    for part in ("3.tar is truncated", "5.tar is empty", "8.tar: No such file"):
        assert "lost shard, counted with 10 samples: " in caplog.text and part in caplog.text
    with pytest.raises(ValueError, match=r"3 of 9 shards cannot be read, .*max_bad_share = 0.01 allows: .*3.tar"):
        open_shards(source, max_lost=0.01)
    (tmp_path / "3.tar").unlink()
    with pytest.raises(ValueError, match=r"No such file|is not a tar"):
        open_shards(f"{tmp_path}/{{3..3}}.tar", max_lost=1.0)


def test_captions_come_from_a_key_of_the_json(tmp_path):
    def sample(content, caption=None):
        return {"jpg": b"x", "json": content, **({"txt": caption} if caption else {})}

    samples = {
        "a": sample(b'{"caption": "one"}', b"not this"),
        "b": sample(b'{"caption": ["two", " ", 3, "three"]}'),
        "c": sample(b'{"other": 1}', b"x"),
        "d": sample(b"{", b"x"),
        "e": {"jpg": b"x", "txt": b"x"},
    }
    files = {f"{key}.{name}": data for key, sample in samples.items() for name, data in sample.items()}
    path = make_tar(tmp_path / "0.tar", files)
    for _ in range(2):  # from the tar, and from the index
        (shard,) = open_shards(path, reading=Reading(caption_key="caption"))
        assert [shard.captions_of(i) for i in range(len(shard))] == [["one"], ["two", "three"]]
        assert shard.captions() == ["one", "two", "three"] and shard.number_of_captions(1) == 2
        assert shard.excluded == {'no caption under "caption"': 2, "damaged json": 1}
    assert open_shards(path)[0].captions() == ["not this", "x", "x", "x"]


def test_samples_without_captions_are_read_if_none_is_needed(tmp_path):
    path = make_tar(
        tmp_path / "0.tar", {"a.jpg": b"x", "b.jpg": b"x", "b.txt": "\u00e9".encode("latin-1"), "c.txt": b"x"}
    )
    (shard,) = open_shards(path, reading=Reading(captions=False))
    assert shard.keys == ["a", "b"] and shard.captions() == ["", ""] and shard.excluded == {"no image": 1}


def test_conditions_filter_samples_and_count_why(tmp_path):
    jsons = [
        {"width": 300, "height": 100, "nsfw": "UNLIKELY", "score": "6.5"},
        {"width": 300, "height": 290, "nsfw": "LIKELY", "score": 7},
        {"width": 300, "height": 290, "nsfw": "UNLIKELY"},
        {"width": 300, "height": 290, "nsfw": "UNLIKELY", "score": "many"},
        {"width": 300, "height": 280, "nsfw": "UNLIKELY", "score": "6.5"},
    ]
    files = {}
    for i, metadata in enumerate(jsons):
        files |= {f"{i}.jpg": b"x", f"{i}.txt": b"x", f"{i}.json": json.dumps(metadata).encode()}
    path = make_tar(tmp_path / "0.tar", files)
    reading = Reading(where=("side >= 200", "aspect < 1.5", "nsfw == UNLIKELY", "score > 5"))
    for _ in range(2):
        (shard,) = open_shards(path, reading=reading)
        assert len(shard) == 5 and shard.passes.tolist() == [False] * 4 + [True]
        assert shard.filtered == {
            "side >= 200": 1,
            "nsfw == UNLIKELY": 1,
            "score > 5 (no score)": 1,
            "score > 5 (score is not a number)": 1,
        }
    assert len(list(tmp_path.glob("*.index"))) == 1
    for text in ("width", "width > ", "width => 3", "name > x"):
        with pytest.raises(ValueError, match=r"fastimagen.data.where: "):
            parse_conditions([text])


# ---- the order


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**64), block=st.integers(1, 5), epoch=st.integers(0, 1000))
def test_every_epoch_contains_every_sample_once(sizes, seed, block, epoch):
    order = Order(sizes, seed, block)
    assert order.total == sum(sizes)
    seen = [order[epoch * order.total + offset] for offset in range(order.total)]
    assert sorted(seen) == [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


def test_the_order_depends_on_seed_and_epoch_only():
    sizes = [50, 0, 80, 30, 1, 60, 70]
    order = Order(sizes, seed=3)
    positions = np.random.default_rng(0).integers(0, 5 * order.total, size=500).tolist()
    sequential = {position: order[position] for position in range(5 * order.total)}
    again = Order(sizes, seed=3)
    assert all(again[position] == sequential[position] for position in positions)
    first, second = ([sequential[e * order.total + i] for i in range(order.total)] for e in (0, 1))
    other = Order(sizes, seed=4)
    assert first != second and first != [other[i] for i in range(order.total)]


def test_the_order_mixes_the_shards_of_a_block():
    order = Order([100] * 40, seed=0)
    blocks = [{order[position][0] for position in range(start, start + 400)} for start in range(0, 4000, 400)]
    assert all(len(block) == 4 for block in blocks)
    assert len({order[position][0] for position in range(40)}) == 4
    indices = [order[position][1] for position in range(4000)]
    assert abs(np.corrcoef(indices, range(4000))[0, 1]) < 0.1


def test_the_order_is_the_same_in_every_version():
    """A run resumes with the order it started with: these numbers must never change."""
    order = Order([5, 3, 4, 6, 2], seed=1234)
    assert [order[position] for position in (0, 1, 2, 19, 20, 21, 1_000_000)] == [
        (3, 0),
        (0, 3),
        (1, 2),
        (2, 2),
        (2, 2),
        (2, 1),
        (0, 0),
    ]
    assert random_bits(7, 2, (5, 6), 2).tolist() == [16765835545809318431, 11618318071710758287]


def test_an_order_of_no_samples_is_refused():
    with pytest.raises(ValueError, match="got 0 samples in"):
        Order([0, 0], seed=0)
    with pytest.raises(IndexError):
        Order([1], seed=0)[-1]
