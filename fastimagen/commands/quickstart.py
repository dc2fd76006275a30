"""`fastimagen quickstart`: all of fastimagen end to end on a laptop.

Shards, embeddings, training of two stages, export, sampling, evaluation. Every phase is a command that you can run
yourself. Rerun the quickstart to resume it after an interruption; images are sampled again. Results are in
runs/quickstart: grid.png and report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..extras import require_extra
from ..files import read_json_object, write_json
from ..starting_files import copy_missing

RUN = Path("runs/quickstart")
MODEL, IMAGES, EVALUATION = RUN / "model", RUN / "images", RUN / "evaluation"


def quickstart(options: argparse.Namespace) -> int:
    """Run all phases in the folder `options.dir`. Returns the status of the first one that fails, or 0.

    Raises ImportError without the `train` extra, and ValueError if the folder's ds.json trains something else.
    """
    require_extra("deepspeed", user="the quickstart", extra="train")
    options.dir.mkdir(parents=True, exist_ok=True)
    os.chdir(options.dir)
    shapes = shapes_of("ds.json") if Path("ds.json").exists() else None
    if copied := copy_missing("."):
        print(f"copied {', '.join(map(str, copied))} to {Path.cwd()}")
    commands = phases(shapes or shapes_of("ds.json"), processes())
    RUN.mkdir(parents=True, exist_ok=True)
    for old in (MODEL, IMAGES, EVALUATION):  # written again from the checkpoints
        shutil.rmtree(old, ignore_errors=True)
    seconds, cpu_seconds = {}, {}
    for name, command in commands:
        print(f"\n== {name}\n$ {shlex.join(['python', *command])}", flush=True)
        began, cpu_began = time.perf_counter(), _children_cpu_seconds()
        status = _run([sys.executable, "-u", *command])
        if status:
            print(f"quickstart: {name} ended with status {status}; rerun the command to resume", file=sys.stderr)
            return status
        seconds[name] = round(time.perf_counter() - began, 1)
        cpu_seconds[name] = round(_children_cpu_seconds() - cpu_began, 1)
    evaluation = json.loads((EVALUATION / "report.json").read_text())
    total = round(sum(seconds.values()), 1)
    report: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "total_seconds": total, **evaluation}
    write_json(RUN / "report.json", report)
    shutil.copy(IMAGES / "grid.png", RUN / "grid.png")
    minutes = report["total_seconds"] / 60
    print(f"\nDone in {minutes:.1f} minutes. Look at {RUN / 'grid.png'}; figures are in {RUN / 'report.json'}.")
    return 0


def _children_cpu_seconds() -> float:
    """CPU seconds of all processes that this one has started and waited for, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _run(command: list[str]) -> int:
    """The status of a phase. Ctrl-C in a terminal reaches its processes: this one waits until they have ended.

    DeepSpeed's launcher would leave the training processes behind with a traceback; ignoring Ctrl-C is inherited, so
    that it waits for them too, and they handle it themselves.
    """
    launches = "deepspeed.launcher.runner" in command
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if launches else lambda number, frame: None)
    try:
        return subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def shapes_of(config: str) -> dict[str, Any]:
    """The section data.shapes of a configuration. Raises ValueError if it trains on something else."""
    data = read_json_object(config).get("fastimagen", {}).get("data", {})
    if not data.get("shapes"):
        raise ValueError(
            f"{Path(config).resolve()} does not train on the built-in shapes: run the quickstart in another folder, "
            f"as in fastimagen quickstart --dir shapes"
        )
    return data["shapes"]


def processes() -> int:
    """One process per GPU; on a CPU up to two, since threads do not speed up networks of this size."""
    import torch

    return torch.cuda.device_count() or min(2, torch.get_num_threads())


def phases(shapes: dict[str, Any], num_processes: int) -> list[tuple[str, list[str]]]:
    """(name, arguments of python) of every phase, in order. shapes: the section data.shapes of ds.json."""
    model, images, evaluation = map(str, (MODEL, IMAGES, EVALUATION))
    make_shapes = ["shards", "shapes", "--out", "data/shapes"]
    for key in ("count", "size", "seed"):
        make_shapes += [f"--{key}", str(shapes[key])]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_processes)]
    train = [*launcher, "launch/train.py", "--config", "ds.json", "--run-dir", str(RUN)]
    run = ["-m", "fastimagen"]
    return [
        ("shards", [*run, *make_shapes]),
        ("embed", [*run, "embed", "--config", "ds.json"]),
        ("train base", [*train, "--stage", "base"]),
        ("train sr", [*train, "--stage", "sr"]),
        ("export", [*run, "export", "--run", str(RUN), "--out", model]),
        ("sample", [*run, "sample", "--model", model, "--captions", "launch/captions.txt", "--out", images]),
        ("evaluate", [*run, "evaluate", "--model", model, "--data", "shapes", "--out", evaluation]),
    ]
