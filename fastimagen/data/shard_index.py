"""The index of a tar: which files make samples, where they are, and what is left out, by reason.

A sample is all files of a tar that share a key, the path up to the first dot of the file's name (webdataset's rule).
The index of TAR is stored as TAR.index next to it, because indexing 10,000 samples takes half a second.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import first_line, write_safetensors
from ..images import IMAGE_EXTENSIONS
from .embedding_cache import captions_hash
from .image_header import stored_size
from .shard import PLAIN, Reading, Shard, captions_in
from .tar_headers import OpenFile, decode_name, tar_members
from .where import Condition, parse_conditions

logger = logging.getLogger(__name__)

INDEX_FORMAT = "fastimagen.shard.3"
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key, extension
PRIVATE = re.compile(r"__[^/]*__($|/)")  # webdataset's metadata inside a tar


def index_shard(path: str | Path, reading: Reading = PLAIN) -> Shard:
    """Index a tar from its headers, its captions and, if the reading needs them, its jsons.

    Not samples, and counted: keys with "no image", "no caption", "empty caption", a "caption not in UTF-8" or a
    "damaged json"; images with a "dot in the key", which webdataset's rule merges into one key; the "duplicate" second
    image or caption of a key. Raises ValueError, one line, if the file is missing, or as `tar_members` does.
    """
    try:
        file = OpenFile(str(path))
    except OSError as error:
        raise ValueError(f"cannot open shard {path}: {error.strerror}") from error
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    excluded: Counter[str] = Counter()
    dotted: Counter[str] = Counter()
    for name, offset, size in tar_members(file):
        match = MEMBER.fullmatch(name)
        if match is None or PRIVATE.match(name):
            continue
        key, extension = match[1], match[2].lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        files = samples.setdefault(key, {})
        if kind in ("image", "txt", "json"):
            excluded["duplicate"] += kind in files
            files.setdefault(kind, (offset, size))
        elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            dotted[key] += 1
    extents, names, counts, passes, texts, sizes = [], [], [], [], [], []
    filtered: Counter[str] = Counter()
    conditions = parse_conditions(reading.where)
    for key, files in samples.items():
        reason, captions, refused = _examine(file, files, reading, conditions)
        if reason == "no image" and dotted[key]:
            excluded["dot in the key"] += dotted[key]
        elif reason:
            excluded[reason] += 1
        else:
            extents.append((*files["image"], *files.get("txt", (0, 0)), *files.get("json", (0, 0))))
            names.append(key.encode("utf-8", "surrogateescape"))
            counts.append(len(captions))
            texts += captions
            passes.append(refused is None)
            if reading.sizes:
                sizes.append(stored_size(partial(file.read, files["image"][0]), files["image"][1]))
            filtered.update([] if refused is None else [refused])
    return Shard(
        str(path),
        file.stamp,
        np.array(extents, dtype=np.int64).reshape(-1, 6),  # (S, 6)
        np.array(names, dtype=np.bytes_),
        {reason: count for reason, count in excluded.items() if count},
        reading.caption_key if reading.captions else None,
        np.array(counts, dtype=np.int32) if max(counts, default=1) > 1 else None,
        np.array(passes, dtype=bool) if reading.where else None,
        dict(filtered),
        captions_hash([decode_name(name) for name in names], texts) if reading.captions else "",
        np.array(sizes, dtype=np.uint16).reshape(-1, 2) if reading.sizes else None,
    )


def _examine(
    file: OpenFile, files: dict[str, tuple[int, int]], reading: Reading, conditions: Sequence[Condition]
) -> tuple[str | None, list[str], str | None]:
    """(why the files of one key do not make a sample or None, captions, condition that leaves it out or None)."""
    if "image" not in files:
        return "no image", [], None
    metadata: Any = {}
    if "json" in files and (conditions or (reading.caption_key and reading.captions)):
        try:
            metadata = json.loads(file.read(*files["json"]))
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            return "damaged json", [], None
    captions = [""]
    if reading.captions and reading.caption_key is not None:
        captions = captions_in(metadata, reading.caption_key)
        if not captions:
            return f'no caption under "{reading.caption_key}"', [], None
    elif reading.captions:
        if "txt" not in files:
            return "no caption", [], None
        try:
            captions = [file.read(*files["txt"]).decode("utf-8-sig")]
        except UnicodeDecodeError:
            return "caption not in UTF-8", [], None
        if not captions[0].strip():
            return "empty caption", [], None
    elif "txt" in files:
        files["txt"] = (0, 0)  # not read, so that it may be anything
    refused = next(filter(None, (condition.problem(metadata) for condition in conditions)), None)
    return None, captions, refused


def load_or_build_index(path: str, reading: Reading) -> Shard:
    """The shard with its stored index if that matches the tar, otherwise with a new one."""
    shard = load_index(path, reading)
    if shard is None:
        shard = index_shard(path, reading)
        store_index(shard, reading)
    return shard


def load_index(path: str, reading: Reading) -> Shard | None:
    """The shard with its stored index, memory-mapped; None if there is none, or it belongs to another tar."""
    from safetensors import SafetensorError, safe_open

    try:
        stamp = OpenFile(path).stamp
        with safe_open(f"{path}{reading.suffix}.index", framework="pt") as stored:
            header = stored.metadata() or {}
            if (header.get("format"), header.get("tar")) != (INDEX_FORMAT, stamp):
                return None
            arrays = {name: stored.get_tensor(name).numpy() for name in stored.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        return None  # no index yet; or no tar, which index_shard reports
    except (OSError, SafetensorError) as error:
        logger.warning("rebuilding %s%s.index: %s", path, reading.suffix, first_line(error))
        return None
    names = arrays["names"]  # (S, longest) uint8
    return Shard(
        path,
        stamp,
        arrays["places"],
        names.view(f"S{names.shape[1]}").reshape(-1),  # (S,)
        json.loads(header["excluded"]),
        reading.caption_key if reading.captions else None,
        arrays.get("counts"),
        arrays.get("passes"),
        json.loads(header["filtered"]),
        header["samples"],
        arrays.get("image_sizes"),
    )


def store_index(shard: Shard, reading: Reading) -> None:
    """Write the index next to the tar; where that is not possible, the log says so once for a folder."""
    names = shard.names.view(np.uint8).reshape(len(shard), shard.names.itemsize)  # (S, longest)
    tensors = {"places": torch.from_numpy(shard.extents), "names": torch.from_numpy(names)}
    for name in ("counts", "passes", "image_sizes"):
        if (values := getattr(shard, name)) is not None:
            tensors[name] = torch.from_numpy(values)
    header = {"format": INDEX_FORMAT, "tar": shard.stamp, "samples": shard.samples_hash}
    header |= {"excluded": json.dumps(shard.excluded), "filtered": json.dumps(shard.filtered)}
    try:
        write_safetensors(f"{shard.path}{reading.suffix}.index", tensors, header)
    except OSError as error:
        warn_not_stored(os.path.dirname(shard.path), error.strerror or first_line(error))


@lru_cache
def warn_not_stored(folder: str, reason: str) -> None:
    """Cached, so that each folder is reported once."""
    logger.warning("the index of shards in %s cannot be stored (%s): every run rebuilds it", folder, reason)
