"""The plan of gpu_check: how many kernels its tests and groups compile, what that costs, and when each group runs.

    python -m benchmarks.studies.gpu_plan [--sample 60] [--target sm_90]     counts, compiles a sample, writes the file
    python -m benchmarks.gpu_check --plan                                    prints the plan from it

Kernels are counted on meta tensors: those of the groups as harness/kernel_cache.py does it, those of the tests by
running the tests of tests/gpu, which come as far as their first look at a value. Of either, a sample is compiled into a
cold cache; CPU seconds are those of the machine that runs this. The seconds of the measurements are estimates.
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
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..gpu_groups import GROUPS, launches
from ..harness.checkout import ROOT
from ..harness.kernel_cache import Compilation, compilations_of, compile_all
from ..harness.plan import OUT, page
from ..harness.rows import today
from .aot import TARGETS

TESTS = ROOT / "tests/gpu"


class _Listing:
    """A pytest plugin: each test runs on meta tensors, and a test ends where it needs a value."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.found = target, dict[str, Compilation]()

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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.gpu_plan", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--sample", type=int, default=60, metavar="N", help="kernels to compile of either kind (60)")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = measure(TARGETS[options.target], options.sample, options.processes)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(page(options.out))


if __name__ == "__main__":
    main()
