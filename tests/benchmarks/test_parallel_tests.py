"""Tests in several processes: what one test does to its process hides no other."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.harness import parallel_tests
from benchmarks.harness.parallel_tests import (
    Outcome,
    ParallelTests,
    group_of,
    summary,
    unknown_groups,
    wrong_groups,
)

MIXED = """
    import os, time
    import pytest

    @pytest.mark.parametrize("i", range(6))
    def test_passes(i):
        pass

    def test_fails():
        assert 1 == 2

    def test_hangs():
        time.sleep(1000)

    def test_ends_its_process():
        os._exit(3)

    @pytest.mark.skip(reason="not here")
    def test_is_skipped():
        pass
"""


def write(folder: Path, file: str, source: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(textwrap.dedent(source))


def states(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {test.partition("::")[2]: outcome.state for test, outcome in outcomes.items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_each_test_has_an_outcome_of_its_own(processes: int, tmp_path: Path) -> None:
    write(tmp_path / "tests", "test_attention_cuda.py", MIXED)
    outcomes = ParallelTests(tmp_path / "tests", processes=processes, limit=1.5).wait(60)
    assert states(outcomes) == {
        **{f"test_passes[{i}]": "passed" for i in range(6)},
        "test_fails": "failed",
        "test_hangs": "timed out",
        "test_ends_its_process": "crashed",
        "test_is_skipped": "skipped",
    }
    text = summary(outcomes)
    assert "attention      1 crashed, 1 failed, 6 passed, 1 skipped, 1 timed out" in text
    assert "assert 1 == 2" in text and "the process ended with status 3" in text and "stopped after 2 s" in text


def test_what_is_not_reached_is_not_run(tmp_path: Path) -> None:
    write(
        tmp_path / "tests", "test_step_cuda.py", "import time\n\ndef test_a(): time.sleep(1000)\n\ndef test_b(): pass"
    )
    began = time.monotonic()
    outcomes = ParallelTests(tmp_path / "tests", processes=1, limit=1000).wait(4)
    assert time.monotonic() - began < 10
    assert states(outcomes) == {"test_a": "timed out", "test_b": "not run"}


def test_tests_that_cannot_be_collected(tmp_path: Path) -> None:
    write(tmp_path / "tests", "test_step_cuda.py", "import no_such_module")
    outcomes = ParallelTests(tmp_path / "tests", processes=1, limit=10).wait(30)
    assert wrong_groups(outcomes) and "no_such_module" in summary(outcomes)


def test_tests_without_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before it finds a test is no success, whatever its status."""
    begin = parallel_tests.start
    monkeypatch.setattr(parallel_tests, "start", lambda module, *_, **options: begin("no_such_module", **options))
    outcomes = ParallelTests(tmp_path, processes=1, limit=10).wait(30)
    assert wrong_groups(outcomes) and "No module named no_such_module" in summary(outcomes)


def test_a_time_out_is_not_a_wrong_result() -> None:
    outcomes = {
        "test_attention_cuda.py::test_a": Outcome("timed out"),
        "test_group_norm_cuda.py::test_b[x]": Outcome("failed"),
        "test_threshold_cuda.py::test_c": Outcome("not run"),
        "test_step_cuda.py::test_d": Outcome("passed"),
    }
    assert wrong_groups(outcomes) == {"group_norm"}
    assert unknown_groups(outcomes) == {"attention", "threshold"}
    assert group_of("tests/gpu/test_sampler_step_cuda.py::test_e") == "sampler_step"
