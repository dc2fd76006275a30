"""The plan of gpu_check as a page shows it, from the file that studies/gpu_plan.py writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..gpu_groups import GROUPS
from .checkout import ROOT

OUT = ROOT / "benchmarks/results/gpu_plan.json"
CORES = 16  # of the machine that the plan is for
TESTS_LIMIT = 150  # the most seconds for all tests, and for compiling meanwhile
TEST_SHARE = 0.75  # of the cores, for the tests; the others compile the kernels of the groups
START = 15.0  # seconds of a process until its first launch, while all others start too
RUN_TESTS = 15.0  # seconds that the tests' own work takes, without compiling


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
    command = "`python -m benchmarks.studies.gpu_plan`"
    return f"{table(found)}\n\n{facts}{found['sample']} kernels of either kind; reproduce with {command}"
