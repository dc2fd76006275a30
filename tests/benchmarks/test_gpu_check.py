"""gpu_check: everything that a GPU would run runs, wrong results stop what depends on them, time limits hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_check
from benchmarks.gpu_groups import GROUPS
from benchmarks.harness.parallel_tests import Outcome
from benchmarks.harness.rows import read
from tests.conftest import ROOT

# Why a row may be without a time where there is no GPU.
REASONS = (
    r'ValueError: backend "triton" cannot run: there is no GPU|\w+ is not installed|RuntimeError: No viable '
    r"backend for scaled_dot_product_attention|(MinImagen|imagen-pytorch|diffusers) has no such network|"
    r"NotImplementedError: FlexAttention does not support backward on CPU|CUDA graphs need a GPU"
)


@pytest.mark.slow
def test_everything_that_a_gpu_would_run_runs(tmp_path: Path) -> None:
    """From a cold kernel cache, in a separate process as on the GPU."""
    out = tmp_path / "dry.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(out)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "kernels")},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"attention +\d+ skipped", child.stdout) and re.search(r"sampling +\d+ skipped", child.stdout)
    # What was compiled ahead, from meta tensors, is what the launches of real tensors look for.
    cache = re.search(r"kernel cache: (\d+) kernels, (\d+) of them compiled now", child.stdout)
    assert cache and cache[1] == cache[2]
    assert f"kernels: {cache[1]} from the cache, 0 compiled" in child.stdout
    rows = read(out)
    assert {row["op"] for row in rows} == {
        "ceiling",
        "engine step",
        "training step",
        "attention",
        "group_norm",
        "modulated_norm",
        "threshold",
        "sampler step",
        "host time",
        "unet",
        "sampling",
    }
    wrong = {row["missing"] for row in rows if "missing" in row and not re.match(REASONS, row["missing"])}
    assert wrong == set()  # a provider that is broken must not hide as one that is not there
    for op in {row["op"] for row in rows}:
        assert any("ms" in row for row in rows if row["op"] == op), op
    engine = [(row["provider"], row["shape"]) for row in rows if row["op"] == "engine step"]
    assert len(engine) == 5 and {name for name, _ in engine} == {"AdamW", "AdamW, cudnn.benchmark off", "Muon"}


class Runs:
    """What gpu_check starts, instead of starting it."""

    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        self.outcomes, self.measured = outcomes, []

    def tests(self, folder: Path, *, processes: int, limit: float) -> Any:
        return SimpleNamespace(wait=lambda seconds: self.outcomes)

    def start(self, module: str, *arguments: str, **_: object) -> Any:
        group = next(argument for argument in arguments if argument.startswith("--only="))
        if module == "benchmarks.gpu_check":
            self.measured += group.removeprefix("--only=").split(",")
        return SimpleNamespace(wait=lambda seconds: 0, kernels=module != "benchmarks.gpu_check")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs({"test_attention_cuda.py::test_a": Outcome("passed")})
    monkeypatch.setattr(gpu_check, "ParallelTests", runs.tests)
    monkeypatch.setattr(gpu_check, "start", runs.start)
    monkeypatch.setattr(gpu_check, "stop", lambda process: None)
    monkeypatch.setattr(gpu_check, "report_compiling", lambda *_: None)
    return runs


def test_groups_run_in_the_order_of_their_importance(runs: Runs) -> None:
    assert gpu_check.main([]) == 0
    assert runs.measured == list(GROUPS)


def test_only_what_depends_on_wrong_results_is_not_measured(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.outcomes["test_threshold_cuda.py::test_b"] = Outcome("failed", "E   assert 1 == 2")
    assert gpu_check.main([]) == 1
    assert runs.measured == [name for name in GROUPS if name not in ("threshold", "host_time", "sampling")]
    printed = capsys.readouterr().out
    assert "results are wrong: threshold" in printed
    assert "sampling is not measured: results of threshold are wrong" in printed


def test_a_time_out_is_reported_as_one_and_does_not_stop_measuring(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.outcomes["test_group_norm_cuda.py::test_b"] = Outcome("timed out", "stopped after 60 s")
    assert gpu_check.main([]) == 1
    assert runs.measured == list(GROUPS)
    printed = capsys.readouterr().out
    assert "timed out: test_group_norm_cuda.py::test_b" in printed and "wrong" not in printed


def test_the_plan_names_every_group_and_ends_within_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change of the groups: python -m benchmarks.gpu_plan."""
    assert gpu_check.main(["--plan"]) == 0
    lines = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[4:]] == list(GROUPS)
    budget = gpu_check.parser().get_default("budget")
    # The last group, which compiles whole networks for minutes, takes what is left of the budget.
    assert float(lines[-2][4]) < budget
    assert all(group.estimate <= group.seconds for group in GROUPS.values())


def test_no_group_begins_without_time(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--budget", "5"]) == 0
    assert runs.measured == [] and capsys.readouterr().out.count("no time for") == len(GROUPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "--dry-run needs --out FILE"),
        (["--only", "nonsense"], "no group nonsense; there are tests, engine"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "PIL" else object())
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "pillow cannot be imported; python -m pip install pillow" in capsys.readouterr().err


def test_without_deepspeed_one_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.cases import engine_step
    from benchmarks.harness import networks

    added: list[dict[str, Any]] = []
    bench = SimpleNamespace(device=torch.device("cpu"), add=lambda **row: added.append(row))
    monkeypatch.setattr(engine_step, "find_spec", lambda name: None)
    engine_step.run(bench, networks.TOY, (2, 1))
    assert [row["missing"] for row in added] == ["deepspeed is not installed"]
