"""Everything that can be known on a GPU, from one command: whether the kernels are right, then how fast they are.

    python -m benchmarks.gpu_check [--budget SECONDS] [--out FILE] [--only GROUP,...] [--dry-run]

Needs torch, triton, pytest, einops, safetensors, pillow and pydantic, and no installation of fastimagen; deepspeed for
the group "engine". First the tests run in many processes, and meanwhile others compile the kernels of all measurements
into Triton's cache. Then the groups of measurements follow in the order of their importance, each in a process of its
own, so that one that hangs or breaks the GPU's context costs only itself. Every row is written at once: an interrupt
loses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from .gpu_groups import GROUPS, measurements
from .gpu_plan import TEST_SHARE, TESTS_LIMIT, page
from .harness.parallel_tests import GPU_TESTS, Outcome, ParallelTests, summary, unknown_groups, wrong_groups
from .harness.processes import last_lines, start, stop

TEST_LIMIT = 100  # of one test: some compile whole networks while all cores are busy
START = 12  # seconds that a process needs before it measures; with less left, no group begins
NEEDED = {  # module -> the package that has it
    "torch": "torch",
    "triton": "triton",
    "pytest": "pytest",
    "einops": "einops",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "pydantic": "pydantic",
}
KERNEL_CACHE = "benchmarks.kernel_cache"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    options.add_argument("--budget", type=float, default=520, metavar="SECONDS", help="for all together (520)")
    options.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="rows are added to it; by default benchmarks/results/<device>/<date>.json",
    )
    names = ",".join(["tests", *GROUPS])
    options.add_argument("--only", default=names, metavar="GROUP,...", help=names.replace(",", ", "))
    options.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU as well, to see that all runs")
    options.add_argument(
        "--plan", action="store_true", help="print kernels and expected seconds of all, and do nothing"
    )
    options.add_argument("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if all tests passed and all groups ran, else 1."""
    options = parser().parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(GROUPS) - {"tests"}):
        parser().error(f"no group {unknown[0]}; there are tests, {', '.join(GROUPS)}")
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        parser().error(f"{', '.join(missing)} cannot be imported; python -m pip install {' '.join(missing)}")
    if options.plan:
        print(page())
        return 0
    if options.dry_run and options.out is None:
        parser().error("--dry-run needs --out FILE: its rows are no results")
    groups = [name for name in GROUPS if name in names]
    if options.worker is not None:
        return measure(groups, options)
    until = time.monotonic() + options.budget
    outcomes = prepare(groups, "tests" in names, min(TESTS_LIMIT, options.budget), dry_run=options.dry_run)
    wrong = wrong_groups(outcomes)
    in_order = not wrong and not unknown_groups(outcomes)
    if "tests" in names and not outcomes:
        print("no tests were found: nothing is known of the results", flush=True)
        in_order = False
    groups, skipped = without_wrong(groups, wrong)
    for name, ops in skipped.items():
        print(f"{name} is not measured: results of {', '.join(ops)} are wrong", flush=True)
    # A dry run shares one process: most of its time would be importing.
    for together in [groups] if options.dry_run and groups else [[name] for name in groups]:
        in_order &= run_groups(together, until, options)
    return 0 if in_order else 1


def without_wrong(groups: list[str], wrong: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Groups that measure no op with wrong results; and the others, with these ops."""
    skipped = {name: sorted(wrong & set(GROUPS[name].ops)) for name in groups if wrong & set(GROUPS[name].ops)}
    return [name for name in groups if name not in skipped], skipped


# ---- tests and kernels


def prepare(groups: list[str], tests: bool, seconds: float, *, dry_run: bool) -> dict[str, Outcome]:
    """Run the tests if asked to, compile the groups' kernels at the same time, and say how both went."""
    cores = 2 if dry_run else os.cpu_count() or 1
    testing_cores = max(1, int(TEST_SHARE * cores))
    began, testing = time.monotonic(), None
    if tests:
        print(f"== tests, and kernels of {', '.join(groups)}, at most {seconds:.0f} s", flush=True)
        testing = ParallelTests(GPU_TESTS, processes=testing_cores, limit=TEST_LIMIT)
    with tempfile.NamedTemporaryFile() as log:
        compiling = start_compiling(groups, max(1, cores - testing_cores if tests else cores), log, dry_run=dry_run)
        try:
            outcomes = testing.wait(seconds) if testing else {}
            if outcomes:
                print(f"{summary(outcomes)}\ntests took {time.monotonic() - began:.0f} s", flush=True)
            report_compiling(compiling, max(0.0, began + seconds - time.monotonic()), Path(log.name))
        finally:
            if compiling:
                stop(compiling)
    if unknown := sorted(unknown_groups(outcomes)):
        print(f"not all tests of {', '.join(unknown)} came to an end: see above", flush=True)
    if wrong := sorted(wrong_groups(outcomes)):
        print(f"results are wrong: {', '.join(wrong)}", flush=True)
    return outcomes


def start_compiling(groups: list[str], processes: int, log: IO[bytes], *, dry_run: bool) -> subprocess.Popen | None:
    """Start filling Triton's cache with the kernels of these groups.

    On a CPU a dry run compiles, for an H100, those of host_time alone: no other group can use compiled kernels there.
    """
    if dry_run:
        groups = [name for name in groups if name == "host_time"]
    if not groups:
        return None
    toys = ["--toys", "--target=sm_90"] if dry_run else []
    return start(KERNEL_CACHE, f"--only={','.join(groups)}", f"--processes={processes}", *toys, out=log, threads=1)


def report_compiling(compiling: subprocess.Popen | None, seconds: float, log: Path) -> None:
    """Wait for the compilations and print how many there were. Without them, processes compile what they need."""
    if compiling is None:
        return
    try:
        status = compiling.wait(seconds)
    except subprocess.TimeoutExpired:
        print("the kernel cache was not filled in time; the rest is compiled by the processes that need it", flush=True)
        return
    if status:
        print(f"the kernel cache was not filled (status {status}):\n{last_lines(log)}", flush=True)
        return
    *problems, last = log.read_text().strip().splitlines()
    facts = json.loads(last)
    for line in problems:
        if "does not compile" in line or line.startswith("FusedAdam"):
            print(line, flush=True)
    print(
        f"kernel cache: {facts['kernels']} kernels, {facts['compiled']} of them compiled now in {facts['cpu_s']:.0f} "
        f"CPU seconds, {facts['list_s'] + facts['wall_s']:.0f} s on {facts['processes']} cores",
        flush=True,
    )


# ---- measuring


def run_groups(names: list[str], until: float, options: argparse.Namespace) -> bool:
    """Measure in a process of its own, as long as these groups may take; whether it came to a good end."""
    seconds = min(until - time.monotonic(), sum(GROUPS[name].seconds for name in names))
    if seconds < START:
        print(f"no time for {', '.join(names)}", flush=True)
        return True
    print(f"== {', '.join(names)}, at most {seconds:.0f} s", flush=True)
    again = [
        f"--only={','.join(names)}",
        *(["--dry-run"] if options.dry_run else []),
        *([f"--out={options.out}"] if options.out else []),
    ]
    # The worker begins no measurement in the last seconds; what it has begun then may take START more.
    process = start("benchmarks.gpu_check", *again, f"--worker={seconds - START / 2}")
    try:
        return process.wait(seconds + START) == 0
    except subprocess.TimeoutExpired:
        print(f"{', '.join(names)} took longer than {seconds + START:.0f} s; rows so far are written", flush=True)
        return False
    finally:
        stop(process)


def measure(groups: list[str], options: argparse.Namespace) -> int:
    """The work of one process: measure these groups in turn and write their rows."""
    deadline = time.monotonic() + options.worker
    import torch

    from .harness.kernel_cache import count_use
    from .harness.measure import Bench
    from .harness.rows import RESULTS, Results, environment, folder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.dry_run:
        print("there is no GPU: nothing is measured (--dry-run runs on a CPU)", flush=True)
        return 1
    if options.dry_run:
        torch.compiler.set_stance("force_eager")  # compiling toys would take longer than all the rest
    use, shared = count_use(), environment()
    out = options.out or RESULTS / folder(shared["device"]) / f"{shared['date']}.json"
    bench = Bench(device, Results(out, shared), deadline=deadline, seconds=0.01 if options.dry_run else 0.05)
    for name in groups:
        measurements(bench, toys=options.dry_run)[name]()
    print(f"{use}; {len(bench.results.rows)} rows in {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
