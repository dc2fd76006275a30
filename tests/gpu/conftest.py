"""All tests of this folder need a CUDA GPU, and compute products and convolutions in full fp32."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastimagen import ops

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """For runs without the repository's pyproject.toml."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: compiles whole networks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    """No TF32, which PyTorch uses for fp32 convolutions by default: its 10 bits are far below the tests' bounds."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    for owner in owners:
        owner.allow_tf32 = False
    yield
    for owner, allowed in zip(owners, before):
        owner.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def backend_as_before() -> Iterator[None]:
    before = ops.backend()
    yield
    ops.set_backend(before)


@pytest.fixture(params=["triton", "torch", "xformers"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; xFormers computes attention alone."""
    if request.param == "xformers":
        if "attention" not in request.path.name:
            pytest.skip("xFormers computes attention alone")
        if find_spec("xformers") is None:
            pytest.skip("xformers is not installed")
    ops.set_backend(request.param)
    return request.param
