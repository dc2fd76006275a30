"""Whole U-Nets whose kernels run in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.interpreting import interpreted_tests


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", interpreted_tests("interpreted_networks.py"))
def test_in_the_interpreter(interpreted: str, check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(interpreted)
