"""Bad servers and downloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

from fastimagen.config import FastimagenConfig
from fastimagen.data import source
from fastimagen.data.indexing import index_all
from fastimagen.data.remote.cache import RemoteCache
from fastimagen.data.shards import open_shards
from tests.data.bad_input.making import (
    LEFT_OUT,
    LOST,
    PATIENCE,
    STOPS,
    Row,
    flipped,
    lines_logged,
    pair,
    problem,
    server_of,
)
from tests.data.test_shards import make_tar
from tests.drills.hostile_data import IDENTITY, embed, image
from tests.faulty_server import Server

# ---- remote shards


def remote_shards(folder: Path) -> list[Row]:
    """The first shard of each is good."""
    faults: dict[str, list[str]] = {
        "a server that answers 404": ["404"],
        "a server that answers 403": ["403"],
        "a server that always answers 500": ["500"] * 9,
        "a server that asks for a long wait": ["429 wait 3600"],
        "a server that does not answer": ["stall"] * 9,
        "a server that crawls": ["slow"] * 9,
        "a connection that always breaks off": ["break"] * 9,
    }
    rows = []
    with server_of(folder / "remote") as server:
        for number in range(len(faults) + 1):
            make_tar(server.folder / f"{number}.tar", pair("x", "png", image(number)))
        for number, (kind, found) in enumerate(faults.items(), start=1):
            server.faults[f"/{number}.tar"] = list(found)
            cache = RemoteCache(folder / f"cache{number}", None, PATIENCE)
            with lines_logged() as lines:
                open_shards(
                    [server.url("0.tar"), f"{server.url(f'{number}.tar')}?signature"], cache=cache, max_lost=0.5
                )
            rows.append(Row(kind, LEFT_OUT, next(line for line in lines if line.startswith("lost shard"))))
        rows += _while_training(folder, server)
        cache = RemoteCache(folder / "cache", 1000, PATIENCE)
        stops: dict[str, Callable[[], object]] = {
            "a cache that is too small": lambda: open_shards(server.url("0.tar"), cache=cache),
            "a remote shard without a cache": lambda: open_shards(server.url("0.tar")),
            "a protocol that nobody knows": lambda: open_shards("nonsense://x/0.tar", cache=cache),
        }
        rows += [Row(kind, STOPS, problem(action)) for kind, action in stops.items()]
        command = f"pipe:cat {folder}/nowhere.tar"
        line = problem(lambda: open_shards(command, cache=RemoteCache(folder / "cache", None, PATIENCE)))
    return [*rows, Row("a command that fails, for the only shard", STOPS, line)]


def _while_training(folder: Path, server: Server) -> list[Row]:
    """What a manifest finds: shards and embeddings that are not what it says."""
    kinds = {
        "a download with changed bytes": "0.tar",
        "a download of another size": "1.tar",
        "damaged embeddings of a remote shard": "2.counting.safetensors",
        "missing embeddings of a remote shard": "3.counting.safetensors",
        "a shard that is gone since it was indexed": "4.tar",
    }
    place = server.folder / "indexed"
    place.mkdir()
    for number in range(8):
        embed(make_tar(place / f"{number}.tar", pair(f"{number}", "png", image(number))))
    local = FastimagenConfig.model_validate({"data": {"shards": str(place), "validation": None}})
    index_all(local, say=lambda line: None)
    for number, name in enumerate(kinds.values()):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[:-512] if number == 1 else flipped(content, len(content) // 2))
        if number > 2:
            (place / name).unlink()
    data = {"shards": server.url("indexed/{0..7}.tar"), "cache": str(folder / "trained"), "cache_gb": None}
    config = FastimagenConfig.model_validate(
        {"data": data | {"validation": None, "max_bad_share": 0.9, "remote": PATIENCE.model_dump()}}
    )
    with mock.patch.object(source, "identity_of", return_value=IDENTITY), lines_logged() as lines:
        train, _ = source.open_data(config, with_text=True)
        options: dict[str, Any] = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
        loader = train.loader(config, size=8, crop=None, seed=0, crop_seed=0, **options)
        with closing(loader.batches(0)) as batches:
            next(batches)
    assert loader.counters["read"] == 8 + loader.counters["lost"]
    found = [
        next(line for line in lines if name.split(".")[0] in re.findall(r"/(\d)\.", line)) for name in kinds.values()
    ]
    return [Row(kind, LOST, line) for kind, line in zip(kinds, found)]
