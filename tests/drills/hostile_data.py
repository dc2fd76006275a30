"""A mixture of local, remote and piped shards with damage of every kind, and what a loader must make of it.

`write_data` makes the files and knows from making them which samples are good, which are skipped and why; `Expected`
says what every position of the stream must have. The key of a sample is a number, which its colour and its embeddings
encode.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastimagen.config import FastimagenConfig
from fastimagen.data import source
from fastimagen.data.batch import Batch
from fastimagen.data.embedding_cache import cache_path, write_cache
from fastimagen.data.indexing import index_all
from fastimagen.data.loader import Loader
from fastimagen.data.shard_index import index_shard
from fastimagen.sizes import ImageSize
from fastimagen.text.embeddings import TextEmbeddings

IDENTITY = {"encoder": "counting"}
WEIGHTS = {"remote": 5, "local": 2, "piped": 1}
LOSS_WEIGHTS = {"remote": 1.0, "local": 1.0, "piped": 0.5}
SIZE = 8
BUCKETS = ("8x8", "12x6", "6x12")
"""For images of a number n, whose sides are n modulo 3: about square, wide, tall."""

PADDING = 3000
"""Bytes of metadata that a sample has beside its image, so that a tar arrives in several parts."""

FOREVER = {"/r000.tar": "403", "/r006.tar": "500"}
"""What the server does at every request of a file; it has no r004.tar, and no embeddings of r005.tar."""

FLAKY = """n=$(cat "$1.asked" 2>/dev/null || echo 0); echo $((n + 1)) > "$1.asked"
case $((n % 4)) in 0) exit 3 ;; 1) head -c 2000 "$1"; exit 1 ;; 2) [ -e "$1" ] && sleep 20 ;; esac
exec cat "$1"
"""
"""A command that gives an error, breaks off, stalls, and then works."""


@dataclass
class Truth:
    """A shard: the keys that the index has, those of them whose image cannot be decoded, and how many samples the index
    leaves out, by reason. lost: "listed" if the shard has no index, "read" if only reading it fails."""

    keys: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    excluded: dict[str, int] = field(default_factory=dict)
    lost: str = ""


class CountingEncoder:
    """Embeds a caption, which begins with a number, as that number, in one to three tokens."""

    dim, truncated, unknown = 4, 0, 0

    def identity(self) -> dict[str, str]:
        return IDENTITY

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(tokens_of(caption)) for caption in captions]

    def encode(self, captions: list[str], batch_size: int) -> TextEmbeddings:
        return TextEmbeddings.from_list([tokens_of(caption) for caption in captions])


def tokens_of(caption: str) -> torch.Tensor:
    number = int(caption.split()[0])
    return torch.full((1 + number % 3, 4), float(number)).bfloat16()  # (L, 4)


def use_counting_embeddings() -> None:
    """Let this process take the embeddings of CountingEncoder for those of its text encoder."""
    source.identity_of = lambda config: IDENTITY


# ---- samples


def color_of(number: int) -> tuple[int, int, int]:
    return number % 256, number // 256, 77


def image(number: int, side: int = 24, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    size = [(side + 3, side), (2 * side, side), (side, 2 * side)][number % 3]
    Image.new("RGB", size, color_of(number)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def _bomb(number: int) -> bytes:
    """A BMP whose header claims 30000 x 30000 pixels."""
    content = bytearray(image(number, kind="BMP"))
    content[18:26] = (30000).to_bytes(4, "little") * 2
    return bytes(content)


UNREADABLE: tuple[Callable[[int], bytes], ...] = (
    lambda number: b"rubbish",
    lambda number: b"",
    lambda number: b"<!DOCTYPE html><html>404</html>",
    lambda number: image(number, 200)[:300],
    lambda number: image(number, 200, "JPEG")[:700],
    _bomb,
)
EXCLUDED = ("no caption", "empty caption", "caption not in UTF-8", "no image", "dot in the key", "duplicate")


def files_of(number: int, chance: random.Random, truth: Truth) -> dict[str, bytes]:
    """The files of a sample; what is wrong with it is noted in `truth`."""
    key = str(number)
    draw = chance.random()
    kind, side = ("JPEG", 700) if draw > 0.98 else ("PNG", 900) if draw > 0.97 else ("PNG", 24)
    files = {f"{key}.{kind.lower()}": image(number, side, kind), f"{key}.txt": f"{number} a caption".encode()}
    if draw < 0.06:
        files[f"{key}.png"] = chance.choice(UNREADABLE)(number)
        truth.bad.append(key)
    if not 0.06 <= draw < 0.1:
        truth.keys.append(key)
        return files | {f"{key}.json": json.dumps({"padding": chance.randbytes(PADDING // 2).hex()}).encode()}
    reason = chance.choice(EXCLUDED)
    truth.excluded[reason] = truth.excluded.get(reason, 0) + 1
    if reason == "duplicate":
        truth.keys.append(key)
        return files | {f"{key}.webp": b"a second image"}
    if reason == "dot in the key":
        return {f"{key}.x.png": files[f"{key}.png"], f"{key}.x.txt": files[f"{key}.txt"]}
    if reason in ("no image", "no caption"):
        del files[f"{key}.png" if reason == "no image" else f"{key}.txt"]
    else:
        files[f"{key}.txt"] = b" \n" if reason == "empty caption" else "\xe9".encode("latin-1")
    return files


# ---- shards


def write_data(
    folder: Path,
    url: str,
    *,
    remote: int = 40,
    local: int = 12,
    piped: int = 8,
    samples: int = 60,
    timeout: float = 2.0,
    buckets: tuple[str, ...] = (),
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Truth]]:
    """Write the shards, with embeddings and a manifest of the remote ones. Returns `data` of a configuration, and what
    is true of each shard.

    url: of a server of FOLDER/remote with the faults FOREVER. At least 8 remote, 7 local and 3 piped shards. timeout:
    of requests, in seconds; buckets: none, or BUCKETS.
    """
    chance, truths, first = random.Random(seed), {}, 0
    for part, count in (("remote", remote), ("local", local), ("piped", piped)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for shard in range(count):
            name = f"{part[0]}{shard:03d}"
            truths[name] = truth = Truth()
            with tarfile.open(folder / part / f"{name}.tar", "w") as tar:
                for number in range(first, first + samples):
                    for member_name, content in files_of(number, chance, truth).items():
                        member = tarfile.TarInfo(member_name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            first += samples
            embed(folder / part / f"{name}.tar")
    (folder / "flaky.sh").write_text(FLAKY)
    use_counting_embeddings()
    everything = FastimagenConfig.model_validate(
        {"data": {"shards": str(folder / "remote"), "validation": None, "buckets": buckets}}
    )
    index_all(everything, say=lambda line: None)
    for path in (folder / "remote").glob("*.index"):
        path.unlink()
    sources = {
        "remote": f"{url}/r{{000..{remote - 1:03d}}}.tar",
        "local": f"{folder}/local/l{{000..{local - 1:03d}}}.tar",
        "piped": f"pipe:sh {folder}/flaky.sh {folder}/piped/p{{000..{piped - 1:03d}}}.tar",
    }
    parts = [
        {"name": name, "shards": found, "weight": WEIGHTS[name], "loss_weight": LOSS_WEIGHTS[name]}
        for name, found in sources.items()
    ]
    largest = max(path.stat().st_size for path in folder.glob("*/*.tar"))
    data = {
        "shards": parts,
        "validation": None,
        "buckets": buckets,
        "cache_gb": (16 * largest + 1) / 1e9,
        "max_bad_share": 0.6,
        "remote": {"timeout": timeout, "tries": 8, "pause": 0.05, "longest_pause": 1.0},
    }
    _damage(folder, truths)
    return data, truths


def embed(tar: Path) -> None:
    """Write the embeddings of a shard, with CountingEncoder."""
    shard = index_shard(tar)
    write_cache(cache_path(tar, IDENTITY), shard.keys, shard.captions(), CountingEncoder(), 64)


def _damage(folder: Path, truths: dict[str, Truth]) -> None:
    """Damage shards of each part."""

    def edit(name: str, change: Callable[[bytes], bytes], *, suffix: str = ".tar", lost: str = "listed") -> None:
        part = {"r": "remote", "l": "local", "p": "piped"}[name[0]]
        path = folder / part / f"{name}{suffix}"
        path.write_bytes(change(path.read_bytes()))
        truths[name].lost = lost

    def flip(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    def spoil_header(content: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            at = tar.getmembers()[-7].offset
        return content[:at] + b"\xff" * 20 + content[at + 20 :]

    edit("l001", lambda content: content[: len(content) // 2])
    edit("l002", lambda content: b"")
    edit("l003", lambda content: b"<html>not found</html>" * 100)
    edit("l004", spoil_header)
    (folder / "local/l005.tar").unlink()
    truths["l005"].lost = "listed"
    (folder / "piped/p001.tar").unlink()
    truths["p001"].lost = "listed"
    embeddings = ".counting.safetensors"
    edit("r001", flip, lost="read")
    edit("r002", lambda content: content[:-5000], lost="read")
    edit("r003", flip, suffix=embeddings, lost="read")
    (folder / "remote/r004.tar").unlink()
    (folder / f"remote/r005{embeddings}").unlink()
    for name in ("r000", "r004", "r005", "r006"):
        truths[name].lost = "read"


def store_truths(path: Path, truths: dict[str, Truth]) -> None:
    path.write_text(json.dumps({name: asdict(truth) for name, truth in truths.items()}))


def load_truths(path: Path) -> dict[str, Truth]:
    return {name: Truth(**fields) for name, fields in json.loads(path.read_text()).items()}


# ---- the stream


def open_loader(data: dict[str, Any], cache: Path, **options: Any) -> Loader:
    """The training loader of a configuration's `data`. options: of Split.loader."""
    use_counting_embeddings()
    config = FastimagenConfig.model_validate({"data": data | {"cache": str(cache)}})
    split, _ = source.open_data(config, with_text=True)
    buckets = [ImageSize.parse(text) for text in config.data.buckets]
    return split.loader(config, size=SIZE, buckets=buckets, crop=None, seed=3, crop_seed=0, **options)


class Expected:
    """What a loader must deliver, by the truth of its shards.

    counts: the samples delivered, and those skipped, by reason, in the batches that `check` was given.
    """

    def __init__(self, loader: Loader, truths: dict[str, Truth]) -> None:
        self.loader = loader
        self.truths = [truths[Path(shard.path).stem] for shard in loader.shards]
        self.bad = [{*truth.bad} for truth in self.truths]
        self.counts: Counter[str] = Counter()
        for shard, truth in zip(loader.shards, self.truths):
            assert len(shard) == (0 if truth.lost == "listed" else len(truth.keys)), shard.path

    def excluded(self) -> int:
        """What the index must leave out. A shard that cannot be listed counts with the mean of its data set."""
        total = 0
        for part in {key for key in (Path(shard.path).stem[0] for shard in self.loader.shards)}:
            own = [truth for shard, truth in zip(self.loader.shards, self.truths) if Path(shard.path).stem[0] == part]
            listed = [truth for truth in own if truth.lost != "listed"]
            mean = sum(len(truth.keys) for truth in listed) / len(listed)
            total += sum(sum(truth.excluded.values()) for truth in listed) + round(mean) * (len(own) - len(listed))
        return total

    def walk(self, position: int) -> Iterator[tuple[int, str, str]]:
        """(shard, key, what becomes of it) of the candidates for a position; the last one is delivered."""
        for count in itertools.count():
            shard, index = self.loader.order.after(position, count)
            key = self.truths[shard].keys[index]
            fate = "lost" if self.truths[shard].lost else "bad" if key in self.bad[shard] else "delivered"
            yield shard, key, fate
            if fate == "delivered":
                return

    def check(self, batch: Batch) -> None:
        """Compare keys, origins, images, embeddings and loss weights of a batch with the truth; count its samples."""
        text, weights = batch.text, batch.loss_weights
        assert text is not None and weights is not None
        for row, position in enumerate(batch.positions.tolist()):
            candidates = list(self.walk(position))
            self.counts.update(fate for _, _, fate in candidates)
            shard, key, _ = candidates[-1]
            assert (batch.keys[row], batch.origins[row][0]) == (key, shard), f"position {position}"
            sizes = self.loader.image_sizes
            assert tuple(batch.images.shape[2:]) == sizes[int(key) % 3 if len(sizes) > 1 else 0], f"size of {key}"
            color = batch.images[row].reshape(3, -1).int() - torch.tensor(color_of(int(key)))[:, None]  # (3, HW)
            assert color.abs().max() <= 2, f"image of {key}"
            tokens = tokens_of(key)  # (L, 4)
            assert torch.equal(text.embeds[row, : len(tokens)].bfloat16(), tokens), f"embeddings of {key}"
            part = Path(self.loader.shards[shard].path).stem[0]
            assert weights[row] == LOSS_WEIGHTS[{"r": "remote", "l": "local", "p": "piped"}[part]]

    def check_counters(self) -> None:
        """Compare the loader's counters with what was delivered and skipped. Raises AssertionError."""
        found = {name: self.loader.counters[name] for name in ("read", "bad", "lost", "excluded")}
        expected = {"read": self.counts.total(), "bad": self.counts["bad"], "lost": self.counts["lost"]}
        assert found == expected | {"excluded": self.excluded()}, f"{found} {expected} {self.excluded()}"
