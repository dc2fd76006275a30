"""Train a cascade: what `deepspeed`, `torchrun` or plain `python` starts from a clone. The same as `fastimagen train`.

    deepspeed launch/train.py --config ds.json [--stage NAME|all] [--set a.b=c ...] [--run-dir DIR] [--dry-run]

To resume, rerun the command. Without a clone: deepspeed --module fastimagen train --config ds.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone without installation


def main(arguments: list[str] | None = None) -> int:
    from fastimagen.cli import main as fastimagen

    return fastimagen(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
