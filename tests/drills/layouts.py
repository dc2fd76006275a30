"""Drill: the same run split over ranks and micro-batches in five ways gives the same losses.

    python -m tests.drills.layouts

(ranks, accumulation) in (1, 1), (2, 1), (1, 4), (2, 2), (4, 1) at a batch of 8, 20 steps of both toy stages with AdamW
in fp32 on a CPU, and a run that changes from (1, 1) to (2, 2) after 10 steps. Losses and validation losses must agree
to 1e-6. The result is in tests/drills/results/layouts.json. A short version is in
tests/train/test_runs.py.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.conftest import ROOT, toy_tree
from tests.drills import forked

RESULT = ROOT / "tests/drills/results/layouts.json"
LAYOUTS = [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)]
BATCH, STEPS, TOLERANCE = 8, 20, 1e-6


def train(run: Path, config: Path, ranks: int, accumulation: int, steps: int = STEPS) -> None:
    micro = f"train_micro_batch_size_per_gpu={BATCH // ranks // accumulation}"
    arguments = ["--config", str(config), "--run-dir", str(run), "--set", micro]
    arguments += ["--set", f"fastimagen.train.steps={steps}"]
    log = run.with_suffix(".log")
    if forked.finish(forked.start(arguments, log, ranks=ranks), timeout=600) != [0] * ranks:
        raise RuntimeError(log.read_text()[-3000:])


def losses(run: Path) -> dict[tuple[str, int, str], float]:
    """{(stage, step, field): value}."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (record["stage"], record["step"], field): record[field]
        for record in records
        for field in ("loss", "val_loss")
        if field in record
    }


def main() -> None:
    forked.prepare()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fastimagen-layouts-") as name:
        folder = Path(name)
        tree = toy_tree(folder / "shapes")
        tree["train_batch_size"] = BATCH
        tree["fastimagen"]["train"] |= {
            "checkpoint_every": 10,
            "validate_every": 5,
            "validation_samples": 40,
            "sample_every": 1000,
            "sample_count": 1,
            "stages": {},
        }
        (folder / "ds.json").write_text(json.dumps(tree))
        found = {}
        for ranks, accumulation in LAYOUTS:
            label = f"{ranks} ranks, accumulation {accumulation}"
            train(folder / label, folder / "ds.json", ranks, accumulation)
            found[label] = losses(folder / label)
        label = "1 rank, after 10 steps 2 ranks, accumulation 2"
        train(folder / label, folder / "ds.json", 1, 1, steps=10)
        train(folder / label, folder / "ds.json", 2, 2)
        found[label] = losses(folder / label)
        expected, *_ = found.values()
        for label, values in found.items():
            assert values.keys() == expected.keys() and len(values) == 2 * (STEPS + STEPS // 5)
            differences = {
                field: max(abs(values[key] - expected[key]) for key in expected if key[2] == field)
                for field in ("loss", "val_loss")
            }
            rows.append({"layout": label, "largest_difference": differences})
            print(json.dumps(rows[-1]), flush=True)
    largest = max(max(row["largest_difference"].values()) for row in rows)
    result = {
        "command": "python -m tests.drills.layouts",
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "largest_difference": largest,
        "tolerance": TOLERANCE,
        "layouts": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if largest <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
