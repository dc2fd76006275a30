"""Bad input in local shards and their embeddings."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from fastimagen.config import FastimagenConfig
from fastimagen.data import source
from fastimagen.data.embedding_cache import cache_path
from fastimagen.data.loader import Loader
from fastimagen.data.order import Order
from fastimagen.data.shard import Reading
from fastimagen.data.shard_index import index_shard
from fastimagen.data.shards import open_shards
from tests.data.bad_input.making import (
    EXCLUDED,
    LEFT_OUT,
    REPLACED,
    STOPS,
    Row,
    flipped,
    lines_logged,
    pair,
    problem,
    saved,
)
from tests.data.test_shards import make_tar
from tests.drills.hostile_data import IDENTITY, embed, image

# ---- images in shards


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    content = bytearray(image(1))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def images_in_shards(folder: Path) -> list[Row]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    kinds = {
        "no image at all": ("jpg", b"rubbish" * 9),
        "an empty file": ("jpg", b""),
        "an HTML page in its place": ("jpg", b"<!DOCTYPE html><html>404</html>"),
        "an SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "HEIC under the name of a JPEG": ("jpg", b"\0\0\0\x18ftypheic" + bytes(99)),
        "a truncated JPEG": ("jpg", saved(noise, "JPEG")[:900]),
        "a truncated PNG": ("png", saved(noise, "PNG")[:900]),
        "a truncated WebP": ("webp", saved(noise, "WEBP")[:900]),
        "a truncated GIF": ("gif", saved(noise, "GIF")[:900]),
        "a PNG with changed bytes in its pixels": ("png", flipped(saved(noise, "PNG"), 60)),
        "a PNG with changed bytes in its header": ("png", flipped(saved(noise, "PNG"), 17)),
        "more than 8192 x 8192 pixels": ("png", png_of_size(9000, 9000)),
        "a decompression bomb": ("png", png_of_size(100_000, 100_000)),
        "floating point pixels": ("tif", saved(Image.new("F", (8, 8)), "TIFF")),
        "grey values of 32 bits": ("tif", saved(Image.new("I", (8, 8), 1 << 20), "TIFF")),
    }
    files: dict[str, bytes] = {}
    for number, (extension, content) in enumerate(kinds.values()):
        files |= pair(f"{number:02d}", extension, content) | pair(f"{number:02d}-next", "png", image(1))
    shard = index_shard(make_tar(folder / "images.tar", files))
    order = Order([len(shard)], 0)
    loader = Loader([shard], None, order, size=8, global_batch=1, micro_batch=1, max_bad_share=1.0, crop_seed=0)
    with lines_logged() as lines:
        batch = loader.fixed_batch(range(0, 2 * len(kinds), 2))
    assert [key.partition("-")[2] for key in batch.keys] == ["next"] * len(kinds)
    assert loader.counters["bad"] == len(lines) == len(kinds), lines
    return [Row(kind, REPLACED, line) for kind, line in zip(kinds, lines)]


# ---- samples in shards


def samples_in_shards(folder: Path) -> list[Row]:
    good = pair("good", "png", image(1)) | {"good.json": b'{"caption": "a caption", "width": 9}'}
    kinds: dict[str, tuple[dict[str, bytes], Reading]] = {
        "an image without caption": ({"x.png": image(1)}, Reading()),
        "a blank caption": (pair("x", "png", image(1)) | {"x.txt": b" \n"}, Reading()),
        "a caption in Latin-1": (pair("x", "png", image(1)) | {"x.txt": b"caf\xe9"}, Reading()),
        "a caption without image": ({"x.txt": b"a caption"}, Reading()),
        "a second image of a key": (pair("x", "png", image(1)) | {"x.webp": image(2)}, Reading()),
        "a dot in the key (KEY.1.png)": (pair("x.1", "png", image(1)), Reading()),
        "damaged json": ({"x.png": image(1), "x.json": b"{"}, Reading("caption")),
        "json that is no object": ({"x.png": image(1), "x.json": b"[1]"}, Reading("caption")),
        "json nested without end": ({"x.png": image(1), "x.json": b"[" * 100_000}, Reading("caption")),
        "no caption under `data.caption_key`": ({"x.png": image(1), "x.json": b"{}"}, Reading("caption")),
        "captions that are no text": ({"x.png": image(1), "x.json": b'{"caption": [1, null]}'}, Reading("caption")),
        "metadata without the key of `data.where`": (pair("x", "png", image(1)), Reading(None, ("width > 8",))),
    }
    rows = []
    for number, (kind, (files, reading)) in enumerate(kinds.items()):
        shard = index_shard(make_tar(folder / f"{number}.tar", good | files), reading)
        if shard.filtered:
            ((reason, count),) = shard.filtered.items()
            rows.append(Row(kind, "left out, `filtered`", f"{count} by {reason}"))
        else:
            ((reason, count),) = shard.excluded.items()
            rows.append(Row(kind, EXCLUDED, f"{count} {reason}"))
        assert count == 1 and "good" in shard.keys
    return rows


# ---- shards


def shards(folder: Path) -> list[Row]:
    good = make_tar(folder / "good.tar", pair("good", "png", image(1)) | {"good.json": os.urandom(2000)})
    whole = good.read_bytes()
    sparse = tarfile.TarInfo("x.png")
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    kinds: dict[str, bytes | None] = {
        "a missing shard": None,
        "an empty file": b"",
        "a tar without files": bytes(10240),
        "a truncated tar": whole[:1500],
        "a tar without its end": whole[:-9000][: 512 * 4],
        "a file that is no tar": b"<html>" * 200,
        "a compressed tar": gzip.compress(whole),
        "a damaged header in the middle": flipped(whole, 512 * 2 + 150),
        "two tars in one file": whole + whole,
        "a sparse file in a tar": sparse.tobuf(tarfile.PAX_FORMAT) + bytes(10240),
    }
    rows = []
    for number, (kind, content) in enumerate(kinds.items()):
        bad = folder / f"bad{number}.tar"
        if content is not None:
            bad.write_bytes(content)
        with lines_logged() as lines:
            opened = open_shards(f"{folder}/{{good,bad{number}}}.tar", max_lost=0.5)
        assert sum(map(len, opened)) == 1 and opened[1].lost
        rows.append(Row(kind, LEFT_OUT, next(line for line in lines if line.startswith("lost shard"))))
    os.mkdir(folder / "none")
    (shard,) = open_shards(good)
    changed = make_tar(folder / "other.tar", pair("good", "png", image(2)) | pair("more", "png", image(3)))
    changed.replace(good)
    missing = [str(folder / f"bad{number}.tar") for number in range(1, 4)]
    stops: dict[str, Callable[[], object]] = {
        "a shard that changes while training": lambda: shard.image(0),
        "too many lost shards": lambda: open_shards([str(good), *missing], max_lost=0.5),
        "a folder without shards": lambda: open_shards(folder / "none"),
        "a path that does not exist": lambda: open_shards(folder / "nowhere"),
        "a shard that is listed twice": lambda: open_shards([str(good), str(good)]),
        "a condition that is none": lambda: open_shards(good, reading=Reading(None, ("width larger 5",))),
    }
    return rows + [Row(kind, STOPS, problem(action)) for kind, action in stops.items()]


# ---- embeddings


def embeddings(folder: Path) -> list[Row]:
    def tokens(content: bytes) -> bytes:
        return flipped(content, start_of(content, "tokens"))

    def tables(content: bytes) -> bytes:
        return flipped(content, start_of(content, "sums"))

    kinds: dict[str, Callable[[bytes], bytes] | str] = {
        "no embeddings of a shard": "missing",
        "truncated embeddings": lambda content: content[:-9],
        "changed bytes in embeddings": tokens,
        "changed bytes in their tables": tables,
        "embeddings of other captions": "captions",
        "embeddings of another encoder": "encoder",
    }
    rows = []
    for number, (kind, damage) in enumerate(kinds.items()):
        (folder / str(number)).mkdir()
        tar = make_tar(folder / f"{number}/shard.tar", pair("x", "png", image(1)))
        embed(tar)
        path = cache_path(tar, IDENTITY)
        if callable(damage):
            path.write_bytes(damage(path.read_bytes()))
        elif damage == "missing":
            path.unlink()
        elif damage == "captions":
            make_tar(tar, pair("y", "png", image(1)))
        identity = IDENTITY | ({"revision": "2"} if damage == "encoder" else {})
        config = FastimagenConfig.model_validate({"data": {"shards": str(tar), "validation": None}})
        with mock.patch.object(source, "identity_of", return_value=identity):
            rows.append(Row(kind, STOPS, problem(lambda config=config: first_sample(config))))
    return rows


def start_of(content: bytes, name: str) -> int:
    """Where a tensor of a safetensors file begins."""
    header = 8 + struct.unpack("<Q", content[:8])[0]
    return header + json.loads(content[8:header])[name]["data_offsets"][0]


def first_sample(config: FastimagenConfig) -> None:
    split, _ = source.open_data(config, with_text=True)
    split.fixed_batch(config, [0], size=8, crop=None)
