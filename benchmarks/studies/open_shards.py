"""What opening many shards takes: time, and memory of a process and of a node.

    python -m benchmarks.studies.open_shards [--shards 1000] [--samples 10000] [--out FILE]

The tars are empty files of 400 MB without blocks; their indices, and the headers of their embeddings, are those of tars
that img2dataset numbered. No image is read. Each row is a process of its own: the first start, which makes the manifest
from the indices; the first process of a later start, which compares the manifest with tars and embeddings; another
process, which trusts it; and the first process without text. 20 % of the samples are held out for validation.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastimagen.data.manifest import manifest_path
from fastimagen.data.shard import PLAIN, Shard
from fastimagen.data.shard_index import store_index
from fastimagen.data.tar_headers import stamp_of
from fastimagen.files import write_safetensors

from ..harness.rows import RESULTS, today

IDENTITY = {"encoder": "synthetic"}
TAR_BYTES = 400_000_000

MEASURE = """
import json, resource, sys, time
from fastimagen.config import FastimagenConfig
from fastimagen.data import source

def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

folder, with_text, trust = sys.argv[1], sys.argv[2] == "text", sys.argv[3] == "trust"
source.identity_of = lambda config: {"encoder": "synthetic"}
config = FastimagenConfig.model_validate({"data": {"shards": folder, "validation": {"share": 0.2}}})
before, wall, cpu = memory(), time.perf_counter(), time.process_time()
train, validation = source.open_data(config, with_text=with_text, trust=trust)
wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, memory()
print(json.dumps({
    "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "training": len(train), "validation": len(validation),
    "private_bytes": after["RssAnon"] - before["RssAnon"], "mapped_bytes": after["RssFile"] - before["RssFile"],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu/open_shards.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.shards):
            write_shard(Path(folder), number, options.samples)
        rows = [
            measured("first start", folder, "text", "compare"),
            measured("first process", folder, "text", "compare"),
            measured("other process", folder, "text", "trust"),
            measured("first process without text", folder, "no text", "compare"),
        ]
        manifest = manifest_path(folder, PLAIN).stat().st_size
    total = options.shards * options.samples
    about = {
        "command": f"python -m benchmarks.studies.open_shards --shards {options.shards} --samples {options.samples}",
        "shards": options.shards,
        "samples": total,
        "manifest_bytes_per_sample": round(manifest / total, 3),
        "manifest_gb_of_100_million": round(manifest / total * 1e8 / 1e9, 3),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": today(),
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    options.out.write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')
    print(options.out.read_text())


def write_shard(folder: Path, number: int, samples: int) -> None:
    """A tar without content, its index, and the header of its embeddings."""
    tar = folder / f"{number:05d}.tar"
    with open(tar, "wb") as file:
        file.truncate(TAR_BYTES)
    names = np.array([f"{number:05d}{index:04d}".encode() for index in range(samples)])
    samples_hash = f"{number:064d}"
    extents = np.zeros((samples, 6), dtype=np.int64)
    store_index(Shard(str(tar), str(stamp_of(str(tar))), extents, names, {}, samples_hash=samples_hash), PLAIN)
    header = IDENTITY | {"samples": samples_hash}
    write_safetensors(folder / f"{number:05d}.synthetic.safetensors", {"tokens": torch.zeros(1)}, header)


def measured(what: str, folder: str, text: str, trust: str) -> dict[str, Any]:
    """A start in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, text, trust], check=True, capture_output=True, text=True
    )
    return {"start": what, **json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    main()
