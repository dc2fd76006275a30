"""How well images match the captions of the built-in shapes; shape_reader.py reads the pixels without a network."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.shapes import caption, scene
from ..files import require_empty, write_json
from ..images import grid, to_uint8
from ..sampling.pipeline import ImagenPipeline
from .shape_reader import accuracy

MAX_GRID_IMAGES = 64  # of each split, in its grid


def evaluate_shapes(
    pipe: ImagenPipeline, *, count: int = 200, seed: int = 0, out: Path | None = None, **sampling: Any
) -> dict[str, Any]:
    """Sample the first `count` captions of the test splits "seen" and "unseen", and read the images' attributes.

    Seeds are seed, seed + 1, ...; `sampling` are keywords of the pipeline. Returns {"accuracy": {split: {"single",
    "pair"}}, "sampling_seconds", "versions", ...} and, with `out`, writes it to report.json, with a grid of each split.
    Raises ValueError if `out` is not empty, `count` is below 1 or the model draws grey images.
    """
    if pipe.cascade.config.channels != 3:
        raise ValueError("evaluate reads the colours of the built-in shapes, but this model draws grey images")
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
            grid(images[:MAX_GRID_IMAGES], captions[:MAX_GRID_IMAGES]).save(out / f"{split}.png")
    report["sampling_seconds"] = round(time.perf_counter() - began, 1)
    report["versions"] = {"fastimagen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if out is not None:
        write_json(out / "report.json", report)
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
