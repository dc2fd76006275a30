"""Memory of a process that reads shards with an image of 8192x8192 pixels among 10,000 small ones.

    python -m benchmarks.studies.decode_memory --out benchmarks/results/cpu/decode_memory.json [--case PNG]

Each case is a process of its own that has nothing but its loader, with one decoding thread, for a stage of 256x256.
RSS is the highest resident memory, of which the libraries' code is shared with other processes. USS is what the process
has for itself, sampled every 2 ms. The photograph comes with matplotlib, and is enlarged;
flat colours compress to a small file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from fastimagen.files import write_json

from ..harness.checkout import ROOT
from .decode import jpeg, loader, photograph, synthetic, write_shard

SAMPLES, LARGEST = 10_000, 8192
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("none", "jpg", {}),
    "JPEG": ("flat", "jpg", {}),
    "JPEG, a photograph": ("photograph", "jpg", {"quality": 90}),
    "progressive JPEG, a photograph": ("photograph", "jpg", {"quality": 90, "progressive": True}),
    "PNG": ("flat", "png", {}),
    "PNG, a photograph": ("photograph", "png", {"compress_level": 1}),
    "PNG, a photograph with transparency": ("transparent", "png", {"compress_level": 1}),
    "WebP": ("flat", "webp", {"method": 0}),
}


def large(kind: str) -> Image.Image:
    if kind == "flat":
        tiles = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        return Image.fromarray(np.kron(tiles, np.ones((LARGEST // 16, LARGEST // 16, 3), np.uint8)))
    image = photograph(LARGEST)
    if kind == "transparent":
        image.putalpha(image.getchannel("R"))
    return image


def measure(folder: Path, name: str) -> dict[str, Any]:
    """MiB of a process of its own."""
    kind, extension, options = CASES[name]
    small, path = jpeg(synthetic(64, 0)), folder / "large.tar"
    first, buffer = ("jpg", small), io.BytesIO()
    if kind != "none":
        image = large(kind)
        image.save(buffer, Image.registered_extensions()[f".{extension}"], **options)
        first = (extension, buffer.getvalue())
    write_shard(path, [first, *[("jpg", small)] * (SAMPLES - 1)])
    command = [sys.executable, "-m", "benchmarks.studies.decode_memory", "--read", str(path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    return {"largest": name, "file_mib": round(len(first[1]) / (1 << 20), 1), **json.loads(child.stdout)}


def read(path: Path) -> None:
    """Print the memory before, and the highest one while reading the large image and others."""
    before, highest, done = uss_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], uss_mib())

    imports = peak_rss_mib()
    watcher = threading.Thread(target=watch)
    watcher.start()
    found = loader(path, 4)
    found.fixed_batch(range(64))
    with closing(found.batches(0)) as batches:
        for _ in range(100):
            next(batches)
    done.set()
    watcher.join()
    figures = {"imports_rss": imports, "imports_uss": before, "peak_rss": peak_rss_mib(), "peak_uss": highest[0]}
    print(json.dumps({f"{name}_mib": round(value) for name, value in figures.items()}))


def uss_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_rss_mib() -> float:
    """The highest memory of this process; getrusage has that of the parent, too, where it is higher."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help="this one alone; the others stay in the file")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read:
        read(options.read)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        rows = {case: measure(Path(name), case) for case in ([options.case] if options.case else CASES)}
    if options.case and options.out and options.out.exists():
        rows = {row["largest"]: row for row in json.loads(options.out.read_text())["memory"]} | rows
    result = {
        "command": "python -m benchmarks.studies.decode_memory",
        "samples": SAMPLES,
        "pixels": LARGEST**2,
        "memory": [rows[case] for case in CASES if case in rows],
        "versions": {"pillow": PIL.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
