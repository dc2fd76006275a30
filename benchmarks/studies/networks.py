"""Parameters and FLOPs of the stages of presets, counted from the networks; nothing is computed.

    python -m benchmarks.studies.networks

Writes benchmarks/results/networks.json, from which `make report` makes the table of docs/networks.md. With T5-XXL's
embeddings and 64 text tokens, or 77 of DeepFloyd IF; a stage that trains on crops is counted on one.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from fastimagen.config import StageConfig
from fastimagen.networks.build import build_network
from fastimagen.presets import PRESETS
from fastimagen.train.flops import stage_flops

from ..harness.rows import RESULTS, today

OUT = RESULTS / "networks.json"
STAGES = (
    ("paper", "base64"),
    ("if-xl", "base64"),
    ("jit-b", "base256"),
    ("jit-l", "base256"),
    ("jit-h", "base256"),
    ("paper", "sr256"),
    ("if-xl", "sr256"),
    ("paper", "sr1024"),
    ("jit-1024", "sr1024"),
)


def row(preset: str, stage: StageConfig) -> dict[str, Any]:
    """What a stage is, and what it costs."""
    with torch.device("meta"):
        network = build_network(stage.unet)
    flops = stage_flops(stage)
    return {
        "preset": preset,
        "stage": stage.name,
        "kind": stage.unet.kind,
        "size": stage.size,
        "trains_on": stage.crop or stage.size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "forward": flops.forward,
        "training": flops.training,
    }


def main() -> None:
    rows = [row(preset, PRESETS[preset]().stage(name)) for preset, name in STAGES]
    about = {"command": "python -m benchmarks.studies.networks", "torch": torch.__version__, "date": today()}
    lines = ",\n".join(json.dumps(found) for found in rows)
    OUT.write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
