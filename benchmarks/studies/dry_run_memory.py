"""The dry run's memory beside measured peaks of training steps on a CPU.

    python -m benchmarks.studies.dry_run_memory [--out benchmarks/results/dry_run_memory.json] [--only REGEX]

Every case runs in processes of its own: a small network first, which loads the libraries, then three steps with EMA of
a U-Net of 14 to 49 million parameters. Those of DeepFloyd IF have its loss, hybrid where they are trained in full, and
the empty caption for dropped ones. The peak is that of the resident memory (VmHWM) above what it was between the
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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastimagen.cascade import Stage
from fastimagen.config import AugmentationConfig, EMAConfig, ObjectiveConfig, StageConfig
from fastimagen.network_config import IFUNetConfig, LoraConfig, UNetConfig
from fastimagen.networks.parameters import muon_parameters
from fastimagen.presets import SQUARED_COS, if_base, if_super
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
IF_TEXT = {"max_text_length": TOKENS, "pool_heads": 4}
IF_I = if_base(64, 64).model_copy(update={**IF_TEXT, "checkpoint_levels": (0, 1, 2, 3)})
IF_II = if_super(32, 64).model_copy(update={**IF_TEXT, "checkpoint_levels": (0, 1, 2, 3, 4), "head_dim": 32})
LORA = LoraConfig(rank=16)
SMALL = UNetConfig(text_dim=64, dim=16, dim_mults=(1, 2), groups=4, heads=1, head_dim=16, stem_kernels=(3,))
SMALL_IF = {"dims": (16, 32), "num_blocks": 1, "attention": (False, True), "head_dim": 16, "groups": 8}


class Case(NamedTuple):
    """A network in training on images of `side` pixels, with some of DeepSpeed's keys."""

    unet: UNetConfig | IFUNetConfig
    side: int
    micro_batch: int
    processes: int
    keys: dict[str, Any]
    lora: LoraConfig | None = None

    @property
    def small(self) -> Case:
        """The same with a network of that kind that needs no memory to speak of."""
        if isinstance(self.unet, UNetConfig):
            return self._replace(unet=SMALL, side=16)
        unet = self.unet.model_copy(update={**SMALL_IF, "checkpoint_levels": self.unet.checkpoint_levels[:2]})
        return self._replace(unet=unet, side=16)

    @property
    def stage(self) -> StageConfig:
        if isinstance(self.unet, UNetConfig):
            return StageConfig(name="case", size=self.side, unet=self.unet)
        augmentation = AugmentationConfig(schedule=SQUARED_COS, resize="bilinear_corners")
        return StageConfig(
            name="case",
            size=self.side,
            lowres_size=self.side // 4 if self.unet.lowres else None,
            unet=self.unet,
            schedule=SQUARED_COS,
            objective=ObjectiveConfig(prediction="epsilon", variance="frozen" if self.lora else "hybrid"),
            augmentation=augmentation if self.unet.lowres else None,
        )


CASES = {
    "ZeRO 1": Case(UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 2": Case(UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 2}}),
    "ZeRO 3": Case(UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 3}}),
    "ZeRO 1, Muon": Case(UNETS["regular"], 32, 4, 1, {"optimizer": MUON, "zero_optimization": {"stage": 1}}),
    "ZeRO 2, offloaded optimizer": Case(UNETS["regular"], 32, 4, 1, {"zero_optimization": {"stage": 2, **OFFLOAD}}),
    "ZeRO 1, 2 processes": Case(UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 1}}),
    "ZeRO 2, 2 processes": Case(UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 2}}),
    "ZeRO 3, 2 processes": Case(UNETS["regular"], 32, 4, 2, {"zero_optimization": {"stage": 3}}),
    "ZeRO 1, 16 images": Case(UNETS["regular"], 32, 16, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 1, 16 images, recomputed": Case(RECOMPUTING, 32, 16, 1, {"zero_optimization": {"stage": 1}}),
    "ZeRO 1, Efficient U-Net": Case(UNETS["efficient"], 64, 8, 1, {"zero_optimization": {"stage": 1}}),
    "DeepFloyd IF, ZeRO 2, recomputed": Case(IF_I, 64, 4, 1, {"zero_optimization": {"stage": 2}}),
    "DeepFloyd IF, adapters, recomputed": Case(IF_I, 64, 4, 1, {"zero_optimization": {"stage": 1}}, LORA),
    "DeepFloyd IF II, ZeRO 2, recomputed": Case(IF_II, 128, 2, 1, {"zero_optimization": {"stage": 2}}),
    "DeepFloyd IF II, adapters, recomputed": Case(IF_II, 128, 1, 1, {"zero_optimization": {"stage": 1}}, LORA),
}


def resolved(case: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a case."""
    own = CASES[case]
    given = {"train_micro_batch_size_per_gpu": own.micro_batch, "optimizer": ADAMW, **own.keys}
    return resolve_deepspeed(given, {}, steps=3, world_size=own.processes, cuda=False, tensorboard="", job_name="")[0]


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def steps(stage: StageConfig, deepspeed: dict[str, Any], lora: LoraConfig | None = None) -> None:
    """Three training steps with EMA."""
    unet = initial_unet(stage, seed=0, lora=lora)
    engine = make_engine(unet, deepspeed, muon_parameters(unet))
    ema = EMA(FlatWeights(engine).shards, EMAConfig())
    batch = deepspeed["train_micro_batch_size_per_gpu"]
    for step in range(3):
        images, noise = (torch.randn(batch, 3, stage.size, stage.size) for _ in range(2))
        text = TextEmbeddings(torch.randn(batch, TOKENS, 64), torch.ones(batch, TOKENS, dtype=torch.bool))
        if stage.unet.has_null_text:
            keep = torch.ones(batch, dtype=torch.bool)
            output = engine(images + noise, 1000 * torch.rand(batch), text=text, keep_text=keep)
            loss = (output.float() - noise).square().flatten(1).mean(1).mean()
            del output
        else:
            own = Stage(stage, empty_text=text[:1])
            loss = own.training_loss(engine, images, text, own.draw(0, range(step * batch, (step + 1) * batch), images))
            loss = loss.mean()
        engine.backward(loss)
        engine.step()
        ema.update(step + 1)


def measure(case: str) -> None:
    """In one of the case's processes: run it, and let process 0 print its peak in bytes."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29655")
    import deepspeed
    import deepspeed.ops

    torch.compiler.set_stance("force_eager")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    steps(CASES[case].small.stage, resolved(case), CASES[case].lora)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    steps(CASES[case].stage, resolved(case), CASES[case].lora)
    if dist.get_rank() == 0:
        print(f"peak {status('VmHWM') - before}", flush=True)
    dist.barrier()
    os._exit(0)


def row(case: str) -> dict[str, Any]:
    """A case, planned and measured."""
    own = CASES[case]
    planned = plan_stage(own.stage, resolved(case), 3, Target(own.processes, "cpu"), own.lora)
    command = [sys.executable, "-m", __spec__.name, "--measure", case]
    if own.processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={own.processes}",
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
        "micro_batch": own.micro_batch,
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
    parser.add_argument(
        "--only", default="", help="regular expression that a case's name must contain; keeps the others"
    )
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
    rows = []
    kept = json.loads(options.out.read_text())["rows"] if options.only and options.out.exists() else []
    for case in CASES:
        if re.search(options.only, case):
            rows.append(row(case))
            print(rows[-1], flush=True)
        else:
            rows += [found for found in kept if found["case"] == case]
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
