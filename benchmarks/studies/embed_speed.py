"""Embedding captions beside a plain loop that sorts them by characters; how fast a cache of T5-XXL's width is read.

    python -m benchmarks.studies.embed_speed --out benchmarks/results/cpu/embed_speed.json

Captions are random words of this repository's documentation, of log-normal lengths with a median of 9 words, like
captions from the web. The encoder is built from them as the built-in one is, 512 wide, with random weights: words
beyond its 1024 pieces are several tokens. Padding: the share of the encoder's tokens that are padding, for CAPTIONS
captions of one shard in batches of BATCH. Speed: captions a CPU second on one core, for TIMED_BATCHES batches of that
shard; both loops tokenize, encode and keep what is no padding as bfloat16.
Reads: captions a CPU second from a cache that is WIDTH wide, with checksums compared, in random order: alone, and as
batches of the loader, which are padded on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastimagen.data.embedding_cache import EmbeddingCache, captions_hash, open_cache, write_cache
from fastimagen.files import write_json
from fastimagen.text.embeddings import PackedEmbeddings, TextEmbeddings
from fastimagen.text.t5 import T5Encoder
from fastimagen.text.tiny_t5 import build_tiny_t5

from ..harness.checkout import ROOT

BATCH, ROUNDS = 64, 2
CAPTIONS, TIMED_BATCHES = 10_000, 8
WIDTH, READ_CAPTIONS = 4096, 2000


def make_captions(count: int) -> list[str]:
    words = re.findall(r"[a-z]+", " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))).lower())
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(9), 0.6, count).astype(int).clip(1, 60)
    return [" ".join(rng.choice(words, length)) for length in lengths]


def captions_per_second(work: Callable[[], Any], captions: int) -> float:
    """Of CPU time; the best of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return round(captions / min(seconds), 1)


def by_characters(captions: Sequence[str]) -> list[list[int]]:
    """The batches of a plain loop."""
    order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def plain_loop(encoder: T5Encoder, captions: Sequence[str]) -> list[torch.Tensor]:
    """What one would write with transformers alone."""
    kept: list[torch.Tensor] = [torch.empty(0)] * len(captions)
    with torch.inference_mode():
        for batch in by_characters(captions):
            inputs = encoder.tokens.tokenizer([captions[i] for i in batch], padding=True, return_tensors="pt")
            hidden = encoder.model(**inputs).last_hidden_state.bfloat16()  # (B, L, E)
            for i, row, mask in zip(batch, hidden, inputs["attention_mask"].bool()):
                kept[i] = row[mask].clone()  # (L, E)
    return kept


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of padding in batches of captions with so many tokens."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return round(1 - sum(lengths) / padded, 4)


def some_batches(captions: Sequence[str], batches: Sequence[Sequence[int]]) -> list[str]:
    """The captions of TIMED_BATCHES batches, evenly spread; sorted again, they are in the same batches."""
    step = len(batches) // TIMED_BATCHES
    return [captions[i] for batch in batches[step // 2 :: step][:TIMED_BATCHES] for i in batch]


def embedding(folder: Path) -> dict[str, Any]:
    captions = list(dict.fromkeys(make_captions(CAPTIONS)))
    encoder = T5Encoder(build_tiny_t5(folder / "encoder", captions, dim=512, layers=4))
    lengths = encoder.count_tokens(captions)
    ranked = sorted(range(len(captions)), key=lengths.__getitem__)
    by_tokens = [ranked[start : start + BATCH] for start in range(0, len(ranked), BATCH)]
    few, others = (some_batches(captions, batches) for batches in (by_tokens, by_characters(captions)))
    keys = [str(number) for number in range(len(few))]
    ours = captions_per_second(lambda: write_cache(folder / "c.safetensors", keys, few, encoder, BATCH), len(few))
    plain = captions_per_second(lambda: plain_loop(encoder, others), len(others))
    return {
        "captions": len(captions),
        "tokens_mean": round(float(np.mean(lengths)), 1),
        "padding_by_tokens": padding(lengths, by_tokens),
        "padding_by_characters": padding(lengths, by_characters(captions)),
        "timed_captions": len(few),
        "fastimagen_per_cpu_s": ours,
        "plain_loop_per_cpu_s": plain,
        "ratio": round(ours / plain, 2),
    }


class Wide:
    """An encoder of WIDTH that computes nothing."""

    dim, truncated, unknown = WIDTH, 0, 0

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return [self.lengths[int(caption)] for caption in captions]

    def encode(self, captions: Sequence[str], batch_size: int) -> TextEmbeddings:
        lengths = self.count_tokens(captions)
        return TextEmbeddings.from_list([torch.randn(length, WIDTH).bfloat16() for length in lengths])

    def identity(self) -> dict[str, str]:
        return {"encoder": "wide"}


def reads(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(12), 0.5, READ_CAPTIONS).astype(int).clip(2, 77).tolist()
    names, encoder = [str(number) for number in range(READ_CAPTIONS)], Wide(lengths)
    path = folder / "wide.safetensors"
    write_cache(path, names, names, encoder, BATCH)
    cache = open_cache(path, identity=encoder.identity(), keys=names, captions_hash=captions_hash(names, names))
    order = rng.permutation(READ_CAPTIONS).tolist()
    batches = [order[start : start + BATCH] for start in range(0, READ_CAPTIONS, BATCH)]
    return {
        "width": WIDTH,
        "captions": READ_CAPTIONS,
        "tokens_mean": round(float(np.mean(lengths)), 1),
        "padded_batches_per_cpu_s": captions_per_second(
            lambda: [TextEmbeddings.from_list([cache[index] for index in batch]) for batch in batches], READ_CAPTIONS
        ),
        "alone_per_cpu_s": captions_per_second(lambda: [cache[index] for index in order], READ_CAPTIONS),
        "batches_per_cpu_s": captions_per_second(lambda: [as_batch(cache, batch) for batch in batches], READ_CAPTIONS),
    }


def as_batch(cache: EmbeddingCache, batch: Sequence[int]) -> PackedEmbeddings:
    """As the loader makes them."""
    return PackedEmbeddings.from_list([cache.caption(index, 0) for index in batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=["embedding", "reads"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"command": "python -m benchmarks.studies.embed_speed"}
    with tempfile.TemporaryDirectory() as folder:
        for name, work in {"embedding": embedding, "reads": reads}.items():
            if options.only in (None, name):
                result[name] = work(Path(folder))
    result |= {"torch": torch.__version__, "machine": platform.machine(), "date": date.today().isoformat()}
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
