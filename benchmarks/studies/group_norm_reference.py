"""A whole training step on the CPU with ops.group_norm_silu against nn.GroupNorm, FiLM and SiLU written by hand.

    python -m benchmarks.studies.group_norm_reference [--seconds 20] [--out FILE]

Steps of the two alternate, and the CPU seconds of the one thread count. A ratio below 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastimagen import ops
from fastimagen.network_config import UNetConfig
from fastimagen.networks.unet import UNet
from fastimagen.presets import minimagen_base_test, minimagen_super_test, shapes

from ..harness.checkout import ROOT
from ..harness.rows import today
from ..harness.timing import Work, time_interleaved

OUT = ROOT / "benchmarks/results/cpu/group_norm_reference.json"
OURS = {"group_norm_silu": ops.group_norm_silu, "group_norm_silu_residual": ops.group_norm_silu_residual}


def by_hand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """What anybody would write."""
    if x_bias is not None:
        x = x + x_bias[:, None, None]
    x = F.group_norm(x, num_groups, weight, bias)  # nn.GroupNorm's forward
    if scale is not None and shift is not None:
        x = x * (scale[:, :, None, None] + 1) + shift[:, :, None, None]
    return F.silu(x)


def by_hand_residual(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *, skip: Tensor | None = None, skip_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    both = x if skip is None else torch.cat([x, skip * skip_scale], dim=1)  # (B, C, H, W)
    return by_hand(both, weight, bias, num_groups), x, skip


BY_HAND = {"group_norm_silu": by_hand, "group_norm_silu_residual": by_hand_residual}


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


def step(unet: UNet, side: int, batch: int = 4) -> Callable[[object], None]:
    """A training step without text: forward, backward."""
    x, target, time = torch.randn(batch, 3, side, side), torch.randn(batch, 3, side, side), torch.rand(batch) * 1000
    low = dict(lowres=x.clone(), lowres_time=time) if unet.config.lowres else {}

    def run(_: object) -> None:
        unet.zero_grad()
        F.mse_loss(unet(x, time, **low), target).backward()

    return run


def use(functions: dict[str, Callable]) -> None:
    """Let the networks, which look the ops up at each call, use these."""
    for name, function in functions.items():
        setattr(ops, name, function)


def compare(config: UNetConfig, side: int, seconds: float) -> dict[str, Any]:
    run = step(UNet(config), side)
    works = {"ours": Work(run, partial(use, OURS)), "by_hand": Work(run, partial(use, BY_HAND))}
    try:
        times = time_interleaved(works, seconds=seconds)
    finally:
        use(OURS)
    percentiles = {f"{name}_ms": [round(ms, 2) for ms in found[:3]] for name, found in times.items()}
    return percentiles | {"ratio_of_medians": round(times["ours"].p50 / times["by_hand"].p50, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each network (20)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (config, side) in networks().items():
        rows.append({"network": name, "side": side} | compare(config, side, options.seconds))
        print(rows[-1], flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    about = {
        "op": "group_norm_silu",
        "mode": "training step",
        "unit": "ms of CPU time: p20, p50, p80",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": today(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
