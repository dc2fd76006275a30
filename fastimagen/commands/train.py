"""`fastimagen train`, which launch/train.py runs too. Imports without torch, because `--help` needs the flags."""

from __future__ import annotations

import argparse
import os
import sys

from ..files import first_line

OUT_OF_MEMORY = (
    "Reduce train_micro_batch_size_per_gpu and raise gradient_accumulation_steps, or recompute activations with "
    "checkpoint_levels in the stage's unet"
)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: interrupted by a signal, checkpoint saved; rerun the command to resume


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of training."""
    parser.add_argument(
        "--config", "--deepspeed_config", required=True, help="ds.json: DeepSpeed's and fastimagen's keys"
    )
    parser.add_argument("--stage", default="all", help='name of a stage, or "all": one stage after the other')
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the file, e.g. fastimagen.train.stages.base.steps=100",
    )
    parser.add_argument("--run-dir", "--run", help="run directory; by default fastimagen.train.run")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def train(options: argparse.Namespace) -> int:
    """Train as the flags say. Returns the exit status. Raises what `Trainer` raises for what the user can correct."""
    # Idle OpenMP threads sleep instead of spinning: on shared cores, spinning threads made a step six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ..config_file import load_config
    from ..train.trainer import Trainer, TrainingDiverged, TrainingInterrupted

    trainer = Trainer(load_config(options.config, options.overrides), options.run_dir, stage=options.stage)
    if options.dry_run:
        print(trainer.describe())
        return 0
    try:
        trainer.fit()
    except TrainingInterrupted as interrupted:
        print(interrupted, flush=True)
        return EXIT_INTERRUPTED
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise ValueError(f"{first_line(error)} {OUT_OF_MEMORY}") from None
    return 0
