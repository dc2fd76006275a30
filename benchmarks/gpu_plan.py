"""The plan of gpu_check: how many kernels its tests and groups compile, what that costs, and when each group runs.

    python -m benchmarks.gpu_plan [--sample 60] [--target sm_90]     counts, compiles a sample, writes the file
    python -m benchmarks.gpu_check --plan                            prints the plan from it

Kernels are counted on meta tensors: those of the groups as kernel_cache.py does it, those of the tests by running the
tests of tests/gpu, which come as far as their first look at a value. Of either, a sample is compiled into a cold cache;
CPU seconds are those of the machine that runs this. The seconds of the measurements are estimates.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from .gpu_groups import GROUPS, launches
from .harness.checkout import ROOT
from .harness.rows import today

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from .harness.kernel_cache import Compilation

OUT = ROOT / "benchmarks/results/gpu_plan.json"
CORES = 16  # of the machine that the plan is for
TESTS_LIMIT = 150  # the most seconds for all tests, and for compiling meanwhile
TEST_SHARE = 0.75  # of the cores, for the tests; the others compile the kernels of the groups
START = 15.0  # seconds of a process until its first launch, while all others start too
RUN_TESTS = 15.0  # seconds that the tests' own work takes, without compiling

TESTS = ROOT / "tests/gpu"


# ---- counting and compiling


class _Listing:
    """A pytest plugin: each test runs on meta tensors, and a test ends where it needs a value."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.found: dict[str, Compilation] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]
        items[:] = [item for item in items if "test_step" not in item.nodeid and "test_sampling" not in item.nodeid]

    def pytest_pyfunc_call(self, pyfuncitem: Any) -> bool:
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

        def call() -> None:
            with suppress(RuntimeError, NotImplementedError, AssertionError):  # a meta tensor has no value to compare
                pyfuncitem.obj(**arguments)

        if arguments.get("backend", "triton") == "triton":
            with _cuda_is_meta():
                from .harness.kernel_cache import compilations_of

                self.found |= compilations_of([call], self.target)
        return True


@contextmanager
def _cuda_is_meta() -> Iterator[None]:
    make = torch.tensor

    def tensor(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make(*arguments, device="meta" if device == "cuda" else device, **options)

    with (
        mock.patch.object(torch.Tensor, "cuda", lambda x: x.to("meta")),
        mock.patch.object(torch, "tensor", tensor),
    ):
        yield


def kernels_of_tests(target: GPUTarget) -> list[Compilation]:
    """Those of the tests of single ops; whole networks need few more."""
    import pytest

    from fastimagen.ops import dispatch

    plugin = _Listing(target)
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", str(TESTS)]
    with (
        mock.patch.object(dispatch, "no_triton", return_value=None),
        open(os.devnull, "w") as nowhere,
        mock.patch.object(sys, "stdout", nowhere),
    ):
        pytest.main(arguments, plugins=[plugin])
    return list(plugin.found.values())


def measure(target: GPUTarget, sample: int, processes: int) -> dict[str, Any]:
    """Kernels of the tests and of each group, those that no group before it needs, and CPU seconds of one kernel."""
    import triton

    from .harness.kernel_cache import compilations_of, compile_all

    groups: dict[str, int] = {}
    everything: dict[str, Compilation] = {}
    for name in GROUPS:
        new = {key: one for key, one in compilations_of(launches(name, toys=False), target).items()}
        groups[name] = len(new.keys() - everything.keys())
        everything |= new
    tests = kernels_of_tests(target)
    seconds = {}
    for name, kernels in (("tests", tests), ("groups", list(everything.values()))):
        chosen = kernels[:: max(1, len(kernels) // sample)]
        with tempfile.TemporaryDirectory() as cold, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cold}):
            done = compile_all(chosen, target, processes)
        assert not any(one.was_cached for one in done)
        if failed := [f"{one.name}: {one.error}" for one in done if one.error]:
            sys.exit(f"kernels do not compile: {'; '.join(failed)}")
        seconds[name] = round(sum(one.seconds for one in done) / len(done), 3)
    return {
        "target": f"sm_{target.arch}",
        "date": today(),
        "triton": triton.__version__,
        "tests": len(tests),
        "groups": groups,
        "cpu_seconds_of_a_kernel": seconds,
        "sample": sample,
    }


# ---- the page


def table(found: dict[str, Any]) -> str:
    """The plan in Markdown: kernels, CPU seconds to compile them, seconds on a GPU machine, limits."""
    cost = found["cpu_seconds_of_a_kernel"]
    tests, groups = found["tests"] * cost["tests"], sum(found["groups"].values()) * cost["groups"]
    testing, compiling = round(TEST_SHARE * CORES), round((1 - TEST_SHARE) * CORES)
    clock = START + max(tests / testing + RUN_TESTS, groups / compiling)
    total = sum(found["groups"].values())
    lines = [
        "| | kernels | CPU seconds to compile them | seconds | ends at | at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| tests, on {testing} cores | {found['tests']} | {tests:.0f} | {clock:.0f} | {clock:.0f} | {TESTS_LIMIT} |",
        f"| kernels of all groups, on {compiling} cores meanwhile | {total} | {groups:.0f} | | | |",
    ]
    for name, group in GROUPS.items():
        clock += group.estimate
        lines.append(
            f"| {name} | {found['groups'][name]} | {found['groups'][name] * cost['groups']:.0f} | "
            f"{group.estimate:.0f} | {clock:.0f} | {group.seconds:.0f} |"
        )
    return "\n".join(lines)


def page(path: Path = OUT) -> str:
    """The table, and how to reproduce it."""
    found = json.loads(path.read_text())
    facts = (
        f"Compiled for {found['target']} by triton {found['triton']}, {found['date']}; CPU seconds from a sample of "
    )
    command = "`python -m benchmarks.gpu_plan`"
    return f"{table(found)}\n\n{facts}{found['sample']} kernels of either kind; reproduce with {command}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=60, metavar="N", help="kernels to compile of either kind (60)")
    parser.add_argument("--target", default="sm_90", help="(sm_90)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    from .harness.offline import TARGETS

    found = measure(TARGETS[options.target], options.sample, options.processes)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(page(options.out))


if __name__ == "__main__":
    main()
