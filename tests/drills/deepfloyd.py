"""Drill: a toy cascade shaped like DeepFloyd IF learns captioned shapes, and then a new colour by adapters.

    python -m tests.drills.deepfloyd [--out FOLDER]

Two stages, 16x16 and 32x32, with IF's network, schedule, text encoding and variance (hybrid loss). They are trained in
full on one object in five colours; purple never occurs. Then the first stage is trained as adapters on 54 purple
images, beside images of the old colours with half the loss (prior preservation). The reader of the built-in shapes
judges the images of both exported cascades. On one core, about five minutes; with --out, rerun to resume. The result is
in tests/drills/results/deepfloyd.json, with a grid beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fastimagen.data.shapes import BACKGROUNDS, Object, Scene, caption, render
from fastimagen.data.tar_writer import write_tars
from tests.conftest import ROOT
from tests.drills import forked

RESULT = ROOT / "tests/drills/results/deepfloyd.json"
OLD, NEW = ("red", "yellow", "green", "cyan", "blue"), "purple"
SHAPES = ("circle", "square", "triangle")
WIDTH, TOKENS = 64, 16
STEPS, BATCH = {"base16": 500, "sr32": 120, "adapters": 150}, 16
SCHEDULE_STEPS = 1000  # the learning rate falls as if training were longer
COMMON: dict[str, Any] = {
    "schedule": {"name": "squaredcos", "timesteps": 1000},
    "objective": {"prediction": "v", "variance": "hybrid"},
}
NETWORK: dict[str, Any] = {
    "kind": "if",
    "text_dim": WIDTH,
    "max_text_length": TOKENS,
    "num_blocks": 1,
    "head_dim": 16,
    "pool_heads": 4,
    "groups": 8,
}
STAGES = [
    {
        "name": "base16",
        "size": 16,
        "unet": {**NETWORK, "dims": [32, 64], "attention": [False, True]},
        "sampling": {"sampler": "dpmpp_2m", "steps": 15, "guidance": 2.0, "threshold": "static"},
        **COMMON,
    },
    {
        "name": "sr32",
        "size": 32,
        "crop": 16,
        "unet": {**NETWORK, "lowres": True, "dims": [16, 32], "attention": [False, True], "residual_divisor": 1.4142},
        "augmentation": {
            "schedule": COMMON["schedule"],
            "train_range": [0.0, 0.5],
            "sample_level": 0.1,
            "resize": "bilinear_corners",
        },
        "sampling": {"sampler": "dpmpp_2m", "steps": 8, "guidance": 1.0, "threshold": "static"},
        **COMMON,
    },
]


def scene(color: str, shape: str, background: str) -> Scene:
    return Scene((Object(color, shape, "large", "center"),), background)


def text_of(item: Scene) -> str:
    """Shorter than the built-in captions: size and place are always the same."""
    return caption(Scene((Object(item.objects[0].color, item.objects[0].shape),), item.background))


def write_data(folder: Path) -> None:
    """Shards of the old colours (train, val) and of the new one; the text encoder knows all the words."""
    from fastimagen.data.shapes import _files
    from fastimagen.text.tiny_t5 import build_tiny_t5

    rng, texts = np.random.default_rng(0), set()

    def samples(colors: tuple[str, ...], repeats: int) -> Any:
        combinations = [*product(colors, SHAPES, BACKGROUNDS)] * repeats
        for index in rng.permutation(len(combinations)):
            item = scene(*combinations[index])
            texts.add(text_of(item))
            yield _files(render(item, 32, rng), text_of(item))

    write_tars(folder / "train", samples(OLD, 40), 1000)
    write_tars(folder / "val", samples(OLD, 2), 1000)
    write_tars(folder / "new", samples((NEW,), 6), 1000)
    (folder / "shapes.json").write_text("{}\n")  # the random text encoder is for shapes alone
    build_tiny_t5(folder / "text_encoder", sorted(texts), dim=WIDTH)


def configuration(
    data: Path, shards: Any, cascade: dict[str, Any], stages: dict[str, Any], lr: float
) -> dict[str, Any]:
    return {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 50, "total_num_steps": SCHEDULE_STEPS}},
        "gradient_clipping": 1.0,
        "fastimagen": {
            "cascade": cascade,
            "data": {"shards": shards, "validation": str(data / "val")},
            "text": {"encoder": str(data / "text_encoder"), "encoding": "if", "max_length": TOKENS},
            "train": {
                "stages": stages,
                "ema": {"decay": 0.995},
                "log_every": 50,
                "checkpoint_every": 1000,
                "validate_every": 1000,
                "sample_every": 1000,
            },
        },
    }


def train(folder: Path, name: str, tree: dict[str, Any], stage: str) -> None:
    """Embed and train."""
    from fastimagen import cli

    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    cli.main(["embed", "--config", str(path)])
    arguments = ["--config", str(path), "--run-dir", str(folder / name), "--stage", stage]
    log = folder / f"{name}.log"
    if forked.finish(forked.start(arguments, log), timeout=1200) != [0]:
        raise RuntimeError(log.read_text()[-3000:])


def judge(model: Path, colors: tuple[str, ...], seeds: int) -> tuple[dict[str, float], Any, list[str]]:
    """Shares of images whose colour, shape and background are right; the images and their captions."""
    from fastimagen import ImagenPipeline
    from fastimagen.evaluation.shape_reader import accuracy, read
    from fastimagen.images import to_uint8

    scenes = [scene(*parts) for parts in product(colors, SHAPES, BACKGROUNDS)] * seeds
    texts = [text_of(item) for item in scenes]
    images = ImagenPipeline.from_pretrained(model)(texts, seeds=range(len(texts))).images
    found = accuracy([read(image) for image in to_uint8(images).numpy()], scenes)["single"]
    shares = {key: round(found[key]["mean"], 3) for key in ("color", "shape", "background")}
    return {"images": len(texts), **shares}, images, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep everything in this folder")
    options = parser.parse_args()
    forked.prepare()
    from fastimagen.images import grid
    from fastimagen.train.export import export

    with tempfile.TemporaryDirectory(prefix="fastimagen-deepfloyd-") as name:
        folder = options.out or Path(name)
        folder.mkdir(exist_ok=True)
        data = folder / "data"
        if not data.exists():
            write_data(data)
        stages = {name: {"steps": STEPS[name]} for name in ("base16", "sr32")}
        tree = configuration(data, str(data / "train"), {"stages": STAGES}, stages, 2e-3)
        train(folder, "full", tree, "all")
        full = export(folder / "full", folder / "model")

        adapters = {"base16": {"steps": STEPS["adapters"], "lora": {"rank": 8}}}
        mixture = [
            {"name": "new", "shards": str(data / "new"), "weight": 1},
            {"name": "prior", "shards": str(data / "train"), "weight": 1, "loss_weight": 0.5},
        ]
        tree = configuration(data, mixture, {"model": str(full)}, adapters, 3e-3)
        tree["fastimagen"]["cascade"]["stages"] = {"base16": {"objective": {"variance": "frozen"}}}
        train(folder, "adapters", tree, "base16")
        adapted = export(folder / "adapters", folder / "adapted")

        rows, shown, captions = {}, [], []
        for label, model in (("before", full), ("after", adapted)):
            for kind, colors in (("old colours", OLD), ("new colour", (NEW,))):
                rows[f"{kind}, {label}"], images, texts = judge(model, colors, 2 if kind == "old colours" else 5)
                chosen = range(0, 45, 8) if kind == "old colours" else range(6)
                shown += [images[index] for index in chosen]
                captions += [f"{label}: {texts[index]}" for index in chosen]
                print(kind, label, rows[f"{kind}, {label}"], flush=True)
    import torch

    grid(torch.stack(shown), captions).save(RESULT.with_suffix(".png"))
    RESULT.write_text(
        json.dumps(
            {
                "date": str(date.today()),
                "torch": torch.__version__,
                "cpu": platform.processor() or platform.machine(),
                "steps": STEPS,
                "batch": BATCH,
                "shares": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
