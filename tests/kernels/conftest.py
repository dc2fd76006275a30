"""Shared by the tests that run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops run their kernels on CPU tensors, faster and truer to a GPU than Triton's interpreter is by itself."""
    from fastimagen import ops
    from tests.kernels.interpreting import patch_once, round_to_nearest

    patch_once(monkeypatch)
    round_to_nearest(monkeypatch)
    ops.set_backend("triton")
    yield
    ops.set_backend("auto")
