"""Whole runs on images that are not square: two processes killed, resumed by one, against one run of one process.

    python -m tests.drills.buckets --out tests/drills/results/buckets.json

The losses of all steps must be those of the run that nobody killed, and the exported model samples every bucket.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import ROOT, toy_tree

BUCKETS = ["8x8", "12x6", "6x12"]
SHAPES = ((64, 64), (100, 60), (60, 100))
IMAGES, HELD_OUT, BATCH, KILLED_AFTER = 240, 20, 8, 25
TOLERANCE = 1e-5
"""Of the losses: two processes add gradients in another order."""
FASTIMAGEN = [sys.executable, "-m", "fastimagen"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fastimagen"]


def write_images(folder: Path) -> None:
    """Images of three shapes, with captions."""
    folder.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
    for number in range(IMAGES):
        width, height = SHAPES[number % 3]
        colour = list(colours)[number % 4]
        pixels = np.full((height, width, 3), colours[colour], dtype=np.uint8)
        pixels[height // 2 :] //= 2
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(
            f"{colour} above dark {colour}, {['square', 'wide', 'tall'][number % 3]}"
        )


def write_config(folder: Path) -> None:
    tree = toy_tree(folder / "none")
    section = tree["fastimagen"]
    section["data"] = {"shards": "shards", "validation": {"count": HELD_OUT}, "buckets": BUCKETS}
    section["text"] = {"encoder": "./encoder", "random_weights": True}
    section["cascade"]["stages"][1]["crop"] = None
    section["train"] |= {"steps": None, "epochs": 2, "sample_every": 20, "validate_every": 20, "checkpoint_every": 10}
    section["train"]["stages"] = {}
    tree["train_batch_size"] = BATCH
    (folder / "ds.json").write_text(json.dumps(tree, indent=1))


def call(*command: str, folder: Path) -> str:
    """Run a command to its end."""
    child = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.returncode == 0, child.stdout
    return child.stdout


def kill_after(step: int, *command: str, folder: Path) -> int:
    """Kill a run's processes after a step of its first stage; returns the last step that they recorded."""
    records = folder / "killed/metrics.jsonl"
    with open(folder / "killed.log", "w") as log:
        child = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    last, deadline = 0, time.monotonic() + 600
    while last < step:
        assert child.poll() is None and time.monotonic() < deadline, (folder / "killed.log").read_text()
        time.sleep(0.05)
        last = max(losses(records, "base"), default=0) if records.exists() else 0
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return last


def losses(path: Path, stage: str) -> dict[int, float]:
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return {record["step"]: record["loss"] for record in records if record["stage"] == stage and "loss" in record}


def drill(folder: Path) -> dict[str, Any]:
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    write_images(folder / "images")
    write_config(folder)
    call(*FASTIMAGEN, "shards", "folder", "images", "--out", "shards", folder=folder)
    call(*FASTIMAGEN, "embed", "--config", "ds.json", folder=folder)
    described = call(*FASTIMAGEN, "info", "--data", "ds.json", folder=folder)
    train = ["train", "--config", "ds.json", "--run-dir"]
    printed = call(*FASTIMAGEN, *train, "whole", folder=folder)
    killed_at = kill_after(KILLED_AFTER, *TWO, *train, "killed", folder=folder)
    call(*FASTIMAGEN, *train, "killed", folder=folder)
    call(*FASTIMAGEN, "export", "--run", "whole", "--out", "model", folder=folder)
    sizes = json.loads((folder / "model/model_index.json").read_text())["sizes"]
    sampled = []
    for size in (None, *sizes["sr"]):
        command = [
            *FASTIMAGEN,
            "sample",
            "--model",
            "model",
            "--captions",
            "red above dark red",
            "--out",
            f"out-{size}",
        ]
        call(*command, *(() if size is None else ("--size", size)), folder=folder)
        sampled.append("{}x{}".format(*Image.open(folder / f"out-{size}/images/000000.png").size))
    found: dict[str, Any] = {"command": "python -m tests.drills.buckets", "images": IMAGES, "sizes": sizes}
    found["buckets"] = next(line for line in printed.splitlines() if "samples of buckets" in line)
    found["info"] = [line.strip() for line in described.splitlines() if "buckets " in line or "central" in line]
    found["killed_at"], found["sampled"] = killed_at, sampled
    for stage in sizes:
        one, two = (losses(folder / run / "metrics.jsonl", stage) for run in ("whole", "killed"))
        assert one.keys() == two.keys(), "the steps are others"
        found[f"{stage}_steps"] = len(one)
        found[f"{stage}_largest_difference"] = max(abs(one[step] - two[step]) for step in one)
        assert found[f"{stage}_largest_difference"] < TOLERANCE
    assert sampled == [sizes["sr"][0], *sizes["sr"]], sampled
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = drill(Path(temporary))
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
