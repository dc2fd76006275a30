"""The import graph that test_layering.py checks: how imports are found and resolved."""

from __future__ import annotations

from pathlib import Path

from tests.import_graph import Import, graph, imported_module, imports, modules, reachable

SOURCE = """\
from typing import TYPE_CHECKING
import torch as t, numpy
from ..text import t5
from . import shards
from .order import Order as O
if TYPE_CHECKING:
    from ..config import Config
else:
    Config = object
class Loader:
    import einops
    def f(self):
        from .source import open_split
        return lambda: importlib.import_module("PIL.Image")
import_extra("webdataset", user="packing shards", extra="data")
import_module(name)
"""


def write(path: Path, source: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_every_kind_of_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "fastimagen/data/loader.py"
    write(path, SOURCE)
    assert imports(path, "fastimagen.data.loader") == [
        Import("typing.TYPE_CHECKING", 1, deferred=False),
        Import("torch", 2, deferred=False),
        Import("numpy", 2, deferred=False),
        Import("fastimagen.text.t5", 3, deferred=False),
        Import("fastimagen.data.shards", 4, deferred=False),
        Import("fastimagen.data.order.Order", 5, deferred=False),
        Import("fastimagen.config.Config", 7, deferred=True, typing_only=True),
        Import("einops", 11, deferred=False),
        Import("fastimagen.data.source.open_split", 13, deferred=True),
        Import("PIL.Image", 14, deferred=True),
        Import("webdataset", 15, deferred=False),
    ]
    assert Import("PIL.Image", 14, deferred=True).package == "PIL"


def test_relative_imports_of_a_package_start_at_the_package(tmp_path: Path) -> None:
    write(tmp_path / "fastimagen/ops/__init__.py", "from .attention import attention\nfrom .. import config")
    names = [item.name for item in imports(tmp_path / "fastimagen/ops/__init__.py", "fastimagen.ops")]
    assert names == ["fastimagen.ops.attention.attention", "fastimagen.config"]


def test_modules_are_named_as_they_are_imported(tmp_path: Path) -> None:
    for name in ("fastimagen/__init__.py", "fastimagen/ops/__init__.py", "fastimagen/ops/layout.py", "kernels/a.py"):
        write(tmp_path / name)
    assert list(modules(tmp_path, "fastimagen")) == ["fastimagen", "fastimagen.ops", "fastimagen.ops.layout"]
    assert modules(tmp_path, "kernels") == {"fastimagen_kernels.a": tmp_path / "kernels/a.py"}


def test_an_imported_name_leads_to_the_module_that_defines_it() -> None:
    known = {"fastimagen": Path(), "fastimagen.config": Path()}
    assert imported_module("fastimagen.config.UNetConfig", known) == "fastimagen.config"
    assert imported_module("fastimagen.config", known) == "fastimagen.config"
    assert imported_module("fastimagen.__version__", known) == "fastimagen"
    assert imported_module("torch.nn", known) is None


def test_the_graph_has_deferred_imports_and_is_followed_to_its_end(tmp_path: Path) -> None:
    write(tmp_path / "fastimagen/a.py", "def f():\n    from . import b")
    write(tmp_path / "fastimagen/b.py", "import torch\nfrom fastimagen_kernels.k import launch\nfrom .b import g")
    write(tmp_path / "kernels/k.py")
    edges = graph(tmp_path, ("fastimagen", "kernels"))
    assert edges == {
        "fastimagen.a": {"fastimagen.b"},
        "fastimagen.b": {"fastimagen_kernels.k"},
        "fastimagen_kernels.k": set(),
    }
    assert reachable("fastimagen.a", edges) == {"fastimagen.b", "fastimagen_kernels.k"}
    assert "a" in reachable("a", {"a": {"b"}, "b": {"a"}})


def test_imports_for_types_alone_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "fastimagen/a.py", "if TYPE_CHECKING:\n    from . import b")
    write(tmp_path / "fastimagen/b.py", "from . import a")
    assert graph(tmp_path, ("fastimagen",))["fastimagen.a"] == {"fastimagen.b"}
    assert graph(tmp_path, ("fastimagen",), typing=False) == {"fastimagen.a": set(), "fastimagen.b": {"fastimagen.a"}}
