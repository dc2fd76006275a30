"""Drill: two ranks save after 10 steps; 1, 2 and 4 ranks at other ZeRO stages resume and take 10 more.

    python -m tests.drills.resume_anywhere [unet|transformer]

Weights and EMA that are read, also by `fastimagen export`, must equal those of the save. Losses of the 10 steps after
it must be within 1e-6 of the run that went on undisturbed. In fp32 on a CPU; DeepSpeed's Muon iterates in bf16 on a CPU
that multiplies in bf16, which would turn the rounding of another order of additions into differences of 1e-5, so that
oneDNN is held to older instructions. The result is in tests/drills/results/resume_anywhere.json or, of the pixel
transformer, resume_anywhere_transformer.json, written again after each number of ranks. A short version is in
tests/train/test_two_ranks.py.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.conftest import ROOT, TOY_TRANSFORMER, TOY_UNET, toy_cascade

RESULTS = ROOT / "tests/drills/results"
NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "unet": ({**TOY_UNET, "zero_init": False}, "resume_anywhere.json"),
    "transformer": ({**TOY_TRANSFORMER, "patch": 2}, "resume_anywhere_transformer.json"),
}
"""The stage's network, and the file of its result."""
STEPS, BATCH, TOLERANCE = 10, 4, 1e-6
OPTIMIZERS = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "Muon": {"type": "Muon", "params": {"muon_lr": 1e-2, "adam_lr": 1e-3, "torch_adam": True}},
}
CPU = {"device": "cpu"}
WRITERS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
}
READERS = {
    **WRITERS,
    "ZeRO 1, optimizer offloaded": {"stage": 1, "offload_optimizer": CPU},
    "ZeRO 3, all offloaded": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}


class Run:
    """A stage in training: engine, weights, average."""

    def __init__(self, network: str, optimizer: str, zero: dict[str, Any]) -> None:
        from fastimagen.cascade import Stage
        from fastimagen.config import EMAConfig
        from fastimagen.networks.parameters import muon_parameters
        from fastimagen.train.deepspeed_config import resolve_deepspeed
        from fastimagen.train.ema import EMA
        from fastimagen.train.engine import make_engine
        from fastimagen.train.flat_weights import FlatWeights
        from fastimagen.train.stage_setup import initial_unet

        self.stage = Stage(toy_cascade(unet=NETWORKS[network][0]).stages[0], None)
        unet = initial_unet(self.stage.config, seed=0)
        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 15, "warmup_max_lr": 1e-3}}
        keys = {"train_batch_size": BATCH, "optimizer": OPTIMIZERS[optimizer], "zero_optimization": zero}
        keys |= {"scheduler": scheduler} if optimizer == "AdamW" else {}
        config, _ = resolve_deepspeed(
            keys, {}, steps=1, world_size=dist.get_world_size(), cuda=False, tensorboard="", job_name=""
        )
        self.engine = make_engine(unet, config, muon_parameters(unet))
        self.weights = FlatWeights(self.engine)
        self.ema = EMA(self.weights.shards, EMAConfig(decay=0.9))

    def train(self, steps: range) -> list[float]:
        """Take steps; returns their losses. A sample is a function of its position, whichever rank trains on it."""
        from fastimagen.text.embeddings import TextEmbeddings
        from fastimagen.train.learning_rate import set_learning_rate

        losses, share = [], BATCH // dist.get_world_size()
        for step in steps:
            set_learning_rate(self.engine, step)
            first = (step - 1) * BATCH + dist.get_rank() * share
            positions = range(first, first + share)
            generators = [torch.Generator().manual_seed(position) for position in positions]
            images = torch.stack([torch.rand(3, 8, 8, generator=generator) * 2 - 1 for generator in generators])
            embeds = torch.stack([torch.randn(5, 64, generator=generator) for generator in generators])
            text = TextEmbeddings(embeds, torch.ones(share, 5, dtype=torch.bool))
            loss = self.stage.training_loss(self.engine, images, text, self.stage.draw(0, positions, images)).mean()
            self.engine.backward(loss)
            self.engine.step()
            self.ema.update(step)
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            losses.append(mean.item())
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and average by name."""
        kinds = {"weights": self.weights.shards, "ema": self.ema.average}
        return {
            f"{kind} {name}": tensor.detach().cpu().clone()
            for kind, values in kinds.items()
            for name, tensor in self.weights.all_gather(values, torch.float32).items()
        }


def largest(losses: list[float], others: list[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


def write(folder: Path, network: str) -> None:
    """Save every kind of checkpoint after STEPS steps, and what the run was like at 2 STEPS."""
    from safetensors.torch import save_file

    from fastimagen.train.checkpoint_writer import CheckpointWriter

    for optimizer in OPTIMIZERS:
        for name, zero in WRITERS.items():
            run, place = Run(network, optimizer, zero), folder / optimizer / name
            run.train(range(1, STEPS + 1))
            saver = CheckpointWriter(place, "drill", keep=1, keep_every=None)
            saver.save(run.engine, run.weights, run.ema, {"step": STEPS})
            at_save = run.state()
            losses = run.train(range(STEPS + 1, 2 * STEPS + 1))
            saver.finish()
            after = run.state()
            if dist.get_rank() == 0:
                save_file(at_save, place / "at_save.safetensors")
                save_file(after, place / "after.safetensors")
                (place / "losses.json").write_text(json.dumps(losses))
            run.engine.destroy()
    dist.barrier()


def read(folder: Path, network: str) -> list[dict[str, Any]]:
    """Resume every checkpoint in every way on this number of ranks. Returns a row for each."""
    from safetensors.torch import load_file

    from fastimagen.train import checkpoint, engine_state

    rows = []
    for optimizer in OPTIMIZERS:
        for writer in WRITERS:
            place = folder / optimizer / writer
            saved, at_save, after = (
                place / f"step-{STEPS:08d}",
                load_file(place / "at_save.safetensors"),
                load_file(place / "after.safetensors"),
            )
            undisturbed = json.loads((place / "losses.json").read_text())
            exported = checkpoint.read_average(saved)
            equal = all(weight.equal(at_save[f"ema {name}"]) for name, weight in exported.items())
            for reader, zero in READERS.items():
                run = Run(network, optimizer, zero)
                engine_state.load(saved, run.engine, run.weights, run.ema)
                restored = all(value.equal(at_save[key]) for key, value in run.state().items())
                losses = run.train(range(STEPS + 1, 2 * STEPS + 1))
                distance = {"weights": 0.0, "ema": 0.0}
                for key, value in run.state().items():
                    kind = key.partition(" ")[0]
                    distance[kind] = max(distance[kind], (value - after[key]).abs().max().item())
                rows.append(
                    {
                        "optimizer": optimizer,
                        "written": f"2 ranks, {writer}",
                        "read": f"{dist.get_world_size()} ranks, {reader}",
                        "restored_exactly": restored,
                        "exported_exactly": equal,
                        "loss_difference": largest(losses, undisturbed),
                        "weights_difference": distance["weights"],
                        "ema_difference": distance["ema"],
                    }
                )
                run.engine.destroy()
    return rows


def in_each_process(phase: str, folder: Path, network: str) -> None:
    from fastimagen.train.engine import init_distributed

    init_distributed()
    if phase == "write":
        write(folder, network)
        return
    rows = read(folder, network)
    if dist.get_rank() == 0:
        (folder / f"rows-{dist.get_world_size()}.json").write_text(json.dumps(rows))


def launch(phase: str, folder: Path, network: str, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "tests.drills.resume_anywhere", phase, str(folder), network]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=open(folder / f"{phase}-{world_size}-{rank}.log", "w"),  # noqa: SIM115 - ends with the process
        )
        for rank in range(world_size)
    ]
    if any([process.wait() for process in processes]):
        sys.exit((folder / f"{phase}-{world_size}-0.log").read_text()[-3000:])


def report(network: str, rows: list[dict[str, Any]]) -> bool:
    """Write the result file of the resumes so far; returns whether all passed."""
    import deepspeed

    exact = all(row["restored_exactly"] and row["exported_exactly"] for row in rows)
    passed = exact and all(row["loss_difference"] <= TOLERANCE for row in rows)
    worst = {
        f"loss_difference_{name}": max(row["loss_difference"] for row in rows if row["optimizer"] == name)
        for name in OPTIMIZERS
    }
    about = {
        "date": str(date.today()),
        "network": network,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    about |= {"machine": platform.machine(), "resumes": len(rows), "passed": passed, "all_exact_at_load": exact}
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    (RESULTS / NETWORKS[network][1]).write_text(
        f'{{\n"about": {json.dumps(about | worst)},\n"rows": [\n{lines}\n]\n}}\n'
    )
    print(json.dumps(about | worst), flush=True)
    return passed


def main(network: str = "unet") -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, rows, passed = Path(name), [], True
        launch("write", folder, network, 2)
        for world_size in (1, 2, 4):
            launch("read", folder, network, world_size)
            rows += json.loads((folder / f"rows-{world_size}.json").read_text())
            passed = report(network, rows)
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) == 4:
        in_each_process(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(*sys.argv[1:]))
