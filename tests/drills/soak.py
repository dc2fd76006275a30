"""Drill: loaders read for an hour from servers that fail, out of shards that are damaged; nothing is lost or leaks.

    python -m tests.drills.soak [--minutes 60] [--ranks 2] [--load 0.1]

A mixture of three data sets (hostile_data.py): remote shards of an HTTP server that answers every fourth request with a
429, 500 or 503, an answer that stalls, crawls or breaks off, and some requests always with a 403, 404, 500, flipped
bytes or a file of another size; local shards, some of them truncated, empty, missing or no tars; and shards that a
command fetches. Images are undecodable, captions missing. The ranks are processes with threads of their own that share
a cache which holds a third of the shards. Each takes the share --load of a core, and sleeps in between.

Every batch is compared with what the makers of the shards know: keys, images, embeddings. At the end the counters must
be exactly what was delivered and skipped, by reason; memory after the first fifth of the time must be flat; no thread
or process may be left, and the cache may have complete files only. The result,
tests/drills/results/soak.json, is written every minute. A short version is in tests/data/test_hostile_data.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from fastimagen.data.remote.shard import checksum
from tests.conftest import ROOT
from tests.drills.hostile_data import FOREVER, Expected, load_truths, open_loader, store_truths, write_data

RESULT = ROOT / "tests/drills/results/soak.json"
SAMPLE_EVERY, WRITE_EVERY = 5.0, 60.0  # seconds
WARM_UP = 0.2
"""Share of the time after which memory must be flat: by then every shard has been opened, and caches are full."""


# ---- a rank


def memory() -> dict[str, float]:
    """MiB of this process: resident, private (USS), and private without files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss": kib["Rss"] / 1024, "uss": private / 1024, "anonymous": kib["Anonymous"] / 1024}


def open_files(folder: Path) -> dict[str, float]:
    """Open or mapped files of a folder; those of them that are deleted, and the MB that these keep on the disk."""
    sizes: dict[str, int] = {}
    for place in ("fd", "map_files"):
        for name in os.listdir(f"/proc/self/{place}"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                path = f"/proc/self/{place}/{name}"
                if (target := os.readlink(path)).startswith(str(folder)):
                    sizes[target] = os.stat(path).st_size
    deleted = [size for target, size in sizes.items() if target.endswith(" (deleted)")]
    return {"files": len(sizes), "deleted": len(deleted), "deleted_mb": round(sum(deleted) / 1e6, 3)}


def child_processes() -> set[int]:
    return {*map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())}


def read(
    data: dict[str, Any],
    folder: Path,
    *,
    rank: int,
    ranks: int,
    seconds: float = 3600.0,
    batches: int | None = None,
    load: float = 1.0,
    note_every: float = SAMPLE_EVERY,
    note: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Read and check batches for `seconds`, or that number of batches, then end. note: is given a row of memory and
    counters every `note_every` seconds."""
    began, running, children = time.monotonic(), threading.enumerate(), child_processes()
    loader = open_loader(data, folder / "cache", global_batch=16 * ranks, micro_batch=16, rank=rank, world_size=ranks)
    expected, done, noted = Expected(loader, load_truths(folder / "truths.json")), 0, 0.0
    cpu, wall = time.process_time(), time.monotonic()
    with closing(loader.batches(0)) as stream:
        for batch in stream:
            expected.check(batch)
            done += 1
            passed = time.monotonic() - began
            if passed - noted > note_every:
                noted = passed
                row = {"seconds": round(passed, 1), "delivered": expected.counts["delivered"]}
                note(row | memory() | open_files(folder) | {"threads": threading.active_count()})
            if passed > seconds or done == batches:
                break
            time.sleep(max(0.0, min(5.0, (time.process_time() - cpu) / load - (time.monotonic() - wall))))
    expected.check_counters()
    deadline = time.monotonic() + 30
    while (left := [*{*threading.enumerate()} - {*running}]) and time.monotonic() < deadline:
        time.sleep(0.05)  # what is being downloaded is finished first
    return {
        "rank": rank,
        "batches": done,
        "counters": loader.counters,
        "delivered": expected.counts["delivered"],
        "skipped": {"bad": expected.counts["bad"], "lost": expected.counts["lost"]},
        "epochs": loader.order.epochs(16 * ranks * done),  # type: ignore[union-attr]
        "cpu_share": round((time.process_time() - cpu) / (time.monotonic() - wall), 3),
        "threads_left": [thread.name for thread in left],
        "processes_left": sorted(child_processes() - children),
    }


def run_rank(options: argparse.Namespace) -> None:
    """In a rank's process: read, with rows of memory in rank-N.jsonl and the end in rank-N.json."""
    import torch

    torch.set_num_threads(1)
    folder, rank = options.folder, options.rank
    with open(folder / f"rank-{rank}.jsonl", "w", buffering=1) as rows:
        end = read(
            json.loads((folder / "data.json").read_text()),
            folder,
            rank=rank,
            ranks=options.ranks,
            seconds=60 * options.minutes,
            load=options.load,
            note=lambda row: print(json.dumps(row), file=rows),
        )
    (folder / f"rank-{rank}.json").write_text(json.dumps(end))


# ---- the drill


def trend(rows: list[dict[str, float]], name: str, seconds: float) -> dict[str, float]:
    """Of a column after the warm-up: MiB an hour by least squares, and medians of its first and last tenth."""
    late = [row for row in rows if row["seconds"] > WARM_UP * seconds]
    if len(late) < 3:
        return {}
    values = np.array([row[name] for row in late])
    slope = np.polyfit([row["seconds"] / 3600 for row in late], values, 1)[0]
    tenth = max(1, len(late) // 10)
    first, last = np.median(values[:tenth]), np.median(values[-tenth:])
    figures = {"slope_per_hour": slope, "first_tenth": first, "last_tenth": last, "highest": values.max()}
    return {name: round(float(value), 2) for name, value in figures.items()}


def left_in_cache(folder: Path) -> dict[str, Any]:
    """How many files the cache has, and those that are not complete: temporary, or other than their source."""
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    wrong = []
    for path in files:
        name = path.name.replace(".tar.counting.", ".counting.")
        sources = [place / name for place in (folder / "remote", folder / "piped") if (place / name).exists()]
        if path.suffix in (".index", ".manifest"):
            continue  # written here
        if not sources or checksum(sources[0]) != checksum(path):
            wrong.append(path.name)
    return {"files": len(files), "mb": round(sum(path.stat().st_size for path in files) / 1e6, 2), "incomplete": wrong}


def summary(folder: Path, options: argparse.Namespace, began: float) -> dict[str, Any]:
    """The result so far."""
    ranks = []
    for rank in range(options.ranks):
        path, end = folder / f"rank-{rank}.jsonl", folder / f"rank-{rank}.json"
        rows = (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )
        figures = {name: trend(rows, name, 60 * options.minutes) for name in ("rss", "uss", "anonymous", "threads")}
        files = {name: max((row[name] for row in rows), default=0) for name in ("files", "deleted", "deleted_mb")}
        every = rows[:: max(1, len(rows) // 60)]
        ranks.append(
            {"rank": rank, "memory_mib": figures, "most_open_files": files, "rows": every}
            | (json.loads(end.read_text()) if end.exists() else {})
        )
    return {
        "command": f"python -m tests.drills.soak --minutes {options.minutes:g} --ranks {options.ranks} "
        f"--load {options.load:g}",
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "shards_mb": round(sum(path.stat().st_size for path in folder.glob("*/*.tar")) / 1e6, 2),
        "cache_mb": 1e3 * json.loads((folder / "data.json").read_text())["cache_gb"],
        "ranks": ranks,
    }


def problems(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [f"incomplete in the cache: {name}" for name in result["cache"]["incomplete"]]
    for rank in result["ranks"]:
        found += [f"rank {rank['rank']} has not ended"] if "delivered" not in rank else []
        found += [f"left: {left}" for left in rank.get("threads_left", []) + rank.get("processes_left", [])]
        figures = rank["memory_mib"]["uss"]
        if figures and figures["last_tenth"] - figures["first_tenth"] > 5:
            found.append(f"memory of rank {rank['rank']} has grown: {figures}")
    return found


def run_drill(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Server and ranks, until the ranks end."""
    began = time.monotonic()
    (folder / "remote").mkdir()
    Path(f"{folder}/remote.faults.json").write_text(json.dumps(FOREVER))
    serve = [sys.executable, "-m", "tests.faulty_server", f"{folder}/remote", "0"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    data, truths = write_data(folder, url)
    (folder / "data.json").write_text(json.dumps(data))
    store_truths(folder / "truths.json", truths)
    command = [sys.executable, "-m", "tests.drills.soak", "--folder", str(folder)]
    command += ["--minutes", str(options.minutes), "--ranks", str(options.ranks), "--load", str(options.load)]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(options.ranks)]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(min(WRITE_EVERY, 6 * options.minutes))
            write(options.out, {"state": "running"} | summary(folder, options, began))
        result = {"state": "ended"} | summary(folder, options, began)
        result["exit_statuses"] = [rank.poll() for rank in ranks]
        with urllib.request.urlopen(f"{url}/served", timeout=10) as answer:
            result["requests"] = json.loads(answer.read())
    finally:
        for process in (*ranks, server):
            process.kill()
            process.wait()
    result["cache"] = left_in_cache(folder)
    result["problems"] = problems(result)
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.1, help="share of a core that each rank takes")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return
    os.nice(10)
    with tempfile.TemporaryDirectory(prefix="fastimagen-soak-") as name:
        result = run_drill(options, Path(name))
    write(options.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "ranks"}, indent=1))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
