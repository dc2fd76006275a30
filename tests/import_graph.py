"""The import graph of the repository, read from the source without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"kernels": "fastimagen_kernels"}
"""Folders whose import package has another name."""
LOADERS = ("import_module", "import_extra")
"""Functions that import the module that their first argument names."""


@dataclass(frozen=True)
class Import:
    """One imported name.

    name: in full, such as fastimagen.config.UNetConfig. deferred: whether the statement is inside a function or under
    `if TYPE_CHECKING`, so that importing the module does not run it. typing_only: under `if TYPE_CHECKING`.
    """

    name: str
    line: int
    deferred: bool
    typing_only: bool = False

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]


def modules(root: Path, folder: str) -> dict[str, Path]:
    """The Python files below `root`/`folder` by module name, packages without `.__init__`."""
    found = {}
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root / folder).with_suffix("").parts
        name = ".".join([PACKAGES.get(folder, folder), *(part for part in parts if part != "__init__")])
        found[name] = path
    return found


def imports(path: Path, module: str) -> list[Import]:
    """All imports of a file; `module` is its name, from which relative imports are resolved."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return list(_visit(ast.parse(path.read_text()), package, deferred=False))


def _visit(node: ast.AST, package: list[str], deferred: bool, typing_only: bool = False) -> Iterator[Import]:
    for name in _imported_names(node, package):
        yield Import(name, node.lineno, deferred, typing_only)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        deferred = True
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.body:
            yield from _visit(child, package, deferred=True, typing_only=True)
        for child in node.orelse:
            yield from _visit(child, package, deferred)
        return
    for child in ast.iter_child_nodes(node):
        yield from _visit(child, package, deferred, typing_only)


def _imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """The names that this node alone imports, in full."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parent = package[: len(package) - node.level + 1] if node.level else []
        source = [*parent, node.module] if node.module else parent
        return [".".join([*source, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        function, argument = ast.unparse(node.func).rpartition(".")[2], node.args[0]
        if function in LOADERS and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return [argument.value]
    return []


def imported_module(name: str, known: dict[str, Path]) -> str | None:
    """The module among `known` that the import of `name` loads; None if there is none."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def graph(root: Path, folders: tuple[str, ...], *, typing: bool = True) -> dict[str, set[str]]:
    """The modules that every module of these folders imports, deferred imports included. typing: those under
    `if TYPE_CHECKING` too."""
    known: dict[str, Path] = {}
    for folder in folders:
        known |= modules(root, folder)
    edges = {}
    for module, path in known.items():
        used = [item for item in imports(path, module) if typing or not item.typing_only]
        targets = {imported_module(item.name, known) for item in used}
        edges[module] = {target for target in targets if target is not None and target != module}
    return edges


def reachable(module: str, edges: dict[str, set[str]]) -> set[str]:
    """All modules that `module` imports, directly or through others."""
    reached: set[str] = set()
    waiting = set(edges.get(module, ()))
    while waiting:
        target = waiting.pop()
        if target not in reached:
            reached.add(target)
            waiting |= edges.get(target, set())
    return reached
