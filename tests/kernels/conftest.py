"""Fixtures of the tests that run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from fastimagen import ops
from tests.kernels.interpreting import patch_once, round_to_nearest, run_interpreted


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the kernels on CPU tensors, in an interpreter that is faster and more like a GPU than Triton's own."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 in the environment")
    patch_once(monkeypatch)
    round_to_nearest(monkeypatch)
    ops.set_backend("triton")
    yield
    ops.set_backend("auto")


@pytest.fixture(scope="module")
def check_interpreted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], None]:
    """Check a test of interpreted_OP.py by name, from test_OP.py; all selected ones run in one child process."""
    names = [
        item.callspec.params["interpreted"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and "check_interpreted" in item.fixturenames
    ]
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    failures = run_interpreted(request.path.name.replace("test_", "interpreted_", 1), names, report)

    def check(name: str) -> None:
        if name in failures:
            pytest.fail(failures[name], pytrace=False)

    return check
