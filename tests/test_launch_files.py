"""launch/: the Slurm script, the Kubernetes job and the configurations mean what they say."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

CONFIGS = {  # name: (processes, images per step, stages)
    "one_24gb": (1, 256, ("base64", "sr256")),
    "one_h100": (1, 512, ("base64", "sr256", "sr1024")),
    "eight_gpus": (8, 2048, ("base64", "sr256", "sr1024")),
    "sixteen_nodes": (128, 2048, ("base64", "sr256", "sr1024")),
}

# Stand-ins for Slurm's commands: `srun` plays training that leaves with status 75 when it gets USR1.
FAKES = {
    "scontrol": 'if [ $1 = show ]; then printf "node-7\\nnode-8\\n"; else echo "scontrol $*" >> calls; fi',
    "srun": 'echo "$MASTER_ADDR $MASTER_PORT $*" >> calls; trap "exit $LEAVES" USR1; touch ready; '
    "for i in $(seq 200); do sleep 0.05; done",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_pass_the_dry_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastimagen.config_file import load_config
    from fastimagen.train.activations import Peaks
    from fastimagen.train.trainer import Trainer

    monkeypatch.setattr("fastimagen.train.plan.measure", lambda *_, **__: Peaks(0, 0))  # it takes 15 s
    processes, images, stages = CONFIGS[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = load_config(ROOT / f"launch/configs/{name}.json", [])
    described = Trainer(config).describe()
    for stage in stages:
        assert f"steps of {images} images on {processes} x" in next(
            line for line in described.splitlines() if line.startswith(f"{stage}: ")
        )
    assert config.deepspeed["optimizer"]["params"]["lr"] == 1e-4
    assert config.deepspeed["scheduler"]["params"]["warmup_num_steps"] == 10_000


def write_sparse_model(folder: Path, preset: str) -> None:
    """A model directory of a preset whose weights take no space: their files have a header and a hole."""
    from fastimagen.networks.build import build_network
    from fastimagen.presets import resolve

    cascade = resolve(preset)
    folder.mkdir(parents=True)
    index = {"format": "fastimagen.model.1", "stages": [stage.name for stage in cascade.stages], "text_encoder": None}
    (folder / "model_index.json").write_text(json.dumps(index))
    for stage in cascade.stages:
        (folder / stage.name).mkdir()
        (folder / stage.name / "config.json").write_text(stage.model_dump_json())
        with torch.device("meta"):
            weights = build_network(stage.unet).state_dict()
        header, end = {}, 0
        for name, weight in weights.items():
            start, end = end, end + 4 * weight.numel()
            header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / stage.name / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("name", "processes", "images", "trained"),
    [("deepfloyd_lora_24gb", 1, 16, "of them in adapters"), ("deepfloyd_full_80gb", 8, 64, "parameters, 20000 steps")],
)
def test_configurations_for_deepfloyd_pass_the_dry_run(
    name: str, processes: int, images: int, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastimagen.config_file import load_config
    from fastimagen.train.activations import Peaks
    from fastimagen.train.trainer import Trainer

    monkeypatch.setattr("fastimagen.train.plan.measure", lambda *_, **__: Peaks(0, 0))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.chdir(tmp_path)
    write_sparse_model(tmp_path / "models/if", "if-xl")
    described = Trainer(load_config(ROOT / f"launch/configs/{name}.json", [])).describe()
    for stage in ("base64", "sr256"):
        line = next(line for line in described.splitlines() if line.startswith(f"{stage}: "))
        assert f"steps of {images} images on {processes} x" in line and trained in line


@pytest.mark.parametrize("status", [75, 69])
def test_the_slurm_script_requeues_after_a_signal_only(status: int, tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NNODES": "2",
        "LEAVES": str(status),
    }
    script = str(ROOT / "launch/slurm.sbatch")
    job = subprocess.Popen(["bash", script, "--config", "my ds.json"], cwd=tmp_path, env=environment)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == status
    started, arguments, later = (tmp_path / "calls").read_text().partition(" train --config my ds.json\n")
    assert started.startswith("node-7 21234 ") and "fastimagen supervise" in started and arguments
    assert later == ("scontrol requeue 1234\n" if status == 75 else "")


def test_slurm_directives() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert directives["ntasks-per-node"] == "1" and "requeue" in directives and directives["open-mode"] == "append"
    kind, _, seconds = directives["signal"].partition("@")
    assert kind == "B:USR1", "the signal goes to the script, which passes it on"
    from fastimagen.config import TimeoutConfig

    assert int(seconds) > TimeoutConfig().stop + 60  # time to finish the step, and to save
    last_directive = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last_directive]), "sbatch stops reading at the first command"
    subprocess.run(["bash", "-n", str(ROOT / "launch/slurm.sbatch")], check=True)


def test_the_kubernetes_job() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        command = [*container["command"], *container["args"]]
        assert command[:4] == ["python", "-m", "fastimagen", "supervise"] and "--run-dir" in command
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        from fastimagen.commands.supervise import add_flags

        parser = argparse.ArgumentParser()
        add_flags(parser)
        patience = parser.parse_args(["--", "true"]).patience
        assert pod["terminationGracePeriodSeconds"] >= patience
