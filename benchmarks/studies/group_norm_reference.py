"""A whole training step on the CPU with ops.group_norm_silu against nn.GroupNorm, FiLM and SiLU written by hand.

    python -m benchmarks.studies.group_norm_reference [--repeats 20] [--out
    benchmarks/results/cpu/group_norm_reference.json]

Steps of the two alternate, and processor time of the one thread counts, so that other work on the machine matters
little. A ratio below 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen.config import UNetConfig
from fastimagen.networks.layers import GroupNormSiLU
from fastimagen.networks.unet import UNet
from fastimagen.presets import minimagen_base_test, minimagen_super_test, shapes

OUT = Path(__file__).parents[1] / "results/cpu/group_norm_reference.json"


def by_hand(self: GroupNormSiLU, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """What anybody would write."""
    x = F.group_norm(x, self.groups, self.weight, self.bias)  # nn.GroupNorm's forward
    if scale is not None:
        x = x * (scale[:, :, None, None] + 1) + shift[:, :, None, None]
    return F.silu(x)


def networks() -> dict[str, tuple[UNetConfig, int]]:
    """Configuration and side of the images it trains on."""
    base, super_resolution = (stage.unet for stage in shapes().stages)
    wide = minimagen_base_test().model_copy(update={"dim": 32})
    return {
        "minimagen-test base": (minimagen_base_test(), 64),
        "minimagen-test super": (minimagen_super_test(), 64),
        "minimagen-test base, 4x as wide": (wide, 32),
        "shapes base": (base, 32),
        "shapes sr": (super_resolution, 32),
    }


def step(unet: UNet, side: int, batch: int = 4) -> Callable[[], None]:
    """A training step without text: forward, backward."""
    x, target, time_ = torch.randn(batch, 3, side, side), torch.randn(batch, 3, side, side), torch.rand(batch) * 1000
    low = dict(lowres=x.clone(), lowres_time=time_) if unet.config.lowres else {}

    def run() -> None:
        unet.zero_grad()
        F.mse_loss(unet(x, time_, **low), target).backward()

    return run


def compare(config: UNetConfig, side: int, repeats: int) -> dict[str, float]:
    run = step(UNet(config), side)
    seconds: dict[str, list[float]] = {"ours": [], "by_hand": []}
    forward = {"ours": GroupNormSiLU.forward, "by_hand": by_hand}
    try:
        for repeat in range(repeats + 2):  # two to warm up
            for name in sorted(seconds, reverse=bool(repeat % 2)):
                GroupNormSiLU.forward = forward[name]
                start = time.process_time()
                run()
                if repeat >= 2:
                    seconds[name].append(time.process_time() - start)
    finally:
        GroupNormSiLU.forward = forward["ours"]
    ratios = sorted(ours / hand for ours, hand in zip(*seconds.values()))
    return {f"{name}_ms": round(1000 * statistics.mean(times), 2) for name, times in seconds.items()} | {
        "ratio_of_means": round(statistics.mean(seconds["ours"]) / statistics.mean(seconds["by_hand"]), 3),
        "ratio_p20": round(ratios[repeats // 5], 3),
        "ratio_p50": round(ratios[repeats // 2], 3),
        "ratio_p80": round(ratios[repeats * 4 // 5], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (config, side) in networks().items():
        rows.append({"network": name, "side": side} | compare(config, side, options.repeats))
        print(rows[-1], flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    about = json.dumps(
        {
            "op": "group_norm_silu",
            "mode": "training step",
            "unit": "ms of processor time",
            "repeats": options.repeats,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": str(date.today()),
        }
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(f'{{"about": {about}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
