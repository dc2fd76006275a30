"""Train a cascade: what `deepspeed`, `torchrun` or plain `python` starts.

    deepspeed launch/train.py --config ds.json [--stage NAME|all] [--set a.b=c ...] [--run-dir DIR] [--dry-run]

To resume, rerun the command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: interrupted by a signal, checkpoint saved; rerun the command to resume

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without installation


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the stages of a cascade. Rerun the command to resume.")
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
        help="override a key of the file, e.g. fastimagen.train.steps=100",
    )
    parser.add_argument("--run-dir", "--run", help="run directory; by default fastimagen.train.run")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Idle OpenMP threads sleep instead of spinning: on shared cores, spinning threads made a step six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fastimagen.config_file import load_config
    from fastimagen.logs import configure_logging
    from fastimagen.train.trainer import Trainer, TrainingDiverged, TrainingInterrupted

    configure_logging()
    try:
        trainer = Trainer(load_config(options.config, options.overrides), options.run_dir, stage=options.stage)
        if options.dry_run:
            print(trainer.describe())
        else:
            trainer.fit()
    except TrainingInterrupted as stopped:
        print(stopped, flush=True)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
