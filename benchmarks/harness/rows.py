"""Results: one row for every (op, shape, dtype, mode, provider), complete in itself, in results/<device>/<date>.json.

A row has `op`, `shape`, `dtype`, `mode`, `provider`; either `ms` (p20, p50, p80) with `timer`, or `missing`, the reason
why there is no time; where they apply `flops`, `bytes`, `peak_bytes`, `images`, `gbs` and `tflops` (the copy bandwidth
and matrix rate of the same run), `note`; and where and when: `device`, `clocks`, `threads`, `versions`, `commit`,
`kernels` (digest of the kernel sources) and `date`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .checkout import ROOT

RESULTS = ROOT / "benchmarks/results"
KEY = ("op", "shape", "dtype", "mode", "provider")
KERNELS = {
    "attention": (
        "attention.py",
        "attention_backward_kernels.py",
        "attention_device.py",
        "attention_forward_kernel.py",
        "attention_tiles.py",
        "device.py",
    ),
    "group_norm": (
        "group_norm.py",
        "device.py",
        "group_norm_backward_kernels.py",
        "group_norm_device.py",
        "group_norm_forward_kernels.py",
    ),
    "modulated_norm": ("modulated_norm.py",),
    "residual": ("residual.py",),
    "threshold": ("dynamic_threshold.py",),
    "sampler step": ("sampler_step.py", "dynamic_threshold.py"),
}
"""Files in kernels/ that an op's Triton rows measured; rows of other ops (whole networks) measured all of them."""

Row = dict[str, Any]


def environment() -> Row:
    """Where and when: the part that all rows of a run share."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "clocks": None,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": today(),
    }


def versions() -> dict[str, str]:
    """Of what can change a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "deepspeed", "xformers", "minimagen", "imagen-pytorch", "diffusers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def _cpu_name() -> str:
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return f"CPU ({names[1] if names else platform.machine()})"


def folder(device: str) -> str:
    """The name of a device's folder: "NVIDIA H200" -> "nvidia-h200"; all CPUs share "cpu"."""
    return "cpu" if device.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def clocks() -> str | None:
    """SM and memory clock of the GPU at this moment, as nvidia-smi prints them; None where it cannot tell."""
    ask = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The commit that was measured, with "+" where the sources differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "fastimagen", "kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def kernel_digest(op: str) -> str:
    """Digest of the kernel sources behind an op's Triton rows: a row with another one is stale."""
    names = KERNELS.get(op) or sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    digest = hashlib.sha256()
    for path in (ROOT / "kernels" / name for name in names):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:12]


def is_stale(row: Row) -> bool:
    """Whether the kernels have changed since they were measured."""
    return "kernels" in row and row["kernels"] != kernel_digest(row["op"])


class Results:
    """The rows of a file, to which rows are added; a row replaces an older one of the same key.

    Every `add` rewrites the whole file beside it and then puts it in place, so that an interrupt loses nothing.
    """

    def __init__(self, path: Path, shared: Row) -> None:
        self.path, self.shared = path, shared
        self.rows = {key(row): row for row in read(path)} if path.exists() else {}

    def add(self, **row: Any) -> Row:
        complete = {**row, **self.shared}
        if "triton" in row["provider"]:
            complete["kernels"] = kernel_digest(row["op"])
        self.rows[key(complete)] = {name: value for name, value in complete.items() if value is not None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(f'{{"rows": [\n{lines}\n]}}\n')
        unfinished.replace(self.path)
        return complete


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def read(path: Path) -> list[Row]:
    """The rows of one file."""
    return json.loads(path.read_text())["rows"]


def read_all(results: Path = RESULTS) -> list[Row]:
    """All rows of all files of this format, oldest first."""
    return [row for path in sorted(results.glob("*/[0-9]*.json"), key=lambda path: path.name) for row in read(path)]


class Measured:
    """The latest row of every key, by device: "cpu", or the folder of a GPU's results."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[str, dict[tuple[str, ...], Row]] = {}
        for row in rows:
            self.rows.setdefault(folder(row["device"]), {})[key(row)] = row

    @property
    def gpus(self) -> list[str]:
        return sorted(name for name in self.rows if name != "cpu")

    def of(self, device: str, **wanted: str) -> list[Row]:
        """Rows of a device with these fields, in the order of their first measurement."""
        return [
            row
            for row in self.rows.get(device, {}).values()
            if all(row.get(field) == value for field, value in wanted.items())
        ]

    def one(self, device: str, **wanted: str) -> Row | None:
        return next(iter(self.of(device, **wanted)), None)
