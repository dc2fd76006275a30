"""Everything that can be known on a GPU, from one command: first whether results are right, then how fast they come.

    python -m benchmarks.gpu_check [--budget SECONDS] [--out FILE] [--only GROUP,...] [--dry-run]

Needs torch, triton, pytest, einops, safetensors, pillow and pydantic, no installation of fastimagen. Groups of
measurements follow in the order of their importance, each in a process of its own, so that one that hangs or breaks
the GPU's context costs only itself. Every row is written as it comes: an interrupt loses nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .harness.checkout import ROOT

GROUPS = {  # group -> the most seconds that it may take
    "tests": 150,
    "step": 90,
    "attention": 60,
    "group_norm": 45,
    "threshold": 20,
    "compiled_step": 150,
    "compilers": 60,
    "sampling": 45,
    "networks": 120,
}
START = 12  # seconds that a process needs before it measures; with less left, no group begins
NEEDED = ("torch", "triton", "pytest", "einops", "safetensors", "PIL", "pydantic")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    options.add_argument("--budget", type=float, default=520, metavar="SECONDS", help="for all together (520)")
    options.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="rows are added to it; by default benchmarks/results/<device>/<date>.json",
    )
    options.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,...", help=", ".join(GROUPS))
    options.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU as well, to see that all runs")
    options.add_argument("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if all tests passed and all groups ran; 1 if results are wrong, and then nothing is measured."""
    options = parser().parse_args(arguments)
    groups = options.only.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser().error(f"no group {unknown[0]}; there are {', '.join(GROUPS)}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser().error(f"{', '.join(missing)} cannot be imported here")
    if options.dry_run and options.out is None:
        parser().error("--dry-run needs --out FILE: its rows are no results")
    if options.worker is not None:
        return measure(groups, options)
    until = time.monotonic() + options.budget
    if "tests" in groups:
        groups.remove("tests")
        if not run(GROUPS["tests"], *pytest("test_ops_cuda.py")):
            print("results are wrong: nothing is measured", flush=True)
            return 1
        in_order = run(GROUPS["tests"], *pytest("test_step_cuda.py", "test_sampling_cuda.py"))
    else:
        in_order = True
    # A dry run shares one process: most of its time would be importing.
    for names in [groups] if options.dry_run else [[name] for name in groups]:
        seconds = min(until - time.monotonic(), sum(GROUPS[name] for name in names))
        if seconds < START:
            print(f"no time for {', '.join(names)}", flush=True)
            continue
        print(f"== {', '.join(names)}, at most {seconds:.0f} s", flush=True)
        again = [
            f"--only={','.join(names)}",
            *(["--dry-run"] if options.dry_run else []),
            *([f"--out={options.out}"] if options.out else []),
        ]
        in_order &= run(seconds + START, "benchmarks.gpu_check", *again, f"--worker={seconds - START / 2}")
    return 0 if in_order else 1


def pytest(*files: str) -> tuple[str, ...]:
    """Tests in tests/gpu by themselves: neither options nor fixtures of the others, which need more packages."""
    return (
        "pytest",
        "-q",
        "-x",
        "-rs",
        "-o",
        "addopts=",
        "-p",
        "benchmarks.harness.checkout",
        "-p",
        "no:cacheprovider",
        f"--confcutdir={ROOT / 'tests/gpu'}",
        *(str(ROOT / "tests/gpu" / file) for file in files),
    )


def run(seconds: float, module: str, *arguments: str) -> bool:
    """Run a module in a process of its own, for so long at most; whether it came to a good end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        return (
            subprocess.run(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, timeout=seconds
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        print(
            f"{module} {' '.join(arguments)} was stopped after {seconds:.0f} s; its rows so far are written", flush=True
        )
        return False


def measure(groups: list[str], options: argparse.Namespace) -> int:
    """The work of one process: measure these groups in turn and write their rows."""
    import torch

    from .harness.measure import Bench
    from .harness.rows import RESULTS, Results, environment, folder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.dry_run:
        print("there is no GPU: nothing is measured (--dry-run runs on a CPU)", flush=True)
        return 1
    if options.dry_run:
        torch.compiler.set_stance("force_eager")  # compiling toys would take longer than all the rest
    shared = environment()
    out = options.out or RESULTS / folder(shared["device"]) / f"{shared['date']}.json"
    seconds = 0.01 if options.dry_run else 0.15
    bench = Bench(device, Results(out, shared), deadline=time.monotonic() + options.worker, seconds=seconds)
    for name in groups:
        (toys(bench) if options.dry_run else measurements(bench))[name]()
    print(f"{len(bench.results.rows)} rows in {out}", flush=True)
    return 0


def measurements(bench: object) -> dict[str, Callable[[], None]]:
    """What each group measures on a GPU."""
    from .cases import attention, dynamic_threshold, group_norm, sampling, step
    from .harness import networks

    device = bench.device
    return {
        "step": lambda: step.run(bench, [networks.BASE64], step.EAGER),
        "attention": lambda: bench.run(attention.cases(device)),
        "group_norm": lambda: bench.run(group_norm.cases(device)),
        "threshold": lambda: bench.run(dynamic_threshold.cases(device)),
        "compiled_step": lambda: step.run(bench, [networks.BASE64], step.COMPILED),
        "compilers": lambda: (
            bench.run(group_norm.cases(device, shapes=group_norm.SHAPES[:4], compilers=True)),
            bench.run(attention.cases(device, compilers=True)),
        ),
        "sampling": lambda: sampling.run(bench, [networks.BASE64, networks.SUPER256], ("triton", "torch")),
        "networks": lambda: step.run(bench, [networks.SUPER256, *networks.PAPER], step.EAGER),
    }


def toys(bench: object) -> dict[str, Callable[[], None]]:
    """The same groups at sizes for a moment on a CPU."""
    from .cases import attention, dynamic_threshold, group_norm, sampling, step
    from .harness import networks

    device = bench.device
    few = {"sides": (4,), "batches": (2,)}
    return {
        "step": lambda: step.run(bench, [networks.TOY], step.EAGER),
        "attention": lambda: bench.run(attention.cases(device, **few)),
        "group_norm": lambda: bench.run(group_norm.cases(device, shapes=((2, 16, 4),))),
        "threshold": lambda: bench.run(dynamic_threshold.cases(device, shapes=((2, 8),))),
        "compiled_step": lambda: step.run(bench, [networks.TOY], step.COMPILED),
        "compilers": lambda: (
            bench.run(group_norm.cases(device, shapes=((2, 16, 4),), compilers=True)),
            bench.run(attention.cases(device, sides=(32,), batches=(1,), compilers=True)),
        ),
        "sampling": lambda: sampling.run(bench, [networks.TOY_SUPER], ("triton", "torch"), batch=2),
        "networks": lambda: step.run(bench, [networks.TOY_SUPER], step.EAGER),
    }


if __name__ == "__main__":
    sys.exit(main())
