"""Remote shards: the same stream as local ones, bounded patience with bad servers, a cache of limited size."""

from __future__ import annotations

import fcntl
import itertools
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from fastimagen.config import FastimagenConfig
from fastimagen.data.embedding_cache import cache_path, write_cache
from fastimagen.data.indexing import index_all
from fastimagen.data.listed import MAX_REMOVED, Download
from fastimagen.data.remote.ahead import Ahead
from fastimagen.data.remote.cache import RemoteCache, sibling
from fastimagen.data.remote.shard import RemoteShard
from fastimagen.data.shards import open_shards
from fastimagen.data.source import open_data
from fastimagen.data_config import RemoteConfig
from fastimagen.text.embeddings import TextEmbeddings
from tests.data.test_loader import image
from tests.data.test_shards import make_tar, sample_files
from tests.drills.soak import open_files
from tests.faulty_server import Server

PATIENCE = RemoteConfig(timeout=0.3, tries=3, pause=0.01, longest_pause=0.05)
LITTLE = PATIENCE.model_copy(update={"tries": 2})


@pytest.fixture
def server(tmp_path):
    (tmp_path / "there").mkdir()
    server = Server(tmp_path / "there")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.ending.set()
    server.shutdown()
    server.server_close()


def cache_in(tmp_path: Path, limit: int | None = None, patience: RemoteConfig = PATIENCE) -> RemoteCache:
    return RemoteCache(tmp_path / "cache", limit, patience)


def left_over(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".part", ".tmp")]


# ---- where shards come from


@pytest.mark.parametrize("scheme", ["file:{}", "file://{}", "pipe:cat {}"])
def test_remote_shards_are_downloaded_once(tmp_path, scheme):
    path = make_tar(tmp_path / "00007.tar", sample_files(4))
    (shard,) = open_shards(scheme.format(path), cache=cache_in(tmp_path))
    assert Path(shard.path).parent.parent == tmp_path / "cache" and shard.path.endswith("/00007.tar")
    (local,) = open_shards(path)
    assert shard.captions() == local.captions()
    expected = local.image(3)
    path.unlink()
    assert open_shards([scheme.format(path)], cache=cache_in(tmp_path))[0].image(3) == expected
    assert not left_over(tmp_path)


def test_the_same_name_in_other_folders_is_another_shard_and_a_new_signature_is_not(tmp_path):
    cache = cache_in(tmp_path)
    places = [
        cache.place(url)
        for url in ("https://host/a/0.tar", "https://host/b/0.tar", "pipe:get s3://c/0.tar -", "s3://c/0.tar")
    ]
    assert len({*places}) == 4 and all(place.name == "0.tar" for place in places)
    assert cache.place("https://host/a/0.tar?sig=b%2Fx.tar&until=9") == places[0]
    assert cache.place("pipe:curl 'https://host/0.tar?s=1' | cat") == cache.place(
        "pipe:curl 'https://host/0.tar' | cat"
    )
    assert sibling("https://host/a/0.tar?sig=x.tar", "0.t5.safetensors") == "https://host/a/0.t5.safetensors?sig=x.tar"
    assert sibling("pipe:aws s3 cp s3://c/0.tar -", "1.x") == "pipe:aws s3 cp s3://c/1.x -"


def test_what_cannot_be_remote_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"http://host/0.tar is remote: set fastimagen.data.cache to a folder"):
        open_shards("http://host/0.tar?key=secret")
    with pytest.raises(ValueError, match=r"Protocol not known: nonsense"):
        open_shards("nonsense://x/0.tar", cache=cache_in(tmp_path))
    for url, package in (("s3://bucket/0.tar", "s3fs"), ("gs://bucket/0.tar", "gcsfs")):
        with pytest.raises(ImportError, match=rf"needs {package}: pip install {package}"):
            open_shards(url, cache=cache_in(tmp_path))
    with pytest.raises(ValueError, match=r"http://host/0.tar is listed twice, with different queries"):
        open_shards(["http://host/0.tar?a", "http://host/0.tar?b"], cache=cache_in(tmp_path))


# ---- bad servers


@pytest.mark.parametrize(
    "faults, message, requests",
    [
        (["404"], "HTTP 404 Not Found$", 1),
        (["403"], "HTTP 403 Forbidden$", 1),
        (["500", "500"], None, 3),
        (["500"] * 9, r"HTTP 500 Internal Server Error \(3 tries\)$", 3),
        (["429 wait 0"], None, 2),
        (["429 wait 77"], "HTTP 429 Too Many Requests, and the server asks to wait 77 s$", 1),
        (["stall"] * 9, r"no answer for 0.3 s \(2 tries\)$", 2),
        (["slow"] * 9, r"(slower than 10 kB/s|no answer for 0.3 s) \(2 tries\)$", 2),
        (["break", "break"], None, 3),
        (["break", "no ranges"], None, 2),
        (["break"] * 9, r"the connection broke off \(3 tries\)$", 3),
    ],
)
def test_a_bad_server_costs_bounded_time_and_is_named(tmp_path, server, faults, message, requests):
    make_tar(server.folder / "0.tar", sample_files(20))
    server.faults["/0.tar"] = list(faults)
    url, started = server.url("0.tar"), time.monotonic()
    cache = cache_in(tmp_path, patience=LITTLE if faults[0] in ("stall", "slow") else PATIENCE)
    if message is None:
        (shard,) = open_shards(f"{url}?sig=secret", cache=cache)
        assert shard.captions() == open_shards(server.folder / "0.tar")[0].captions()
    else:
        with pytest.raises(ValueError, match=rf"^cannot fetch {url}: {message}"):  # without the signature
            open_shards(f"{url}?sig=secret", cache=cache)
    assert time.monotonic() - started < 10 and len(server.asked("0.tar")) == requests
    if faults[0] == "break":  # continues with a range request
        assert server.asked("0.tar")[0] is None and server.asked("0.tar")[1].startswith("bytes=")
    assert not left_over(tmp_path)


@pytest.mark.parametrize(
    "command, message",
    [
        ("pipe:cat {}/gone.tar", r"exit 1: .*gone.tar: No such file or directory \(2 tries\)"),
        ("pipe:head -c 3000 {}/0.tar", "cannot use shard pipe:head .*: it is truncated"),
        ("pipe:sleep 9; cat {}/0.tar", r"no output for 0.3 s \(2 tries\)"),
        ("file:{}/gone.tar", "cannot fetch file:.*gone.tar: No such file"),
        ("file:{}/page.tar", "cannot use shard file:.*page.tar: it is not a tar"),
    ],
)
def test_what_is_no_shard_leaves_no_file(tmp_path, command, message):
    make_tar(tmp_path / "0.tar", sample_files(20))
    (tmp_path / "page.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(ValueError, match=message) as error:
        open_shards(command.format(tmp_path), cache=cache_in(tmp_path, patience=LITTLE))
    assert "\n" not in str(error.value)
    assert not left_over(tmp_path) and not [*(tmp_path / "cache").rglob("*.tar*")]


def test_an_object_store_that_fails_is_asked_again_and_named(tmp_path, monkeypatch):
    """fsspec's memory in place of a store; ranges of 1,000 bytes."""
    store = fsspec.filesystem("memory")
    make_tar(tmp_path / "0.tar", sample_files(20))
    store.pipe("/bucket/0.tar", (tmp_path / "0.tar").read_bytes())
    monkeypatch.setattr("fastimagen.data.remote.transfer.CHUNK", 1000)
    read, asked = MemoryFileSystem.cat_file, []

    def failing(self, path, start=None, end=None, **options):
        asked.append(start)
        if start == 2000 and asked.count(start) < failures:
            raise ConnectionError("reset by the store")
        return read(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    for failures, patience in ((3, PATIENCE), (9, LITTLE)):
        asked.clear()
        cache = RemoteCache(tmp_path / f"cache{failures}", None, patience)
        if failures == 3:
            (shard,) = open_shards("memory://bucket/0.tar", cache=cache)
            assert len(shard.captions()) == 20 and asked.count(0) == 1 and asked.count(2000) == 3
            continue
        with pytest.raises(ValueError, match=r"memory://bucket/0.tar: ConnectionError: reset by the store \(2 tries\)"):
            open_shards("memory://bucket/0.tar", cache=cache)
    with pytest.raises(ValueError, match=r"cannot fetch memory://bucket/1.tar: "):
        open_shards("memory://bucket/1.tar", cache=cache)


# ---- the cache


def test_the_least_recently_used_shards_make_room_and_a_kill_leaves_nothing(tmp_path):
    for number in range(5):
        make_tar(tmp_path / f"{number}.tar", sample_files(50))
    size = (tmp_path / "0.tar").stat().st_size
    cache = cache_in(tmp_path, limit=4 * size)
    places = [cache.place(f"file:{tmp_path}/{number}.tar") for number in range(5)]

    def get(number: int) -> None:
        cache.get(f"file:{tmp_path}/{number}.tar", places[number], lambda part: None, size=size)
        time.sleep(0.002)

    for number in (0, 1, 2, 0):
        get(number)
    places[1].with_name("1.tar.index").write_bytes(b"x" * size)  # makes four
    get(3)
    assert [place.exists() for place in places] == [True, False, True, True, False]
    assert not places[1].with_name("1.tar.index").exists()  # went with its tar
    for holder in (None, open):
        part = places[4].with_name(".4.tar.part")
        with open(part, "wb") as file:
            if holder:
                fcntl.flock(file, fcntl.LOCK_EX)
            cache_in(tmp_path)  # the next start
            if holder:
                with pytest.raises(BlockingIOError):
                    cache.get(f"file:{tmp_path}/4.tar", places[4], lambda part: None, wait=False)
            assert part.exists() == bool(holder)
    cache.limit = 1
    (tmp_path / "shards.manifest").write_bytes(b"x")  # not a shard, and not counted
    manifest = places[0].with_name("shards.manifest")
    cache.get(f"file:{tmp_path}/shards.manifest", manifest, lambda part: None)
    assert manifest.exists() and not any(place.exists() for place in places)
    with pytest.raises(ValueError, match=r"data.cache_gb is .*, but .* need 0.016: set it to more"):
        cache.check_limit(1_000_000)


def test_shards_that_the_cache_has_removed_do_not_stay_open(tmp_path):
    for number in range(30):
        make_tar(tmp_path / f"{number}.tar", sample_files(9))
    cache = cache_in(tmp_path, limit=17 * (tmp_path / "0.tar").stat().st_size)
    shards = open_shards([f"file:{tmp_path}/{number}.tar" for number in range(30)], cache=cache)
    deleted = []
    for shard in shards:
        assert shard.image(0).startswith(b"image 0")
        deleted.append(open_files(tmp_path / "cache")["deleted"])
    assert max(deleted) <= 2 * MAX_REMOVED and shards[0].image(1).startswith(b"image 1")  # tars and indices


# ---- the stream


class CountingEncoder:
    """Embeds a caption as its number, in one to three tokens."""

    dim, truncated, unknown = 4, 0, 0

    def __init__(self, identity: dict[str, str]) -> None:
        self.identity = lambda: identity

    def count_tokens(self, captions):
        return [1 + int(caption) % 3 for caption in captions]

    def encode(self, captions, batch_size):
        return TextEmbeddings.from_list([torch.full((1 + int(text) % 3, 4), float(text)) for text in captions])


@pytest.fixture
def data(server, monkeypatch):
    """Eight local shards with embeddings; returns the configuration for them."""
    identity = {"encoder": "counting"}
    monkeypatch.setattr("fastimagen.data.source.identity_of", lambda config: identity)
    config = FastimagenConfig.model_validate(
        {
            "data": {"shards": str(server.folder), "validation": {"share": 0.2}, "max_bad_share": 0.2},
        }
    )
    for number in range(8):
        samples = [str(100 * number + index) for index in range(9 + number)]
        files = {
            f"{key}.{name}": data for key in samples for name, data in (("png", image(int(key))), ("txt", key.encode()))
        }
        path = make_tar(server.folder / f"{number}.tar", files)
        write_cache(cache_path(path, identity), samples, samples, CountingEncoder(identity), 16)
    return config


def remote_config(config: FastimagenConfig, server: Server, tmp_path: Path, **changes) -> FastimagenConfig:
    data = {"shards": [f"{server.url(f'{number}.tar')}?sig=1" for number in range(8)], "cache": str(tmp_path / "cache")}
    tree = config.model_dump(mode="json")
    tree["data"] |= data | {"remote": {"timeout": 5, "pause": 0.01}, "cache_gb": None} | changes
    return FastimagenConfig.model_validate(tree)


def stream(config: FastimagenConfig, count: int, start: int = 0, **options):
    """Keys, images and embeddings of batches of 6; and the loader."""
    train, _ = open_data(config, with_text=True)
    batch = {"global_batch": 6, "micro_batch": 6, "rank": 0, "world_size": 1, "seed": 3, "crop_seed": 0}
    loader = train.loader(config, size=8, crop=None, **batch | options)
    batches = list(itertools.islice(loader.batches(start), count))
    return [
        (batch.keys, batch.images.tolist(), [t.tolist() for t in batch.text.unpadded()]) for batch in batches
    ], loader


def test_the_stream_equals_the_local_one_with_a_small_cache_and_a_failing_server(server, data, tmp_path):
    local, _ = stream(data, 40)  # more than two epochs
    (server.folder / "shards.manifest").unlink()
    for number in range(8):
        server.faults[f"/{number}.tar"] = ["500", "break"][: number % 3]
    limit = 16 * (server.folder / "7.tar").stat().st_size / 1e9
    config = remote_config(data, server, tmp_path, cache_gb=limit)
    remote, loader = stream(config, 40)
    assert remote == local and loader.counters["lost"] == 0
    assert stream(config, 3, start=12 * 6)[0] == local[12:15]


def test_a_manifest_and_embeddings_beside_the_remote_shards_are_taken_from_there(server, data, tmp_path):
    local, _ = stream(data, 8)
    config = remote_config(data, server, tmp_path)
    train, _ = open_data(config, with_text=True)
    assert len(train) and not any(path.endswith(".tar") for path, _ in server.requests)  # nothing was downloaded
    assert stream(config, 8)[0] == local
    assert any(path.endswith(".safetensors") for path, _ in server.requests)


def test_the_shards_that_come_next_are_downloaded_before_they_are_read(server, data, tmp_path):
    config = remote_config(data, server, tmp_path)
    train, _ = open_data(config, with_text=True)
    batch = {"global_batch": 6, "micro_batch": 6, "rank": 0, "world_size": 1, "seed": 3, "crop_seed": 0}
    batches = train.loader(config, size=8, crop=None, **batch).batches(0)
    assert {int(key) // 100 for key in next(batches).keys} <= set(train.order(3).ahead(0, 4))  # of one block
    until = time.monotonic() + 20
    while len({path for path, _ in server.requests if path.endswith((".tar", "counting.safetensors"))}) < 16:
        assert time.monotonic() < until
        time.sleep(0.01)
    batches.close()


def test_embeddings_that_another_process_removes_are_downloaded_again(server, data, tmp_path, monkeypatch):
    local, _ = stream(data, 8)
    fetch, removed = RemoteShard.fetch_beside, Counter()

    def racing(self, suffix, *arguments, **options):
        path = fetch(self, suffix, *arguments, **options)
        removed[path] += 1
        if removed[path] <= 3:  # in advance, and twice when it is opened
            path.unlink()
        return path

    monkeypatch.setattr(RemoteShard, "fetch_beside", racing)
    assert stream(remote_config(data, server, tmp_path), 8)[0] == local
    assert max(removed.values()) > 3


def test_a_loader_waits_for_the_downloads_that_have_begun():
    begun, done = threading.Event(), threading.Event()

    def slow(wait: bool) -> None:
        begun.set()
        time.sleep(0.2)
        done.set()

    class Item:
        download = Download(slow)

    class Always:
        def ahead(self, position, count):
            return [0]

    ahead = Ahead([Item()], None, Always())
    ahead.reach(0)
    assert begun.wait(5)
    ahead.close()
    assert done.is_set() and not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_a_download_with_another_checksum_than_the_manifest_says_is_lost(server, data, tmp_path, caplog):
    config = remote_config(data, server, tmp_path)
    index_all(config, say=lambda line: None)
    for tar in (tmp_path / "cache").rglob("*.tar"):
        tar.unlink()
    content = bytearray((server.folder / "3.tar").read_bytes())
    content[600] ^= 1  # in an image
    (server.folder / "3.tar").write_bytes(content)
    _, loader = stream(config, 16)
    assert loader.counters["lost"] > 0 and "3.tar has another checksum than its manifest says" in caplog.text


def test_shards_that_are_lost_while_training_are_counted_under_the_ceiling(server, data, tmp_path):
    local, _ = stream(data, 16)
    (server.folder / "2.tar").unlink()
    config = remote_config(data, server, tmp_path)
    remote, loader = stream(config, 16)
    lost = loader.counters["lost"]
    assert lost > 0 and loader.counters["read"] == 96 + lost and loader.counters["bad"] == 0
    for ours, theirs in zip(remote, local):
        assert all(a == b or b.startswith("2") for a, b in zip(ours[0], theirs[0]))
    config = remote_config(data, server, tmp_path, max_bad_share=0.01)
    with pytest.raises(ValueError, match=r"samples are in shards that cannot be downloaded.*2.tar: HTTP 404"):
        stream(config, 16)


def test_any_number_of_ranks_continues_anywhere_with_damaged_missing_and_failing_shards(server, data, tmp_path):
    """A mixture of a local and a remote data set; one shard of each is lost."""
    (server.folder / "2.tar").write_bytes((server.folder / "2.tar").read_bytes()[:3000])
    (server.folder / "7.tar").unlink()
    ranges = [f"{server.folder}/{{0..3}}.tar", f"{server.folder}/{{4..7}}.tar"]

    def mixture(*shards: str) -> dict[str, object]:
        parts = [{"name": name, "shards": found, "weight": weight} for name, found, weight in zip("ab", shards, (2, 1))]
        return {"shards": parts, "max_bad_share": 0.6}

    local = FastimagenConfig.model_validate({"data": mixture(*ranges) | {"validation": {"share": 0.2}}})
    undisturbed, _ = stream(local, 12, global_batch=8, micro_batch=8)
    keys = [key for batch in undisturbed for key in batch[0]]
    config = remote_config(data, server, tmp_path, **mixture(ranges[0], server.url("{4..7}.tar")))
    for world_size, threads, start in ((1, 3, 5), (2, 1, 3), (4, 2, 8)):
        for number in (4, 5, 6):
            server.faults[f"/{number}.tar"] = ["500", "break"]
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # another node
        config = config.model_copy(update={"data": config.data.model_copy(update={"threads": threads})})
        batch = {"global_batch": 8, "micro_batch": 8 // world_size, "world_size": world_size}
        ranks = [stream(config, 4, start=8 * start, rank=rank, **batch)[0] for rank in range(world_size)]
        found = [key for turn in zip(*ranks) for part in turn for key in part[0]]
        assert found == keys[8 * start : 8 * (start + 4)]
