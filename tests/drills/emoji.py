"""A captioned set that others made, from its files to a trained toy model: the commands of docs/data.md, "A whole run".

    python -m tests.drills.emoji --out tests/drills/results/emoji.json

Needs npm and a network for the images, 1,911 emoji of 64x64 pixels with their names; everything else runs without one.
Leaves the sample grid beside the results. --keep DIR works in that folder, which keeps what is downloaded and trained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PAGE, HEADING = "docs/data.md", "## A whole run"
IMAGES = 1911
"""Images and names that the package has."""


def commands() -> list[str]:
    """The commands of the page, one a line."""
    block = (ROOT / PAGE).read_text().split(HEADING)[1].split("```bash\n")[1].split("```")[0]
    return block.replace("\\\n", " ").strip().splitlines()


def run(command: str, folder: Path) -> dict[str, Any]:
    """Run one command in a folder. Its row has the seconds, CPU seconds and the last lines that it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"$ {command}\n{child.stdout}", flush=True)
    assert child.returncode == 0, f"{command} ended with status {child.returncode}"
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    seconds = time.monotonic() - began
    return {"command": command, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "output": child.stdout}


def check(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the commands printed and wrote must fit together; returns the figures."""
    output = {row["command"].split()[1]: row["output"] for row in rows if row["command"].startswith("fastimagen")}
    report = json.loads((folder / "data/emoji/report.json").read_text())
    skipped = sum(report["skipped"].values())
    held_out = re.search(r"validation: (\d+) of these samples, held out", output["info"])
    training = re.search(r"samples +(\d+) in \d+ shards?", output["info"])
    assert held_out and training, output["info"]
    kept = int(training[1]) + int(held_out[1])
    assert kept + skipped == IMAGES, f"{kept} kept and {skipped} skipped are not {IMAGES}"
    assert f"{kept} captions" in output["embed"] and "0 with unknown tokens" in output["embed"], output["embed"]
    records = [json.loads(line) for line in (folder / "runs/emoji/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    validation = [record["val_loss"] for record in records if "val_loss" in record]
    last = [record for record in records if "read" in record][-1]
    assert losses[-1] < losses[0] / 2, f"the loss went from {losses[0]} to {losses[-1]}"
    assert last["bad"] == 0 and last["held_out"] == int(held_out[1])
    assert (folder / "samples/emoji/grid.png").exists()
    return {
        "packed": kept,
        "skipped": report["skipped"],
        "training": int(training[1]),
        "held_out": int(held_out[1]),
        "steps": last["step"],
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "val_loss": [round(value, 5) for value in validation],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "launch").exists():
            (folder / "launch").symlink_to(ROOT / "launch")
        rows = [run(command, folder) for command in commands()]
        figures = check(rows, folder)
        shutil.copy(folder / "samples/emoji/grid.png", options.out.with_suffix(".png"))
        shutil.copy(folder / "data-base.png", options.out.with_name(f"{options.out.stem}-data.png"))
    steps = [{name: row[name] for name in ("command", "seconds", "cpu_seconds")} for row in rows]
    result = {"command": "python -m tests.drills.emoji", **figures, "commands": steps}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
