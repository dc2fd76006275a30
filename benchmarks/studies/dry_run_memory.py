"""The dry run's memory beside measured peaks of training steps on a CPU.

    python -m benchmarks.studies.dry_run_memory [--out benchmarks/results/dry_run_memory.json] [--only REGEX]

Every case runs in processes of its own: a small network first, which loads the libraries, then three steps with EMA of
a U-Net of 14 to 43 million parameters. The peak is that of the resident memory (VmHWM) above what it was between the
two. Large blocks of malloc are mapped one by one (MALLOC_MMAP_THRESHOLD_), so that freed memory leaves the process.
About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastimagen.config import EMAConfig, StageConfig
from fastimagen.network_config import UNetConfig
from fastimagen.networks.parameters import muon_parameters
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.deepspeed_config import resolve_deepspeed
from fastimagen.train.ema import EMA
from fastimagen.train.engine import make_engine
from fastimagen.train.flat_weights import FlatWeights
from fastimagen.train.plan import Target, plan_stage
from fastimagen.train.stage_setup import initial_unet

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}
MIB = 2**20
TOKENS = 64
ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}
MUON = {"type": "Muon", "params": {"muon_lr": 1e-3, "adam_lr": 1e-3}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
UNETS = {
    "regular": UNetConfig(
        text_dim=64, dim=128, dim_mults=(1, 2, 3), num_blocks=2, self_attention=(False, True, True), stem_kernels=(3,)
    ),
    "efficient": UNetConfig(
        text_dim=64, dim=64, dim_mults=(1, 2, 4), num_blocks=(1, 2, 4), self_attention=(False, False, True),
        downsample_first=True, full_resolution="extra_block", stem_kernels=(3,),
    ),
}  # fmt: skip
RECOMPUTING = UNETS["regular"].model_copy(update={"checkpoint_levels": (0, 1, 2)})
CASES: dict[str, tuple[UNetConfig, int, int, int, dict[str, Any]]] = {
    # name: U-Net, side, micro-batch, processes, DeepSpeed's keys
    "ZeRO 1": (UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 2": (UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 2}}),
    "ZeRO 3": (UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 3}}),
    "ZeRO 1, Muon": (UNETS["regular"], 32, 4, 1, {"optimizer": MUON, "zero_optimization": {"stage": 1}}),
    "ZeRO 2, offloaded optimizer": (UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 2, **OFFLOAD}}),
    "ZeRO 1, 2 processes": (UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 1}}),
    "ZeRO 2, 2 processes": (UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 2}}),
    "ZeRO 3, 2 processes": (UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 3}}),
    "ZeRO 1, 16 images": (UNETS["regular"], 32, 16, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 1, 16 images, recomputed": (RECOMPUTING, 32, 16, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 1, Efficient U-Net": (UNETS["efficient"], 64, 8, 1, {"zero_optimization": {"stage": 1}}),
}


def resolved(case: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a case."""
    _, _, micro_batch, processes, keys = CASES[case]
    given = {"train_micro_batch_size_per_gpu": micro_batch, "optimizer": ADAMW, **keys}
    return resolve_deepspeed(given, {}, steps=3, world_size=processes, cuda=False, tensorboard="", job_name="")[0]


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def steps(stage: StageConfig, deepspeed: dict[str, Any]) -> None:
    """Three training steps with EMA."""
    unet = initial_unet(stage, seed=0)
    engine = make_engine(unet, deepspeed, muon_parameters(unet))
    ema = EMA(FlatWeights(engine).shards, EMAConfig())
    batch = deepspeed["train_micro_batch_size_per_gpu"]
    for step in range(3):
        images, noise = (torch.randn(batch, 3, stage.size, stage.size) for _ in range(2))
        text = TextEmbeddings(torch.randn(batch, TOKENS, 64), torch.ones(batch, TOKENS, dtype=torch.bool))
        keep = torch.ones(batch, dtype=torch.bool)
        output = engine(images + noise, 1000 * torch.rand(batch), text=text, keep_text=keep)
        loss = (output.float() - noise).square().flatten(1).mean(1).mean()
        del output
        engine.backward(loss)
        engine.step()
        ema.update(step + 1)


def measure(case: str) -> None:
    """In one of the case's processes: run it, and let process 0 print its peak in bytes."""
    unet, side, *_ = CASES[case]
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29655")
    import deepspeed
    import deepspeed.ops

    torch.compiler.set_stance("force_eager")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    small = UNetConfig(text_dim=64, dim=16, dim_mults=(1, 2), groups=4, heads=1, head_dim=16, stem_kernels=(3,))
    steps(StageConfig(name="small", size=16, unet=small), resolved(case))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    steps(StageConfig(name="case", size=side, unet=unet), resolved(case))
    if dist.get_rank() == 0:
        print(f"peak {status('VmHWM') - before}", flush=True)
    dist.barrier()
    os._exit(0)


def row(case: str) -> dict[str, Any]:
    """A case, planned and measured."""
    unet, side, micro_batch, processes, _ = CASES[case]
    planned = plan_stage(StageConfig(name="case", size=side, unet=unet), resolved(case), 3, Target(processes, "cpu"))
    command = [sys.executable, "-m", __spec__.name, "--measure", case]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_port=29656",
        ]
        command = [*launcher, *command[1:]]
    output = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    found = re.search(r"^peak (\d+)", output, re.M)
    if not found:
        raise RuntimeError(f"{case}: no peak in {output[-2000:]}")
    measured = int(found[1])
    return {
        "case": case,
        "million_parameters": round(planned.parameters / 1e6, 1),
        "micro_batch": micro_batch,
        "planned_mib": round(planned.memory.peak / MIB),
        "measured_mib": round(measured / MIB),
        "difference": round(planned.memory.peak / measured - 1, 3),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        f"| {row['case']} | {row['million_parameters']} M | {row['micro_batch']} | {row['planned_mib']} | "
        f"{row['measured_mib']} | {row['difference']:+.1%} |"
        for row in rows
    ]
    head = "| case | parameters | images per process | dry run, MiB | measured, MiB | difference |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/dry_run_memory.json")
    parser.add_argument("--only", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
    rows = []
    for case in CASES:
        if re.search(options.only, case):
            rows.append(row(case))
            print(rows[-1], flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
