"""How good few steps are: a teacher and its students on open captions, and guidance at some noise levels only.

    python -m benchmarks.studies.few_steps --model MODEL --students DIR... --out benchmarks/results/cpu/few_steps.json

Students are model directories that `fastimagen distill` wrote from MODEL; docs/distillation.md has the commands. All
sample the same open captions of the built-in shapes (size or position unnamed) with two seeds each. A row has the share
of captions that the reader finds right in the images, the distance between two seeds of a caption, and the network
evaluations of an image. Rows that the result file has already are kept: rerun to resume. Draws the plot, prints tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastimagen import ImagenPipeline, __version__
from fastimagen.data.shapes import caption, open_image, open_scene
from fastimagen.evaluation.appearance import distance
from fastimagen.evaluation.shape_reader import accuracy, read
from fastimagen.files import write_json
from fastimagen.images import to_uint8

from ..harness.checkout import ROOT
from ..harness.svg import COLORS, page, text

STEPS = (1, 2, 4, 8)
RANGES = ((0.1, 1000.0), (1.0, 1000.0), (5.0, 1000.0), (0.1, 20.0), (0.1, 5.0))
"""Noise levels sigma / alpha between which guidance acts."""


def measure(pipe: ImagenPipeline, count: int, **settings: Any) -> dict[str, Any]:
    """Figures of `count` open captions, two seeds each; settings are keywords of the pipeline."""
    rows = {name: 0 for name in pipe.cascade.unets}

    def counter(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] += len(inputs[0])

        return hook

    hooks = [unet.register_forward_pre_hook(counter(name)) for name, unet in pipe.cascade.unets.items()]
    scenes = [open_scene(index) for index in range(count)]
    captions = [caption(scene) for scene in scenes]
    began = time.process_time()
    first, second = (pipe(captions, seeds=range(start, start + count), **settings).images for start in (0, count))
    seconds = time.process_time() - began
    for hook in hooks:
        hook.remove()
    pixels, others = to_uint8(first).numpy(), to_uint8(second).numpy()
    figures = accuracy([read(image) for image in pixels], scenes)["single"]
    return {
        "right": figures["caption"],
        "one object": figures["number"],
        "two seeds": distance(pixels, others),
        "evaluations": {name: number / (2 * count) for name, number in rows.items() if number},
        "cpu_ms_per_image": 1000 * seconds / (2 * count),
    }


def true_distance(count: int, size: int) -> dict[str, float]:
    """The distance between two true images of a caption."""
    first, second = (
        torch.stack([torch.from_numpy(open_image(index, which, size=size)) for index in range(count)]).numpy()
        for which in (0, 1)
    )
    return distance(first, second)


def cases(model: str, students: list[str]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(table, name, model directory, settings) of every row."""
    found: list[tuple[str, str, str, dict[str, Any]]] = [("steps", "teacher, its own", model, {})]
    found += [("steps", f"teacher, {steps}", model, {"steps": steps}) for steps in STEPS]
    found += [("steps", f"student {Path(student).name}", student, {}) for student in students]
    found += [("guidance", "all noise levels", model, {}), ("guidance", "none", model, {"guidance": 1.0})]
    found += [("guidance", f"{low:g}:{high:g}", model, {"guidance_range": [low, high]}) for low, high in RANGES]
    return found


def number(figure: dict[str, float], scale: float, digits: int) -> str:
    return f"{scale * figure['mean']:.{digits}f} ± {scale * figure['error']:.{digits}f}"


def table(rows: list[dict[str, Any]], name: str) -> str:
    """The rows of one table in Markdown."""
    lines = [
        "| | evaluations | caption right, % | one object, % | two seeds differ by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["table"] == name:
            evaluations = " + ".join(f"{value:g}" for value in row["evaluations"].values())
            lines.append(
                f"| {row['name']} | {evaluations} | {number(row['right'], 100, 1)} | "
                f"{number(row['one object'], 100, 1)} | {number(row['two seeds'], 1, 3)} |"
            )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> str:
    """Captions that are right against evaluations of the first stage, as SVG."""
    left, top, width, height = 70, 40, 460, 300
    parts = []

    def place(row: dict[str, Any]) -> tuple[float, float]:
        evaluations = next(iter(row["evaluations"].values()))
        across = torch.tensor(evaluations).log2().item() / 6  # 1 to 64 evaluations
        return left + across * width, top + height * (1 - row["right"]["mean"])

    for percent in range(0, 101, 20):
        y = top + height * (1 - percent / 100)
        parts.append(f'<path d="M{left} {y:.1f}H{left + width}" stroke="#ddd"/>')
        parts.append(text(left - 8, y + 4, f"{percent} %", anchor="end"))
    for power in range(7):
        x = left + power / 6 * width
        parts.append(f'<path d="M{x:.1f} {top}V{top + height}" stroke="#ddd"/>')
        parts.append(text(x, top + height + 18, f"{2**power}", anchor="middle"))
    parts.append(text(left + width / 2, top + height + 40, "network evaluations of the first stage", anchor="middle"))
    own = [row for row in rows if row["table"] == "steps"]
    for color, kind in zip(COLORS, ("teacher", "student")):
        points = sorted((place(row), row) for row in own if row["name"].startswith(kind))
        spots = [spot for spot, _ in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), row in points:
            error = height * row["right"]["error"]
            parts += [
                f'<path d="M{x:.1f} {y - error:.1f}V{y + error:.1f}" stroke="{color}"/>',
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>',
            ]
        if spots:
            parts.append(text(spots[-1][0] + 6, spots[-1][1] + 18, kind, color=color))
    return page("Open captions that are right, with standard errors", parts, width=640)


def main() -> None:
    parser = argparse.ArgumentParser(description="a teacher, its students, and guidance at some noise levels")
    parser.add_argument("--model", required=True, help="model directory of the teacher, trained on the built-in shapes")
    parser.add_argument("--students", nargs="*", default=[], help="model directories of its students")
    parser.add_argument("--count", type=int, default=300, help="open captions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu/few_steps.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/few_steps.svg")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    done = {(row["table"], row["name"]) for row in result["rows"]}
    pipes: dict[str, ImagenPipeline] = {}
    for group, name, model, settings in cases(options.model, options.students):
        if (group, name) in done:
            continue
        pipe = pipes.setdefault(model, ImagenPipeline.from_pretrained(model))
        figures = measure(pipe, options.count, **settings)
        result["rows"].append({"table": group, "name": name, **figures})
        size = pipe.cascade.config.stages[-1].size
        result |= {"count": options.count, "size": size, "true two seeds": true_distance(options.count, size)}
        result |= {
            "versions": {"fastimagen": __version__, "torch": torch.__version__},
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json(options.out, result)
        print(f"{group}, {name}: {100 * figures['right']['mean']:.1f} %", flush=True)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    options.plot.write_text(draw(result["rows"]))
    for group in ("steps", "guidance"):
        print(f"\n{table(result['rows'], group)}")
    print(f"\ntwo true images of a caption differ by {number(result['true two seeds'], 1, 3)}")


if __name__ == "__main__":
    main()
