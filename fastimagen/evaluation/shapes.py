"""How well images match the captions of the built-in shapes; shape_reader.py reads the pixels without a network."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.shapes import Scene, caption, open_image, open_scene, sample, scene
from ..files import require_empty, write_json
from ..images import grid, to_uint8
from ..sampling.pipeline import ImagenPipeline
from .appearance import background_error, contrast, distance, outline_margins
from .shape_reader import accuracy, read

MAX_GRID_IMAGES = 64  # of each split, in its grid

SPLITS: dict[str, tuple[Callable[[int], Scene], Callable[[int, int], np.ndarray]]] = {
    "seen": (lambda index: scene("seen", index), lambda index, size: sample("seen", index, size=size)[0]),
    "unseen": (lambda index: scene("unseen", index), lambda index, size: sample("unseen", index, size=size)[0]),
    "open": (open_scene, lambda index, size: open_image(index, 0, size=size)),
}
"""Scene and true image, by number, of every split. The captions of "open" leave size, position or both open."""


def evaluate_shapes(
    pipe: ImagenPipeline, *, count: int = 200, seed: int = 0, out: Path | None = None, **sampling: Any
) -> dict[str, Any]:
    """Sample the first `count` captions of the splits "seen", "unseen" and "open", and judge the images.

    Seeds are seed, seed + 1, ...; `sampling` are keywords of the pipeline. Returns {"accuracy": {split: {"single",
    "pair"}}, "appearance": {split: ...}, "diversity", "sampling_seconds", "versions", ...}, all figures with standard
    errors, and with `out` writes it to report.json, with a grid of each split. "diversity" compares the images of two
    seeds of each open caption. Raises ValueError if `out` is not empty, `count` is below 1 or the model draws grey
    images.
    """
    if pipe.cascade.config.channels != 3:
        raise ValueError("evaluate reads the colours of the built-in shapes, but this model draws grey images")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if out is not None:
        require_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"model": pipe.source, "count": count, "seed": seed, "accuracy": {}, "appearance": {}}
    began = time.perf_counter()
    for split, (scene_of, true_image) in SPLITS.items():
        scenes = [scene_of(index) for index in range(count)]
        captions = [caption(item) for item in scenes]
        images = pipe(captions, seeds=range(seed, seed + count), **sampling).images  # (count, 3, size, size)
        pixels = _pixels(images)
        true = np.stack([true_image(index, pixels.shape[1]) for index in range(count)])
        readings, true_readings = ([read(image) for image in group] for group in (pixels, true))
        report["accuracy"][split] = accuracy(readings, scenes)
        report["appearance"][split] = {
            "contrast": contrast(pixels, true),
            "background_error": background_error(readings, scenes),
            "outline_margins": outline_margins(readings, scenes),
            "true_outline_margins": outline_margins(true_readings, scenes),
        }
        if split == "open":
            others = pipe(captions, seeds=range(seed + count, seed + 2 * count), **sampling).images
            true_others = np.stack([open_image(index, 1, size=pixels.shape[1]) for index in range(count)])
            report["diversity"] = {
                "distance": distance(pixels, _pixels(others)),
                "true_distance": distance(true, true_others),
            }
            images = torch.stack([images, others], dim=1).flatten(0, 1)  # (2 count, 3, size, size), pairs of a caption
            captions = [text for text in captions for _ in range(2)]
        if out is not None:
            grid(images[:MAX_GRID_IMAGES], captions[:MAX_GRID_IMAGES]).save(out / f"{split}.png")
    report["sampling_seconds"] = round(time.perf_counter() - began, 1)
    report["versions"] = {"fastimagen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if out is not None:
        write_json(out / "report.json", report)
    return report


def _pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] as (B, H, W, 3) uint8."""
    return to_uint8(images).numpy()


def table(report: dict[str, Any]) -> str:
    """The figures as lines of text, with standard errors."""
    lines = []
    for split, kinds in report["accuracy"].items():
        for kind, figures in kinds.items():
            rows = ", ".join(
                f"{name} {100 * value['mean']:.1f} ± {100 * value['error']:.1f}"
                for name, value in figures.items()
                if isinstance(value, dict)
            )
            lines.append(f"{split} {kind} ({figures['count']} captions, %): {rows}")
    for split, figures in report["appearance"].items():
        margins, true_margins = figures["outline_margins"], figures["true_outline_margins"]
        lines.append(
            f"{split} appearance: contrast {_percent(figures['contrast'])} % of the true images', "
            f"background off by {_number(figures['background_error'], 1)} of 255, "
            f"outline margin {_number(margins['all'], 2)} (true images {_number(true_margins['all'], 2)}), "
            f"of circles {_number(margins['circle'], 2) if 'circle' in margins else 'none'}"
        )
    ours, true = report["diversity"]["distance"], report["diversity"]["true_distance"]
    lines.append(f"open diversity: two seeds differ by {_number(ours, 3)} (RMS), two true images by {_number(true, 3)}")
    return "\n".join(lines)


def _number(figure: dict[str, float], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} ± {figure['error']:.{digits}f}"


def _percent(figure: dict[str, float]) -> str:
    return _number({name: 100 * figure[name] for name in ("mean", "error")}, 1)
