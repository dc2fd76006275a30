"""Captions shared by several processes: the same pictures as one process draws."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, write_toy_encoder, write_toy_model

CAPTIONS = ["a red circle", "a blue star", "a green square", "a pink cross", "a cyan triangle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


def sample(out: Path, model: Path, launcher: list[str], captions: list[str] = CAPTIONS) -> subprocess.CompletedProcess:
    arguments = [
        "sample",
        "--model",
        str(model),
        "--captions",
        *captions,
        "--out",
        str(out),
        "--steps",
        "3",
        "--sampler",
        "ddpm",
        "--seed",
        "5",
    ]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=240,
    )


def launchers() -> dict[str, list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "fastimagen.cli"],
        "deepspeed": [
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--master_port",
            port,
            "--module",
            "fastimagen.cli",
        ],
    }


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_draw_what_one_draws(launcher: str, model: Path, tmp_path: Path) -> None:
    for name, command in (("one", ["fastimagen.cli"]), ("two", launchers()[launcher])):
        run = sample(tmp_path / name, model, command)
        assert run.returncode == 0, run.stdout + run.stderr
    one, two = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("one", "two"))
    assert one == two and [record["seed"] for record in two["samples"]] == [5, 6, 7, 8, 9]
    for index in range(len(CAPTIONS)):
        paths = [tmp_path / name / f"images/{index:06d}.png" for name in ("one", "two")]
        pixels = [np.asarray(Image.open(path), dtype=int) for path in paths]
        assert abs(pixels[0] - pixels[1]).max() <= 1


def test_fewer_captions_than_processes(model: Path, tmp_path: Path) -> None:
    run = sample(tmp_path / "out", model, launchers()["torchrun"], CAPTIONS[:1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "out/images/000000.png").exists() and not (tmp_path / "out/images/000001.png").exists()
