"""Manifests: what a start trusts and what it compares, and `fastimagen index`."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from fastimagen.cli import main
from fastimagen.config import FastimagenConfig
from fastimagen.data.indexing import check_index, index_all
from fastimagen.data.manifest import manifest_path, read_manifest
from fastimagen.data.shard import PLAIN, Reading, Shard
from fastimagen.data.shards import open_shards
from fastimagen.files import temporary_path
from fastimagen.text import checksums
from tests.data.test_shards import make_tar, sample_files


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"{number}.tar", sample_files(4, f"{number}-") | {f"{number}.jpg": b"x"})
    return tmp_path


def config_for(folder: Path) -> FastimagenConfig:
    return FastimagenConfig.model_validate({"data": {"shards": str(folder), "validation": None}})


def test_a_second_start_opens_no_shard(folder, monkeypatch):
    first = open_shards(folder)
    for index in folder.glob("*.index"):
        index.unlink()
    opened: list[str] = []
    monkeypatch.setattr("fastimagen.data.listing.load_or_build_index", lambda path, reading: opened.append(path))
    monkeypatch.setattr(Shard, "captions_of", None)
    again = open_shards(folder)
    assert not opened and [len(shard) for shard in again] == [4, 4, 4]
    assert [shard.ends for shard in again] == [shard.ends for shard in first] and again[1].ends[0] == "1-00000"
    assert sum(sum(shard.excluded.values()) for shard in again) == 3
    assert np.array_equal(again[2].hashes, first[2].hashes)


def test_the_first_process_finds_what_has_changed_and_the_others_trust_the_manifest(folder):
    open_shards(folder)
    make_tar(folder / "1.tar", sample_files(9, "new-"))
    trusting = open_shards(folder, trust=True)
    assert [len(shard) for shard in trusting] == [4, 4, 4]
    with pytest.raises(ValueError, match=r"1.tar has changed since it was indexed: rerun the command"):
        trusting[1].image(0)
    assert [len(shard) for shard in open_shards(folder)] == [4, 9, 4]
    assert [len(shard) for shard in open_shards(folder, trust=True)] == [4, 9, 4]
    (folder / "0.tar").unlink()
    make_tar(folder / "7.tar", sample_files(1, "7-"))
    assert [len(shard) for shard in open_shards(folder)] == [9, 4, 1]
    assert sorted(read_manifest(manifest_path(folder, PLAIN))) == ["1.tar", "2.tar", "7.tar"]


def test_a_damaged_manifest_is_rebuilt_and_another_reading_has_its_own(folder, caplog):
    open_shards(folder)
    manifest_path(folder, PLAIN).write_bytes(b"rubbish")
    assert sum(map(len, open_shards(folder))) == 12 and "rebuilding" in caplog.text
    shards = open_shards(folder, reading=Reading(captions=False))
    assert sum(map(len, shards)) == 15 and len([*folder.glob("*.manifest")]) == 2


def test_index_writes_checksums_and_check_finds_a_flipped_byte(folder, capsys, write_config):
    path = str(write_config({"fastimagen": {"data": {"shards": str(folder), "validation": None}}}))
    assert main(["index", "--config", path]) == 0
    out = capsys.readouterr().out
    assert f"{folder}/shards.manifest: 3 shards" in out and "12 samples in 3 shards; excluded: 3 no caption" in out
    assert all(len(row.entry.checksum) == 64 for row in read_manifest(manifest_path(folder, PLAIN)).values())
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert main(["index", "--config", path, "--check"]) == 0
    assert capsys.readouterr().out == "3 shards intact\n"
    before = os.stat(folder / "1.tar")
    content = bytearray((folder / "1.tar").read_bytes())
    content[600] ^= 1  # in an image
    (folder / "1.tar").write_bytes(content)
    for time_ns in (before.st_mtime_ns, before.st_mtime_ns + 1):
        os.utime(folder / "1.tar", ns=(before.st_atime_ns, time_ns))
        assert main(["index", "--config", path, "--check"]) == 1
        assert "1 of 3 shards not intact: shard" in (error := capsys.readouterr().err) and "1.tar is damaged" in error


def test_processes_share_the_shards_without_a_network(folder):
    config, said = config_for(folder), []
    index_all(config, say=said.append, rank=1, world_size=2)  # the other one has not begun: this one takes all
    assert not said and len([*folder.glob(".*.manifest")]) == 3
    index_all(config, say=said.append, rank=0, world_size=2)
    assert "3 shards" in said[0] and not [*folder.glob(".*")]
    check_index(config, say=said.append, rank=1, world_size=2)
    assert said[-1] == "1 shard intact"


def test_indices_and_manifests_honour_the_umask_and_foreign_folders_work(folder, monkeypatch, caplog):
    before = os.umask(0o027)
    try:
        open_shards(folder)
    finally:
        os.umask(before)
    for path in (*folder.glob("*.index"), *folder.glob("*.manifest")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for module in ("shard_index", "manifest"):
        monkeypatch.setattr(f"fastimagen.data.{module}.write_safetensors", refuse)
    with caplog.at_level(logging.WARNING):
        shards = open_shards(folder)
    assert shards[2].captions() and caplog.text.count("cannot be stored (Permission denied)") == 1


def test_the_weights_of_an_encoder_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    assert checksums.remembered_sha256([weights]) == checksums.sha256_of([weights])
    assert not (tmp_path / "cache").exists()  # not worth a note in the user's cache
    monkeypatch.setattr(checksums, "MIN_REMEMBERED_BYTES", len(b"weights"))
    first = checksums.remembered_sha256([weights])
    assert first == checksums.sha256_of([weights])
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "sha256_of", None)
        assert checksums.remembered_sha256([weights]) == first
    weights.write_bytes(b"other weights")
    assert checksums.remembered_sha256([weights]) != first


def test_a_start_removes_what_killed_processes_left(folder):
    own = temporary_path(folder / "0.tar.index")
    left = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1"))  # of an earlier process
    for path in (own, left):
        path.mkdir()
    open_shards(folder, trust=True)
    assert left.exists()
    open_shards(folder)
    assert own.exists() and not left.exists()
