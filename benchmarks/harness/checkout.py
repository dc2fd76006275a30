"""Lets a checkout run as it is, without an installation: kernels/ under its package name.

Importing this module is enough; `pytest -p benchmarks.harness.checkout` does it for tests.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Put the checkout on the path, and kernels/ behind the name fastimagen_kernels unless that is installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if find_spec("fastimagen_kernels") is None:
        spec = ModuleSpec("fastimagen_kernels", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "kernels")]
        sys.modules["fastimagen_kernels"] = module_from_spec(spec)


make_importable()
