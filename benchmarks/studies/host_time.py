"""Host time of the fused ops at two revisions, on the CPU, with launches stubbed (benchmarks/cases/host_time.py).

    python -m benchmarks.studies.host_time BEFORE [AFTER] [--rounds 5] [--seconds 0.5] [--out FILE]

BEFORE and AFTER (by default HEAD) are revisions of git, each checked out into a temporary folder. Processes of the two
alternate, and the CPU seconds of the one thread count. A round's figure is its median; a row has the least of all
rounds, which other load on the machine affects least, and all rounds. A ratio below 1: AFTER is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..harness.checkout import ROOT
from ..harness.rows import RESULTS, today

CASE = "benchmarks/cases/host_time.py"
MEASURE = """
import json, sys, torch
from benchmarks.cases import host_time

torch.set_num_threads(1)
cpu, found = torch.device("cpu"), []
for (call, mode), make in host_time.CASES.items():
    for provider, launching in host_time.PROVIDERS["cpu"].items():
        with launching():
            times = host_time.host_times(make(cpu), cpu, float(sys.argv[1]))
        found.append({"call": call, "mode": mode, "provider": provider, "us": 1000 * times.p50})
print(json.dumps(found))
"""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each call and provider in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu/host_time.json")
    options = parser.parse_args()
    commits = {name: commit(getattr(options, name)) for name in ("before", "after")}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: checked_out(found, Path(folder) / name) for name, found in commits.items()}
        rounds: dict[str, list[list[Row]]] = {name: [] for name in places}
        for number in range(options.rounds):
            for name, place in places.items():
                rounds[name].append(measured(place, options.seconds))
                print(f"round {number + 1} of {options.rounds}: {name}", flush=True)
    about = {
        "command": f"python -m benchmarks.studies.host_time {commits['before']} {commits['after']}",
        **commits,
        "timer": "CPU seconds of 1 thread, medians, least of the rounds",
        "rounds": options.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": today(),
    }
    write(options.out, about, [row(*found) for found in zip(*rounds["before"], *rounds["after"])])


def commit(revision: str) -> str:
    return git("rev-parse", "--short=10", revision).strip()


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def checked_out(found: str, folder: Path) -> Path:
    """The commit's files in `folder`, with today's cases, and its kernels under their package's name beside them."""
    (folder / "packages").mkdir(parents=True)
    archive = folder / "archive.tar"
    git("archive", f"--output={archive}", found, "fastimagen", "kernels", "benchmarks")
    shutil.unpack_archive(archive, folder, filter="data")
    shutil.copy(ROOT / CASE, folder / CASE)
    (folder / "packages/fastimagen_kernels").symlink_to(folder / "kernels")
    return folder


def measured(folder: Path, seconds: float) -> list[Row]:
    """Every call and provider, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{folder}/packages{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", MEASURE, str(seconds)]
    child = subprocess.run(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def row(*found: Row) -> Row:
    """All rounds of one call and provider, those before and then as many after."""
    names = {key: found[0][key] for key in ("call", "mode", "provider")}
    assert all(names.items() <= one.items() for one in found)
    times = [round(one["us"], 1) for one in found]
    before, after = times[: len(times) // 2], times[len(times) // 2 :]
    least = {"before_us": min(before), "after_us": min(after), "ratio": round(min(after) / min(before), 3)}
    return names | least | {"before_rounds": before, "after_rounds": after}


def write(path: Path, about: Row, rows: list[Row]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')
    for found in rows:
        print(
            f"{found['call']:40} {found['mode']:22} {found['provider']:20} "
            f"{found['before_us']:7.1f} us before {found['after_us']:7.1f} us after  {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
