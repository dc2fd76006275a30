"""Sampling in several processes gives the images of a single process."""

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
from tests.forked import ForkedProcess

pytestmark = pytest.mark.slow

CAPTIONS = ["a red circle", "a blue star", "a green square", "a pink cross", "a cyan triangle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


def sample(out: Path, model: Path, captions: list[str] = CAPTIONS) -> list[str]:
    """The arguments of `fastimagen`."""
    settings = ["--steps", "3", "--sampler", "ddpm", "--seed", "5"]
    return ["sample", "--model", str(model), "--captions", *captions, "--out", str(out), *settings]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launchers() -> dict[str, list[str]]:
    """Commands that start two processes on a free port."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    deepspeed = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", free_port(), "--module"]
    return {"torchrun": [*torchrun, "fastimagen.cli"], "deepspeed": [*deepspeed, "fastimagen.cli"]}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_give_the_images_of_one(launcher: str, model: Path, tmp_path: Path) -> None:
    one_process = ForkedProcess(sample(tmp_path / "one", model))
    command = [sys.executable, "-m", *launchers()[launcher], *sample(tmp_path / "two", model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert one_process.wait() == 0
    one, two = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("one", "two"))
    assert one == two and [record["seed"] for record in two["samples"]] == [5, 6, 7, 8, 9]
    for index in range(len(CAPTIONS)):
        paths = [tmp_path / name / f"images/{index:06d}.png" for name in ("one", "two")]
        pixels = [np.asarray(Image.open(path), dtype=int) for path in paths]
        assert abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.slow
def test_there_may_be_fewer_captions_than_processes(model: Path, tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        ForkedProcess(
            sample(tmp_path / "out", model, CAPTIONS[:1]), environment={**ranks, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "out/images/000000.png").exists() and not (tmp_path / "out/images/000001.png").exists()


@pytest.mark.slow
def test_warnings_and_negative_captions_of_all_processes_are_in_the_output(model: Path, tmp_path: Path) -> None:
    """Two ranks sample two images each; every image has a negative caption of its own and a warning."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, sys
from fastimagen.sampling.distributed import exit_process, sample_distributed
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.sampling.request import SamplingRequest

captions, negative = ["象 a", "象 b", "象 c", "象 d"], ["e", "f", "g", "h"]
request = SamplingRequest(captions=captions, negative=negative, settings={{"steps": 1}})
output = sample_distributed(ImagenPipeline.from_pretrained({str(model)!r}), request)
if output is not None:
    found = [output.captions, output.record["negative"], output.warnings]
    open({str(tmp_path / "found.json")!r}, "w").write(json.dumps(found))
exit_process()
"""
    )
    command = [sys.executable, "-m", *launchers()["torchrun"][:-2], str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    captions, negative, warnings = json.loads((tmp_path / "found.json").read_text())
    assert captions == ["象 a", "象 b", "象 c", "象 d"] and negative == ["e", "f", "g", "h"]
    assert all(sum(f'"{caption}"' in warning for warning in warnings) == 1 for caption in captions)
