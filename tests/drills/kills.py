"""Drill: a run is killed 60 times at random moments, resumed each time, and records what an undisturbed run records.

    python -m tests.drills.kills [SEED] [--every N]

42 kills of a run on one process: SIGKILL, SIGTERM, SIGUSR1, SIGKILL while a checkpoint is written, SIGTERM in a
validation or a preview grid. 18 kills of a run on two ranks: SIGKILL of one rank, and of the launcher (torchrun), and
SIGTERM of one rank in a validation or a preview grid. --every N takes each Nth of them. A kill comes after a random
number of steps and a random pause, or while the process starts. After each kill, and at the end, every record must
equal the undisturbed run's, bit for bit: loss, val_loss, lr and grad_norm. The result, with the phase in which each
signal was noticed, is in tests/drills/results/kills.json. Short versions are in tests/train/test_runs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, toy_tree
from tests.drills import forked

RESULT = ROOT / "tests/drills/results/kills.json"
STEPS, MAX_STEPS_BETWEEN_KILLS, WITHOUT_STEPS = 200, 6, 0.2
VALIDATION, PREVIEW = "SIGTERM during a validation", "SIGTERM during a preview grid"
ONE_PROCESS = ["SIGKILL"] * 12 + ["SIGTERM"] * 8 + ["SIGUSR1"] * 8 + ["SIGKILL during a save"] * 8
ONE_PROCESS += [VALIDATION] * 3 + [PREVIEW] * 3
TWO_RANKS = ["SIGKILL of one rank"] * 9 + ["SIGKILL of the launcher"] * 5 + [VALIDATION] * 2 + [PREVIEW] * 2
VALIDATE_EVERY = 10
COMPARED = ("loss", "val_loss", "lr", "grad_norm")
Records = dict[tuple[int, str], float]


def records(run: Path) -> Records:
    """{(step, field): value}; fails if a step is recorded twice."""
    found: Records = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        for field in COMPARED:
            if field in record:
                assert (record["step"], field) not in found, f"step {record['step']} is recorded twice"
                found[record["step"], field] = record[field]
    return found


def last_step(run: Path) -> int:
    return max((step for step, _ in records(run)), default=0)


def saving(run: Path) -> bool:
    return any(path.name.endswith(".partial") for path in (run / "checkpoints/base").glob(".*"))


def wait(condition: Any, alive: Any, seconds: float = 300) -> None:
    """Until the condition holds. Raises TimeoutError, also if the processes have ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive() or time.monotonic() > deadline:
            raise TimeoutError("the run ended, or made no step, before its kill")
        time.sleep(0.002)


class Drill:
    """One run directory with its kills."""

    def __init__(self, folder: Path, config: Path, ranks: int, expected: Records, chance: random.Random) -> None:
        self.run, self.log, self.config, self.ranks = folder / "run", folder / "log.txt", config, ranks
        self.expected, self.chance = expected, chance
        self.arguments = ["--config", str(config), "--run-dir", str(self.run), "--stage", "base"]

    def kill(self, kind: str) -> dict[str, Any]:
        """Start or resume, kill, and compare what is recorded. Returns a row of the result."""
        if kind == "SIGKILL of the launcher":
            statuses, moment = self._kill_launcher()
        else:
            statuses, moment = self._kill_processes(kind)
        found = records(self.run)
        wrong = sorted({step for (step, field), value in found.items() if self.expected[step, field] != value})
        noticed = re.findall(r": stopping; now in (\w+)", self.log.read_text())
        row = {"kind": kind, "moment": moment, "statuses": statuses, "records": len(found), "wrong_steps": wrong}
        return {**row, "noticed_in": noticed[-1]} if noticed else row

    def finish(self) -> Records:
        """Resume to the end."""
        assert forked.finish(forked.start(self.arguments, self.log, ranks=self.ranks)) == [0] * self.ranks
        return records(self.run)

    def _moment(self, alive: Any, kind: str) -> str:
        """Wait for a random moment. Returns its description."""
        if kind == "SIGKILL during a save":
            wait(lambda: self._stepped() and saving(self.run), alive)
            return f"saving after step {last_step(self.run)}"
        if kind in (VALIDATION, PREVIEW):
            wait(lambda: self._stepped() and self._validates(kind), alive)
            return f"after step {last_step(self.run)}"
        if self.chance.random() < WITHOUT_STEPS:
            pause = self.chance.uniform(0, 3)
            time.sleep(pause)
            return f"{pause:.2f} s after the start"
        begin = last_step(self.run)
        wait(self._stepped, alive)  # a resumed run first removes the records that are later than its checkpoint
        target = last_step(self.run) + self.chance.randrange(MAX_STEPS_BETWEEN_KILLS)
        wait(lambda: last_step(self.run) >= target, alive)
        time.sleep(self.chance.uniform(0, 0.3))
        return f"after step {last_step(self.run)} (had {begin})"

    def _validates(self, kind: str) -> bool:
        """Whether the last record is the last one before a validation, or before a preview grid."""
        found = records(self.run)
        step = last_step(self.run)
        return step % VALIDATE_EVERY == 0 and ((step, "val_loss") in found) == (kind == PREVIEW)

    def _stepped(self) -> bool:
        """Whether this process has recorded a step: its log ends in one."""
        return self.log.read_text().rpartition("parameters")[2].count("  loss ") > 0

    def _kill_processes(self, kind: str) -> tuple[list[int], str]:
        self.log.write_text("")
        pids = forked.start(self.arguments, self.log, ranks=self.ranks)
        moment = self._moment(lambda: all(map(_alive, pids)), kind)
        number = signal.Signals[kind.split()[0]]
        os.kill(self.chance.choice(pids), number)
        return forked.finish(pids, timeout=90), moment

    def _kill_launcher(self) -> tuple[list[int], str]:
        import psutil

        self.log.write_text("")
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}", "--master_port"]
        with open(self.log, "ab") as log:
            launcher = subprocess.Popen(
                [*torchrun, str(forked.free_port()), str(ROOT / "launch/train.py"), *self.arguments],
                stdout=log,
                stderr=log,
            )
        wait(self._stepped, lambda: launcher.poll() is None)
        moment = self._moment(lambda: launcher.poll() is None, "launcher")
        children = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        launcher.wait()
        _, running = psutil.wait_procs(children, timeout=90)
        if running:
            raise TimeoutError(f"{len(running)} ranks survived their launcher by 90 s")
        return [launcher.returncode], moment


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def write_config(folder: Path) -> Path:
    """A stage that takes 200 steps, with a checkpoint every 5, a validation and a preview grid every 10."""
    tree = toy_tree(folder / "shapes")
    tree["fastimagen"]["train"] |= {
        "steps": STEPS,
        "checkpoint_every": 5,
        "validate_every": VALIDATE_EVERY,
        "validation_samples": "all",
        "sample_every": VALIDATE_EVERY,
        "sample_count": 2,
        "stages": {},
    }
    tree["fastimagen"]["cascade"]["stages"][0]["sampling"] |= {"steps": 32}
    tree["scheduler"]["params"] |= {"warmup_num_steps": 100}
    (folder / "ds.json").write_text(json.dumps(tree))
    return folder / "ds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(10**6))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth kill (default: all)")
    options = parser.parse_args()
    forked.prepare()
    chance, began, rows, ends = random.Random(options.seed), time.monotonic(), [], {}
    with tempfile.TemporaryDirectory(prefix="fastimagen-kills-") as name:
        config = write_config(Path(name))
        for ranks, kinds in ((1, ONE_PROCESS[:: options.every]), (2, TWO_RANKS[:: options.every])):
            folder = Path(name) / str(ranks)
            (folder / "undisturbed").mkdir(parents=True)
            drill = Drill(folder / "undisturbed", config, ranks, {}, chance)
            expected = drill.finish()
            drill = Drill(folder, config, ranks, expected, chance)
            chance.shuffle(kinds)
            for kind in kinds:
                try:
                    rows.append({"ranks": ranks, **drill.kill(kind)})
                except TimeoutError:
                    print(drill.log.read_text()[-4000:])
                    raise
                print(f"{len(rows)}: {json.dumps(rows[-1])}", flush=True)
            ends[f"{ranks} ranks"] = drill.finish() == expected
            assert len(expected) == STEPS * 3 + STEPS // 10
    good = sum(not row["wrong_steps"] for row in rows) if all(ends.values()) else 0
    result = {
        "command": f"python -m tests.drills.kills {options.seed} --every {options.every}",
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "kinds": Counter(row["kind"] for row in rows),
        "identical": f"{good} of {len(rows)}",
        "final_records_identical": ends,
        "kills": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(result["identical"], ends)
    sys.exit(0 if good == len(rows) else 1)


if __name__ == "__main__":
    main()
