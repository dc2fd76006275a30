"""How long a save of the quickstart's stages holds up training, on one and two CPU processes.

    python -m benchmarks.studies.checkpoint_pause

Prints and writes benchmarks/results/checkpoint_pause.json: for each stage and number of processes the median of SAVES
saves of `pause_ms` (the call in the training loop), `copy_ms` (copying the same tensors once more) and `complete_ms`
(until the checkpoint has its name), and `before_ms`: the pause at revision 9a74bbc, where DeepSpeed wrote the files and
the EMA weights were gathered, on the same machine and day.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/checkpoint_pause.json"
SAVES = 7
BEFORE_MS = {("base", 1): 168.0, ("sr", 1): 124.1, ("base", 2): 116.7, ("sr", 2): 103.8}


def measure(folder: Path) -> list[dict[str, Any]]:
    """A row for each stage, on every rank. The optimizer has taken a step, so that it has its state."""
    from fastimagen.config import EMAConfig
    from fastimagen.networks.parameters import muon_parameters
    from fastimagen.presets import resolve
    from fastimagen.text.embeddings import TextEmbeddings
    from fastimagen.train.checkpoint_writer import CheckpointWriter
    from fastimagen.train.deepspeed_config import resolve_deepspeed
    from fastimagen.train.ema import EMA
    from fastimagen.train.engine import init_distributed, make_engine
    from fastimagen.train.engine_state import take
    from fastimagen.train.flat_weights import FlatWeights
    from fastimagen.train.stage_setup import initial_unet

    init_distributed()
    keys = json.loads((ROOT / "ds.json").read_text())
    del keys["fastimagen"], keys["tensorboard"]
    rows = []
    for stage in resolve("shapes").stages:
        config, _ = resolve_deepspeed(
            keys, {}, steps=10, world_size=dist.get_world_size(), cuda=False, tensorboard="", job_name=""
        )
        unet = initial_unet(stage, seed=0)
        engine = make_engine(unet, config, muon_parameters(unet))
        weights = FlatWeights(engine)
        ema = EMA(weights.shards, EMAConfig())
        side = stage.size
        text = TextEmbeddings(torch.randn(2, 5, stage.unet.text_dim or 1), torch.ones(2, 5, dtype=torch.bool))
        lowres = {"lowres": torch.randn(2, 3, side, side), "lowres_time": torch.tensor([3.0, 4.0])}
        inputs = (torch.randn(2, 3, side, side), torch.tensor([3.0, 500.0]))
        for _ in range(config["gradient_accumulation_steps"]):
            engine.backward(engine(*inputs, text=text, **(lowres if stage.unet.lowres else {})).square().mean())
            engine.step()
        saver = CheckpointWriter(folder / f"{stage.name}-{dist.get_world_size()}", "study", keep=2, keep_every=None)
        times: dict[str, list[float]] = {"pause_ms": [], "copy_ms": [], "complete_ms": []}
        buffers = [torch.empty_like(quantity.values) for quantity in take(engine, weights, ema)]
        for step in range(1, SAVES + 1):
            dist.barrier()
            began = time.perf_counter()
            for buffer, quantity in zip(buffers, take(engine, weights, ema)):
                buffer.copy_(quantity.values)
            copied = time.perf_counter()
            saver.save(engine, weights, ema, {"step": step})
            saved = time.perf_counter()
            saver.finish()
            times["copy_ms"].append(1e3 * (copied - began))
            times["pause_ms"].append(1e3 * (saved - copied))
            times["complete_ms"].append(1e3 * (time.perf_counter() - copied))
        row: dict[str, Any] = {"stage": stage.name, "processes": dist.get_world_size()}
        row["parameters"] = sum(weight.numel() for weight in unet.parameters())
        row |= {key: round(statistics.median(values), 2) for key, values in times.items()}
        rows.append(row | {"before_ms": BEFORE_MS[stage.name, dist.get_world_size()]})
        engine.destroy()
    return rows


def main() -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.studies.checkpoint_pause", folder],
                    cwd=ROOT,
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                for rank in range(world_size)
            ]
            outputs = [process.communicate()[0] for process in processes]
            rows += json.loads(outputs[0].splitlines()[-1])
    about = {"date": str(date.today()), "device": "cpu", "cores": os.cpu_count(), "torch": torch.__version__}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RESULT.write_text(f'{{\n"about": {json.dumps(about)},\n"rows": [\n{lines}\n]\n}}\n')
    print(lines)
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]))), flush=True)
    else:
        sys.exit(main())
