"""How well images match their captions: the attributes of captioned shapes, read back out of the pixels.

No network is involved (shape_reader.py), so the figures cannot be flattered by a judge that knows the model.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.shapes import caption, scene
from ..files import require_empty
from ..images import grid, to_uint8
from ..sampling.pipeline import ImagenPipeline
from .shape_reader import accuracy

GRID = 64  # images of a split shown in its grid


def evaluate_shapes(
    pipe: ImagenPipeline, *, count: int = 200, seed: int = 0, out: Path | None = None, **sampling: Any
) -> dict[str, Any]:
    """Sample the first `count` captions of the test splits "seen" and "unseen" and read the images.

    Seeds are seed, seed + 1, ...; `sampling` goes to the pipeline. Returns {"accuracy": {split: {"single", "pair"}},
    "sampling_seconds", "versions", ...}; with `out`, also writes it as report.json with a grid per split there. Raises
    ValueError if `out` is not empty or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if out is not None:
        require_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"model": pipe.source, "count": count, "seed": seed, "accuracy": {}}
    began = time.perf_counter()
    for split in ("seen", "unseen"):
        scenes = [scene(split, index) for index in range(count)]
        captions = [caption(item) for item in scenes]
        images = pipe(captions, seeds=range(seed, seed + count), **sampling).images
        report["accuracy"][split] = accuracy(to_uint8(images).numpy(), scenes)
        if out is not None:
            grid(images[:GRID], captions[:GRID]).save(out / f"{split}.png")
    report["sampling_seconds"] = round(time.perf_counter() - began, 1)
    report["versions"] = {"fastimagen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if out is not None:
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def table(report: dict[str, Any]) -> str:
    """The accuracies as lines of text, in percent with standard errors."""
    lines = []
    for split, kinds in report["accuracy"].items():
        for kind, figures in kinds.items():
            rows = ", ".join(
                f"{name} {100 * value['mean']:.1f} ± {100 * value['error']:.1f}"
                for name, value in figures.items()
                if isinstance(value, dict)
            )
            lines.append(f"{split} {kind} ({figures['count']} captions, %): {rows}")
    return "\n".join(lines)
