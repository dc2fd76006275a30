"""`fastimagen train`, which launch/train.py runs too. Imports without torch, because `--help` needs the flags."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from ..files import first_line
from ..train.exit_status import EXIT_INTERRUPTED, EXIT_LOST, record, record_start

if TYPE_CHECKING:
    from ..train.trainer import Trainer

OUT_OF_MEMORY = (
    "Reduce train_micro_batch_size_per_gpu and raise gradient_accumulation_steps, or recompute activations with "
    "checkpoint_levels in the stage's unet"
)
PROFILED_STEPS = 3
MakeTrainer = Callable[[argparse.Namespace, list[str]], "Trainer"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=PROFILED_STEPS,
        metavar="STEPS",
        help=f"trace so many steps with torch's profiler (default: {PROFILED_STEPS}) into the run directory",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what the stages need, and stop"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="dry run for another GPU, which need not be here: h100, a100, ..."
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="dry run for so many of them; 1 by default")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def train(options: argparse.Namespace, make_trainer: MakeTrainer | None = None) -> int:
    """Train as the flags say. Returns the exit status. Raises what `Trainer` raises for what the user can correct.

    make_trainer: of the flags and the overrides of the file; by default it trains the file's own cascade.
    """
    record_start()
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    # Where a process is lost, the others say so in a line; torch's warnings about the connection are C++ tracebacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..train.plan import target

    try:
        asks_for_target = options.gpu is not None or options.gpus is not None
        if asks_for_target and not options.dry_run:
            raise ValueError("--gpu and --gpus are for --dry-run: training takes the GPUs that its launcher gives it")
        where = target(options.gpus, options.gpu) if asks_for_target else None
        profile = [] if options.profile is None else [f"fastimagen.train.profile={options.profile}"]
        trainer = (make_trainer or file_trainer)(options, [*options.overrides, *profile])
        if options.dry_run:
            print(trainer.describe(where))
            return 0
        status = _fit(trainer)
    except BaseException:
        record(1)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in SIGNALS:  # launchers send signals to all processes when the first one ends: the status stands
        signal.signal(number, signal.SIG_IGN)
    return record(status)


def file_trainer(options: argparse.Namespace, overrides: list[str]) -> Trainer:
    """The trainer of a configuration file."""
    from ..config_file import load_config
    from ..train.trainer import Trainer

    return Trainer(load_config(options.config, overrides), options.run_dir, stage=options.stage)


def _fit(trainer: Trainer) -> int:
    """Train. Returns the exit status."""
    from ..train.preemption import TrainingInterrupted
    from ..train.trainer import TrainingDiverged

    try:
        trainer.fit()
    except TrainingInterrupted as interrupted:
        print(interrupted, flush=True)
        return EXIT_INTERRUPTED
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise ValueError(f"{first_line(error)} {OUT_OF_MEMORY}") from None
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Before training there is nothing to save. Imports take seconds, and libraries swallow exceptions in them."""
    os.write(1, f"{signal.Signals(number).name}: stopped before training; rerun the command\n".encode())
    os._exit(record(EXIT_INTERRUPTED))
