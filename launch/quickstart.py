"""All of fastimagen end to end on a laptop: shards, embeddings, training of two stages, export, sampling, evaluation.

    make quickstart            (or: python launch/quickstart.py)

Every phase is a command that you can run yourself. Rerun the quickstart to resume it after an interruption; images are
sampled again. Results are in runs/quickstart: grid.png and report.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/quickstart")
MODEL, IMAGES, EVALUATION = RUN / "model", RUN / "images", RUN / "evaluation"


def processes() -> int:
    """One process per GPU; on a CPU up to two, since threads do not speed up networks of this size."""
    import torch

    return torch.cuda.device_count() or min(2, torch.get_num_threads())


def phases() -> list[tuple[str, list[str]]]:
    """(name, command) of every phase, in order."""
    shapes = json.loads(Path("ds.json").read_text())["fastimagen"]["data"]["shapes"]
    python = [sys.executable, "-u"]
    fastimagen = [*python, "-m", "fastimagen.cli"]
    train = [
        *python,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(processes()),
        "launch/train.py",
        "--config",
        "ds.json",
        "--run-dir",
        str(RUN),
    ]
    return [
        (
            "shards",
            [
                *fastimagen,
                "shards",
                "shapes",
                "--out",
                "data/shapes",
                "--count",
                str(shapes["count"]),
                "--size",
                str(shapes["size"]),
                "--seed",
                str(shapes["seed"]),
            ],
        ),
        ("embed", [*fastimagen, "embed", "--config", "ds.json"]),
        ("train base", [*train, "--stage", "base"]),
        ("train sr", [*train, "--stage", "sr"]),
        ("export", [*fastimagen, "export", "--run", str(RUN), "--out", str(MODEL)]),
        (
            "sample",
            [*fastimagen, "sample", "--model", str(MODEL), "--captions", "launch/captions.txt", "--out", str(IMAGES)],
        ),
        ("evaluate", [*fastimagen, "evaluate", "--model", str(MODEL), "--data", "shapes", "--out", str(EVALUATION)]),
    ]


def main() -> int:
    os.chdir(ROOT)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see fastimagen/commands/train.py
    RUN.mkdir(parents=True, exist_ok=True)
    for old in (MODEL, IMAGES, EVALUATION):  # written again from the checkpoints
        shutil.rmtree(old, ignore_errors=True)
    seconds = {}
    for name, command in phases():
        print(f"\n== {name}\n$ {' '.join(['python', *command[2:]])}", flush=True)
        began = time.perf_counter()
        status = subprocess.run(command).returncode
        if status:
            print(f"quickstart: {name} ended with status {status}; rerun the command to resume", file=sys.stderr)
            return status
        seconds[name] = round(time.perf_counter() - began, 1)
    evaluation = json.loads((EVALUATION / "report.json").read_text())
    report = {"seconds": seconds, "total_seconds": round(sum(seconds.values()), 1), **evaluation}
    (RUN / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.copy(IMAGES / "grid.png", RUN / "grid.png")
    minutes = report["total_seconds"] / 60
    print(f"\nDone in {minutes:.1f} minutes. Look at {RUN / 'grid.png'}; figures are in {RUN / 'report.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
