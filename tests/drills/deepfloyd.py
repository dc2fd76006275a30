"""Drill: a toy cascade shaped like DeepFloyd IF learns captioned shapes, a new colour by adapters, and few steps.

    python -m tests.drills.deepfloyd [--out FOLDER]

Everything from nothing: shards, embeddings, training, export, sampling. Two stages, 16x16 and 32x32, with IF's network,
schedule, text encoding and variance (hybrid loss), are trained in full on one object in five colours; purple never
occurs. Then both are trained as adapters on 54 purple images, beside images of the old colours with half the loss
(prior preservation), and a student of the first stage takes 4 steps. The reader of the built-in shapes judges the
images. On one core, about nine minutes; with --out, rerun to resume. The result is in
tests/drills/results/deepfloyd.json, with a grid beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Callable
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
STEPS = {"base16": 1500, "sr32": 2000, "adapters": 200, "student": 200}
RATES = {"full": 2e-3, "adapters": 3e-3, "student": 2e-4}
BATCH, STUDENT_STEPS = 16, 4
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
        "sampling": {"sampler": "dpmpp_2m", "steps": 20, "guidance": 2.0, "threshold": "static"},
        **COMMON,
    },
    {
        "name": "sr32",
        "size": 32,
        "crop": 16,
        "unet": {**NETWORK, "lowres": True, "dims": [32, 64], "attention": [False, True], "residual_divisor": 1.4142},
        "augmentation": {
            "schedule": COMMON["schedule"],
            "train_range": [0.0, 0.5],
            "sample_level": 0.1,
            "resize": "bilinear_corners",
        },
        "sampling": {"sampler": "dpmpp_2m", "steps": 10, "guidance": 1.0, "threshold": "static"},
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
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 50, "total_num_steps": "auto"}},
        "gradient_clipping": 1.0,
        "fastimagen": {
            "cascade": cascade,
            "data": {"shards": shards, "validation": str(data / "val")},
            "text": {"encoder": str(data / "text_encoder"), "encoding": "if", "max_length": TOKENS},
            "train": {
                "stages": stages,
                "ema": {"decay": 0.995},
                "log_every": 50,
                "checkpoint_every": 500,
                "validate_every": 5000,
                "sample_every": 5000,
            },
        },
    }


def train(folder: Path, name: str, tree: dict[str, Any], stage: str, teacher: Path | None = None) -> None:
    """Embed and train; with a teacher, distil."""
    from fastimagen import cli

    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    cli.main(["embed", "--config", str(path)])
    arguments = ["--config", str(path), "--run-dir", str(folder / name), "--stage", stage]
    if teacher is not None:
        arguments += ["--model", str(teacher), "--out", str(folder / "unused"), "--steps", str(STUDENT_STEPS)]
    log = folder / f"{name}.log"
    if forked.finish(forked.start(arguments, log, command="distill" if teacher else "train"), timeout=3600) != [0]:
        raise RuntimeError(log.read_text()[-3000:])


def judge(
    model: Path, colors: tuple[str, ...], seeds: int, lora: Path | None = None
) -> tuple[dict[str, float], Any, list[str]]:
    """Shares of images whose colour, shape and background are right; the images and their captions."""
    from fastimagen import ImagenPipeline
    from fastimagen.evaluation.shape_reader import accuracy, read
    from fastimagen.images import to_uint8

    scenes = [scene(*parts) for parts in product(colors, SHAPES, BACKGROUNDS)] * seeds
    texts = [text_of(item) for item in scenes]
    images = ImagenPipeline.from_pretrained(model, lora=lora)(texts, seeds=range(len(texts))).images
    found = accuracy([read(image) for image in to_uint8(images).numpy()], scenes)["single"]
    shares = {key: round(found[key]["mean"], 3) for key in ("color", "shape", "background")}
    return {"images": len(texts), **shares}, images, texts


def train_all(folder: Path) -> tuple[Path, Path, Path]:
    """The model trained in full, its adapters, and a model whose first stage is a student."""
    from fastimagen.train.export import export, export_adapters

    data = folder / "data"
    if not data.exists():
        write_data(data)
    shards = str(data / "train")
    steps = {name: {"steps": STEPS[name]} for name in ("base16", "sr32")}
    train(folder, "full", configuration(data, shards, {"stages": STAGES}, steps, RATES["full"]), "all")
    full = made(folder / "model", lambda out: export(folder / "full", out))

    mixture = [
        {"name": "new", "shards": str(data / "new"), "weight": 1},
        {"name": "prior", "shards": shards, "weight": 1, "loss_weight": 0.5},
    ]
    names = ("base16", "sr32")  # a second stage that has seen five colours paints purple in these
    cascade = {"model": str(full), "stages": {name: {"objective": {"variance": "frozen"}} for name in names}}
    own = {name: {"steps": STEPS["adapters"], "lora": {"rank": 8}} for name in names}
    train(folder, "adapters", configuration(data, mixture, cascade, own, RATES["adapters"]), "all")
    adapters = made(folder / "adapted", lambda out: export_adapters(folder / "adapters", out))

    own = {"base16": {"steps": STEPS["student"]}}
    tree = configuration(data, shards, {"model": str(full)}, own, RATES["student"])
    train(folder, "student", tree, "base16", teacher=full)
    return full, adapters, made(folder / "few_steps", lambda out: with_student(full, folder / "student", out))


def made(out: Path, make: Callable[[Path], Path]) -> Path:
    """`out`, made if it is not there."""
    return out if out.exists() else make(out)


def with_student(full: Path, run: Path, out: Path) -> Path:
    """The model with a student as its first stage."""
    from fastimagen.train.export import export

    student = export(run, out.with_name("student_model"))
    shutil.copytree(full, out)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(student / "base16" / name, out / "base16" / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep everything in this folder")
    options = parser.parse_args()
    forked.prepare()
    import torch

    from fastimagen.images import grid

    with tempfile.TemporaryDirectory(prefix="fastimagen-deepfloyd-") as name:
        folder = options.out or Path(name)
        folder.mkdir(exist_ok=True)
        full, adapters, few_steps = train_all(folder)
        rows, shown, captions = {}, [], []
        for label, model, lora in (
            ("before", full, None),
            ("with adapters", full, adapters),
            (f"{STUDENT_STEPS} steps", few_steps, None),
        ):
            for kind, colors in (("old colours", OLD), ("new colour", (NEW,))):
                if model == few_steps and colors != OLD:
                    continue
                rows[f"{kind}, {label}"], images, texts = judge(model, colors, 2 if colors == OLD else 5, lora)
                chosen = range(0, 45, 8) if colors == OLD else range(0, 9, 2)
                shown += [images[index] for index in chosen]
                captions += [f"{label}: {texts[index]}" for index in chosen]
                print(kind, label, rows[f"{kind}, {label}"], flush=True)
    grid(torch.stack(shown), captions, columns=6).save(RESULT.with_suffix(".png"))
    result = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "steps": STEPS,
        "batch": BATCH,
        "shares": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
