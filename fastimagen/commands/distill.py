"""`fastimagen distill`: a few-step student of a trained model. Imports without torch: `--help` needs the flags."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..config import Config, DistillConfig
from ..config_file import load_config, validate
from ..files import require_empty
from . import train as training

if TYPE_CHECKING:
    from ..train.trainer import Trainer

METHOD = DistillConfig.model_fields["method"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of distillation: its own, and those of training."""
    own = parser.add_argument_group("distillation")
    own.add_argument("--model", required=True, help="model directory of the teacher")
    own.add_argument("--out", type=Path, required=True, help="new model directory of the student")
    own.add_argument(
        "--steps", metavar="INT", help="steps of the student, or base=4,sr=2 (default: 4, and 2 for super-resolution)"
    )
    own.add_argument(
        "--method",
        choices=get_args(METHOD.annotation),
        help=f"who leads to the end of a student's step (default: {METHOD.default}, or what the file says)",
    )
    training.add_flags(parser)


def distill(options: argparse.Namespace) -> int:
    """Distill as the flags say, and export the student. Returns the exit status."""
    require_empty(options.out)
    status = training.train(options, student_trainer)
    if status == 0 and not options.dry_run and options.stage == "all" and int(os.environ.get("RANK", "0")) == 0:
        from ..train.export import export

        print(export(run_directory(options), options.out, say=print), flush=True)
    return status


def run_directory(options: argparse.Namespace) -> Path:
    """--run-dir, or a folder of the student's name in runs/."""
    return Path(options.run_dir or Path("runs") / options.out.resolve().name)


def student_trainer(options: argparse.Namespace, overrides: list[str]) -> Trainer:
    """The trainer of the students. Raises ValueError for a teacher that the configuration does not fit."""
    from ..train.trainer import Trainer

    teacher = f"fastimagen.train.distill.model={json.dumps(options.model)}"  # before the keys that --set adds to it
    config = student_config(load_config(options.config, [teacher, *overrides]), options)
    return Trainer(config, run_directory(options), stage=options.stage)


def student_config(config: Config, options: argparse.Namespace) -> Config:
    """The configuration with the students' cascade in place of its own, their initial weights and their teacher."""
    from ..sampling.model_directory import read_cascade
    from ..train.distillation import check_text_encoder, student_cascade

    teacher, index = read_cascade(options.model)
    cascade = student_cascade(teacher, _steps(options.steps))
    ours = config.fastimagen
    check_text_encoder(index.get("text_encoder"), options.model, ours.text)
    given = {} if ours.train.distill is None else ours.train.distill.model_dump()
    method = {} if options.method is None else {"method": options.method}
    train = ours.train.model_dump(mode="json") | {"distill": {**given, "model": options.model, **method}}
    stages = train["stages"]
    for stage in cascade.stages:
        stages[stage.name] = {"init_from": options.model} | {
            key: value for key, value in stages.get(stage.name, {}).items() if value is not None
        }
    changed = ours.model_dump(mode="json") | {"cascade": cascade.model_dump(mode="json"), "train": train}
    return config.model_copy(update={"fastimagen": validate(type(ours), changed, "fastimagen")})


def _steps(text: str | None) -> int | dict[str, int] | None:
    """The steps of --steps. Raises ValueError for anything but numbers from 1."""
    if text is None:
        return None
    stages = [part.strip().partition("=") for part in text.split(",")]
    if "=" not in text:
        stages = [("", "=", text.strip())]
    for _, _, number in stages:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--steps: give a number of steps, or base=4,sr=2 (given: {text!r})")
    return {name: int(number) for name, _, number in stages} if "=" in text else int(stages[0][2])
