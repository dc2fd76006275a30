"""`fastimagen quickstart`: all of fastimagen end to end on a laptop.

Shards, embeddings, training of two stages, export, sampling, evaluation. Every phase is a command that you can run
yourself. Rerun the quickstart to resume it after an interruption; images are sampled again. Results are in the run
directory of the configuration, runs/quickstart for ds.json: grid.png and report.json.
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

from ..config import FastimagenConfig
from ..config_file import load_config
from ..data.prepare import shapes_folder
from ..extras import require_extra
from ..files import write_json
from ..presets import resolve
from ..starting_files import copy_missing

MODEL, IMAGES, EVALUATION = "model", "images", "evaluation"
"""Folders in the run directory."""


def quickstart(options: argparse.Namespace) -> int:
    """Run all phases of `options.config` in the folder `options.dir`. Returns the status of the first that fails, or 0.

    Raises ImportError without the `train` extra, and ValueError if the configuration trains something else.
    """
    require_extra("deepspeed", user="the quickstart", extra="train")
    options.dir.mkdir(parents=True, exist_ok=True)
    os.chdir(options.dir)
    config = shapes_config(options.config) if Path(options.config).exists() else None
    if copied := copy_missing("."):
        print(f"copied {', '.join(map(str, copied))} to {Path.cwd()}")
    config = config or shapes_config(options.config)
    commands = phases(options.config, config, processes())
    run = Path(config.train.run)
    run.mkdir(parents=True, exist_ok=True)
    for old in (MODEL, IMAGES, EVALUATION):  # written again from the checkpoints
        shutil.rmtree(run / old, ignore_errors=True)
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
    evaluation = json.loads((run / EVALUATION / "report.json").read_text())
    total = round(sum(seconds.values()), 1)
    report: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "total_seconds": total, **evaluation}
    write_json(run / "report.json", report)
    shutil.copy(run / IMAGES / "grid.png", run / "grid.png")
    minutes = report["total_seconds"] / 60
    print(f"\nDone in {minutes:.1f} minutes. Look at {run / 'grid.png'}; figures are in {run / 'report.json'}.")
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


def shapes_config(path: str) -> FastimagenConfig:
    """A configuration. Raises ValueError if the file is wrong or trains on anything but the built-in shapes."""
    config = load_config(path).fastimagen
    if config.data.shapes is None:
        raise ValueError(
            f"{Path(path).resolve()} does not train on the built-in shapes: run the quickstart in another folder, "
            f"as in fastimagen quickstart --dir shapes"
        )
    return config


def processes() -> int:
    """One process per GPU; on a CPU up to two, since threads do not speed up networks of this size."""
    import torch

    return torch.cuda.device_count() or min(2, torch.get_num_threads())


def phases(path: str, config: FastimagenConfig, num_processes: int) -> list[tuple[str, list[str]]]:
    """(name, arguments of python) of every phase, in order. config: the content of the file `path`."""
    run, shapes = config.train.run, config.data.shapes
    model, images, evaluation = (str(Path(run) / name) for name in (MODEL, IMAGES, EVALUATION))
    make_shapes = ["shards", "shapes", "--out", str(shapes_folder(config.data))]
    for key in ("count", "size", "seed"):
        make_shapes += [f"--{key}", str(getattr(shapes, key))]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_processes)]
    train = [*launcher, "launch/train.py", "--config", path]
    command = ["-m", "fastimagen"]
    return [
        ("shards", [*command, *make_shapes]),
        ("embed", [*command, "embed", "--config", path]),
        *((f"train {stage.name}", [*train, "--stage", stage.name]) for stage in resolve(config.cascade).stages),
        ("export", [*command, "export", "--run", run, "--out", model]),
        ("sample", [*command, "sample", "--model", model, "--captions", "launch/captions.txt", "--out", images]),
        ("evaluate", [*command, "evaluate", "--model", model, "--data", "shapes", "--out", evaluation]),
    ]
