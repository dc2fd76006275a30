"""Drill: loaders are killed 80 times at random moments, and resumed on other numbers of processes and threads; every
position of the stream is what an undisturbed reader gets.

    python -m tests.drills.data_kills [SEED] [--kills 40]

Half of the kills are of loaders of squares, the others of loaders of buckets, whose batches are wide, tall or square.

The data are those of hostile_data.py: a mixture of local, remote and piped shards, some of them damaged or missing, and
a server that fails at random. Each attempt has 1, 2 or 4 processes, another micro-batch, other numbers of threads, and
sometimes an empty cache (another node) or no indices. SIGKILL hits all of its processes, or one and the others after
a while, when they have read a random number of samples, or while they start. The next attempt begins at the last
multiple of CHECKPOINT_EVERY global batches that all processes had completed, as a checkpoint has it.

An undisturbed process with one thread is compared with what the makers of the shards know (Expected). Every batch of
every attempt must then have its keys, origins, images, embeddings and loss weights, at the same positions, must have
skipped as many unreadable and as many lost samples on the way, and exclude as many. No complete file of the cache may
differ from its source at any time. The result is in tests/drills/results/data_kills.json. A short version without
kills is the last test of tests/data/test_remote.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from fastimagen.data.batch import Batch
from tests.conftest import ROOT
from tests.drills import forked
from tests.drills.hostile_data import BUCKETS, FOREVER, Expected, open_loader, store_truths, write_data
from tests.drills.soak import left_in_cache

RESULT = ROOT / "tests/drills/results/data_kills.json"
GLOBAL_BATCH, CHECKPOINT_EVERY = 16, 4
WHILE_STARTING, EMPTY_CACHE, NO_INDICES = 0.25, 0.3, 0.3
MAX_SAMPLES = 160
"""That all processes together have read before a kill."""


# ---- what is read


def rows_of(batch: Batch) -> Iterator[tuple[int, list[Any]]]:
    """(position, what it has) of the samples of a batch."""
    assert batch.text is not None and batch.loss_weights is not None
    tokens = batch.text.unpadded()
    for row, position in enumerate(batch.positions.tolist()):
        image, text = batch.images[row].numpy(), tokens[row].float().numpy()
        sums = [zlib.crc32(array.tobytes()) for array in (image, text)]
        yield position, [batch.keys[row], *batch.origins[row], *image.shape, *sums, float(batch.loss_weights[row])]


def undisturbed(data: dict[str, Any], folder: Path, truths: dict[str, Any], positions: int) -> dict[str, Any]:
    """{position: [what it has, unreadable and lost samples skipped on the way]}, compared with the truth."""
    loader = open_loader(
        data | {"threads": 1}, folder / "undisturbed", global_batch=GLOBAL_BATCH, micro_batch=1, rank=0, world_size=1
    )
    expected, found = Expected(loader, truths), {}
    with closing(loader.batches(0)) as batches:
        for batch in batches:
            before = dict(expected.counts)
            expected.check(batch)
            ((position, row),) = rows_of(batch)
            found[position] = [row, *(expected.counts[fate] - before.get(fate, 0) for fate in ("bad", "lost"))]
            if len(found) == positions:
                break
    expected.check_counters()
    return {"positions": found, "excluded": loader.counters["excluded"]}


def read(data: dict[str, Any], cache: Path, log: Path, start: int, stop: int, **options: Any) -> None:
    """Append a line for each batch to `log`, from position `start` on."""
    loader = open_loader(data, cache, global_batch=GLOBAL_BATCH, **options)
    before = {"bad": 0.0, "lost": 0.0}
    with open(log, "ab", buffering=0) as file, closing(loader.batches(start)) as batches:
        for batch in batches:
            skipped = {name: loader.counters[name] - count for name, count in before.items()}
            before = {name: loader.counters[name] for name in before}
            line = {"rows": dict(rows_of(batch)), **skipped, "excluded": loader.counters["excluded"]}
            file.write(json.dumps(line).encode() + b"\n")
            if max(batch.positions.tolist()) >= stop - GLOBAL_BATCH:
                return


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The complete lines of a killed process."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


# ---- kills


class Drill:
    """A data set, the undisturbed stream, and the position that the next attempt begins at."""

    def __init__(self, folder: Path, data: dict[str, Any], expected: dict[str, Any], chance: random.Random) -> None:
        self.folder, self.data, self.expected, self.chance = folder, data, expected, chance
        self.start, self.attempts, self.checked = 0, 0, Counter()

    def attempt(self, *, kill: bool = True) -> dict[str, Any]:
        """Start processes, kill them (or let them end), and compare what they have read. Returns a row."""
        chance, ranks = self.chance, self.chance.choice((1, 2, 4))
        micro = chance.choice([size for size in (1, 2, 4, 8, 16) if size * ranks <= GLOBAL_BATCH])
        threads = [chance.randint(1, 4) for _ in range(ranks)]
        cleared = [name for name, share in (("cache", EMPTY_CACHE), ("indices", NO_INDICES)) if chance.random() < share]
        self._clear(cleared)
        self.attempts += 1
        logs = [self.folder / f"{self.attempts}-{rank}.jsonl" for rank in range(ranks)]
        stop = len(self.expected["positions"])
        pids = [self._fork(log, rank, ranks, micro, threads[rank], stop) for rank, log in enumerate(logs)]
        moment, statuses = self._kill(pids, logs) if kill else ("at the end", forked.finish(pids))
        begun, wrong = self.start, self._compare(logs)
        incomplete = [name for name in left_in_cache(self.folder)["incomplete"] if not name.startswith(".")]
        return {
            "ranks": ranks,
            "micro_batch": micro,
            "threads": threads,
            "cleared": cleared,
            "begun_at": begun,
            "killed": moment,
            "statuses": statuses,
            "next_at": self.start,
            "wrong": wrong,
            "incomplete_in_cache": incomplete,
        }

    def _clear(self, cleared: list[str]) -> None:
        if "cache" in cleared:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if "indices" in cleared:
            for path in [*self.folder.glob("local/*.index"), *self.folder.glob("local/*.manifest")]:
                path.unlink()

    def _fork(self, log: Path, rank: int, ranks: int, micro: int, threads: int, stop: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            with open(self.folder / "log.txt", "ab") as file:
                os.dup2(file.fileno(), 2)
            data, cache = self.data | {"threads": threads}, self.folder / "cache"
            read(data, cache, log, self.start, stop, rank=rank, world_size=ranks, micro_batch=micro)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _kill(self, pids: list[int], logs: list[Path]) -> tuple[str, list[int]]:
        """At a random moment. Returns its description, and the exit statuses."""
        if self.chance.random() < WHILE_STARTING:
            pause = self.chance.uniform(0, 2)
            time.sleep(pause)
            moment = f"{pause:.2f} s after the start"
        else:
            target, deadline, found = self.chance.randint(1, MAX_SAMPLES), time.monotonic() + 120, 0
            while found < target and time.monotonic() < deadline:
                time.sleep(0.02)
                found = sum(len(line["rows"]) for log in logs for line in lines_of(log))
            moment = f"after {found} samples"
        self.chance.shuffle(pids)
        for number, pid in enumerate(pids):
            os.kill(pid, signal.SIGKILL)
            if number == 0 and len(pids) > 1 and self.chance.random() < 0.5:
                time.sleep(0.3)
                moment += ", the others 0.3 s later"
        return moment, forked.finish(pids, timeout=30)

    def _compare(self, logs: list[Path]) -> list[int]:
        """The positions that are not what they should be. Moves on to the last checkpoint."""
        done: set[int] = set()
        wrong: list[int] = []
        for line in [line for log in logs for line in lines_of(log)]:
            positions = [int(position) for position in line["rows"]]
            expected = [self.expected["positions"][position] for position in positions]
            same = [line["rows"][str(position)] == row for position, (row, _, _) in zip(positions, expected)]
            wrong += [position for position, equal in zip(positions, same) if not equal]
            for number, name in ((1, "bad"), (2, "lost")):
                wrong += positions if line[name] != sum(row[number] for row in expected) else []
                self.checked[name] += int(line[name])
            wrong += positions if line["excluded"] != self.expected["excluded"] else []
            self.checked["samples"] += len(positions)
            done |= {*positions}
        step = CHECKPOINT_EVERY * GLOBAL_BATCH
        while {*range(self.start, self.start + step)} <= done:
            self.start += step
        return sorted({*wrong})


@contextmanager
def hostile_folder(seed: int, **sizes: Any) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(folder, data, truths) with a server of another process."""
    with tempfile.TemporaryDirectory(prefix="fastimagen-kills-") as name:
        folder = Path(name)
        (folder / "remote").mkdir()
        Path(f"{folder}/remote.faults.json").write_text(json.dumps(FOREVER))
        serve = [sys.executable, "-m", "tests.faulty_server", f"{folder}/remote", str(seed)]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = f"http://127.0.0.1:{int(server.stdout.readline())}"
                data, truths = write_data(folder, url, **sizes)
                store_truths(folder / "truths.json", truths)
                yield folder, data, truths
            finally:
                server.kill()


def killed(row: dict[str, Any]) -> bool:
    """Whether the kill came before the processes had reached the end of the stream."""
    return -signal.SIGKILL in row["statuses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(10**6))
    parser.add_argument("--kills", type=int, default=40, help="of each half")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    chance, began = random.Random(options.seed), time.monotonic()
    rows: list[dict[str, Any]] = []
    drills = {"squares": (), "buckets": BUCKETS}
    checked: Counter[str] = Counter()
    for name, buckets in drills.items():
        with hostile_folder(options.seed, samples=24, timeout=1.0, buckets=buckets) as (folder, data, truths):
            positions = CHECKPOINT_EVERY * GLOBAL_BATCH * (options.kills + 4)
            drill = Drill(folder, data, undisturbed(data, folder, truths, positions), chance)
            attempts: list[dict[str, Any]] = []
            while sum(killed(row) for row in attempts) < options.kills:
                attempts.append({"images": name, **drill.attempt()})
                print(f"{len(attempts)}: {json.dumps(attempts[-1])}", flush=True)
                if drill.start >= positions - CHECKPOINT_EVERY * GLOBAL_BATCH:
                    drill.start = 0  # the stream again
            attempts.append({"images": name, **drill.attempt(kill=False)})
            print(f"the end: {json.dumps(attempts[-1])}", flush=True)
            assert attempts[-1]["statuses"] == [0] * attempts[-1]["ranks"]
            rows += attempts
            checked += drill.checked
    good = sum(not row["wrong"] and not row["incomplete_in_cache"] for row in rows)
    result = {
        "command": f"python -m tests.drills.data_kills {options.seed} --kills {options.kills}",
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "kills": sum(killed(row) for row in rows),
        "identical": f"{good} of {len(rows)} attempts",
        "kills_by_processes": Counter(row["ranks"] for row in rows if killed(row)),
        "compared": checked,
        "attempts": rows,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "attempts"})
    sys.exit(0 if good == len(rows) else 1)


if __name__ == "__main__":
    main()
