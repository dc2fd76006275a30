"""Who may import whom, read from the source of every module, and what importing may not do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each module, or package with all its modules, and what of fastimagen it may import. A module that stands
# here itself does not fall under its package. Modules of one package may import each other.
ABOVE = {  # the sampler line: they reach nothing that stands below
    "config": "",
    "config_file": "config",
    "presets": "config config_file",
    "ops": "",
    "text": "config",
    "images": "",
    "schedule": "config",  # a schedule is made from its section of the configuration
    "diffusion": "config schedule ops",
    "samplers": "schedule ops",
    "guidance": "config schedule ops diffusion samplers",  # from a network's output to a sampler's next x
    "convolution": "",
    "layers": "config ops convolution",
    "attention": "config ops",
    "unet": "config layers attention convolution text",  # TextEmbeddings is what it is conditioned on
    "editing": "images samplers schedule",
    "tiling": "",
    "cascade": "config config_file presets unet diffusion samplers guidance schedule editing tiling images text",
    "shared_sampling": "pipeline images text",
    "pipeline": "config config_file cascade editing images text",
}
BELOW = {
    "data": "images text",
    "data.source": "config images text",  # the one room of data/ that opens what a configuration names
    "train": " ".join(ABOVE) + " data",
    "export": "config config_file pipeline train.checkpoint train.start",
    "evaluate": "pipeline images data",
    "interop": "config config_file presets unet cascade pipeline text",  # where MinImagen's numbers stand
    "info": "ops",
    "demo": "pipeline images samplers",
    "cli": " ".join(ABOVE) + " data train export evaluate interop info demo",
}
ALLOWED = {name: imports.split() for name, imports in {**ABOVE, **BELOW}.items()}
ONLY_IN_FUNCTIONS = {"cli"}  # --help must not wait for torch

CORE = {"torch", "safetensors", "numpy", "einops", "pydantic", "PIL"}
# At import; for modules that are not named, CORE.
THIRD_PARTY = {"config": {"pydantic"}, "config_file": {"pydantic"}, "presets": set(), "info": set(), "cli": set()}
IN_FUNCTIONS = {
    "text": {"transformers"},
    "ops": {"fastimagen_kernels", "xformers"},
    "info": {"torch"},
    "cli": {"torch"},
    "demo": {"gradio"},
    "data": {"webdataset", "braceexpand"},
    "train": {"deepspeed", "psutil", "tqdm"},
}
KERNELS = {"torch", "triton", "fastimagen_kernels"}
NOBODYS = {"tests": {"tests"}, "benchmarks": {"benchmarks", "tests"}}  # and the folders that may import them


@dataclass(frozen=True)
class Import:
    """One import statement: the full name of what is imported, and whether it waits inside a function."""

    name: str
    line: int
    in_function: bool


def imports(path: Path, module: str) -> Iterator[Import]:
    """All imports of a file, wherever they stand; `module` (a.b) resolves the relative ones."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                source = ".".join([*base, *([child.module] if child.module else [])])
                yield from (Import(f"{source}.{alias.name}", child.lineno, in_function) for alias in child.names)
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, inside or _is_type_checking(child))

    yield from visit(ast.parse(path.read_text()), False)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def modules(folder: Path, package: str) -> dict[str, Path]:
    """{"package.a.b": path} of all Python files below a folder."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def entry(name: str, table: dict) -> str | None:
    """The line of a table that speaks for a module, without "fastimagen.": its own, or its package's."""
    return next((key for key in (name, name.partition(".")[0]) if key in table), None)


def problems(root: Path) -> list[str]:
    """Every breach of the house's rules, one line each."""
    found = []
    ours = modules(root / "fastimagen", "fastimagen")
    edges: dict[str, set[str]] = {}
    for module, path in ours.items():
        name = module.removeprefix("fastimagen").removeprefix(".")
        if name and entry(name, ALLOWED) is None:
            found.append(f"{module} stands in no line of the table")
            continue
        edges[name] = set()
        for item in imports(path, module):
            where = f"{module}:{item.line}"
            if item.name.split(".")[0] == "fastimagen":
                if (target := _target(item.name, ours)) and target != name:
                    edges[name].add(target)
                    found += _first_party(name, target, item, where)
            else:
                found += _third_party(name, item, where)
    found += [
        f"{name}, above the sampler line, reaches {target}"
        for name in edges
        if entry(name, ABOVE)
        for target in sorted(_reached(name, edges))
        if entry(target, ABOVE) is None
    ]
    found += [f"{name} imports itself in a circle" for name in edges if name in _reached(name, edges)]
    return found + _kernels(root) + _outside(root)


def _target(name: str, ours: dict[str, Path]) -> str | None:
    """The module of fastimagen that an import reaches, without "fastimagen."; None for the package itself."""
    while name not in ours:
        name = name.rpartition(".")[0]
    return name.removeprefix("fastimagen").removeprefix(".") or None


def _first_party(name: str, target: str, item: Import, where: str) -> list[str]:
    if name in ONLY_IN_FUNCTIONS and not item.in_function:
        return [f"{where} imports {target} outside of functions"]
    package = name.partition(".")[0]
    siblings = package == target.partition(".")[0]
    allowed = ALLOWED.get(entry(name, ALLOWED) or "", [])
    if siblings or target in allowed or target.partition(".")[0] in allowed:
        return []
    who, what = name or "the package", ", ".join(allowed) or "nothing of ours"
    return [f"{where} imports {target}; {who} may import {what}"]


def _third_party(name: str, item: Import, where: str) -> list[str]:
    top = item.name.split(".")[0]
    if top in sys.stdlib_module_names:
        return []
    allowed = THIRD_PARTY.get(entry(name, THIRD_PARTY) or "", CORE if name else set())
    if item.in_function:
        allowed = allowed | IN_FUNCTIONS.get(entry(name, IN_FUNCTIONS) or "", set())
    place = "" if item.in_function else " outside of functions"
    return [] if top in allowed else [f"{where} imports {top}{place}"]


def _reached(name: str, edges: dict[str, set[str]]) -> set[str]:
    """Everything that importing `name`, and using it, may import."""
    reached: set[str] = set()
    waiting = set(edges[name])
    while waiting:
        target = waiting.pop()
        reached.add(target)
        waiting |= edges.get(target, set()) - reached
    return reached


def _kernels(root: Path) -> list[str]:
    if not (root / "kernels").exists():
        return []
    # Another package is called kernels too: as a package, ours would hide it from a clone's root.
    found = ["kernels/ has an __init__.py"] if (root / "kernels/__init__.py").exists() else []
    for module, path in modules(root / "kernels", "fastimagen_kernels").items():
        found += [
            f"{module}:{item.line} imports {item.name}"
            for item in imports(path, module)
            if (top := item.name.split(".")[0]) not in KERNELS and top not in sys.stdlib_module_names
        ]
    return found


def _outside(root: Path) -> list[str]:
    """launch/ imports lazily, and nobody builds on tests or benchmarks."""
    found = []
    for folder in ("fastimagen", "kernels", "launch", "benchmarks", "tests"):
        for module, path in modules(root / folder, folder).items():
            for item in imports(path, module):
                top = item.name.split(".")[0]
                if folder not in NOBODYS.get(top, {folder}):
                    found.append(f"{module}:{item.line} imports {top}")
                if folder == "launch" and not item.in_function and top not in sys.stdlib_module_names:
                    found.append(f"{module}:{item.line} imports {top} outside of functions")
    return found


def test_the_house_keeps_its_rules() -> None:
    assert problems(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        (
            "fastimagen/samplers.py",
            "def f():\n    from .data import order",
            "fastimagen.samplers:2 imports data.order; samplers",
        ),
        ("fastimagen/layers.py", "from fastimagen.text import TextEmbeddings", "fastimagen.layers:1 imports text"),
        ("fastimagen/layers.py", "import fastimagen.unet", "fastimagen.layers:1 imports unet"),
        ("fastimagen/data/order.py", "from ..config import Config", "fastimagen.data.order:1 imports config"),
        ("fastimagen/data/loader.py", "from ..train import ema", "fastimagen.data.loader:1 imports train"),
        ("fastimagen/export.py", "from .train.trainer import Trainer", "fastimagen.export:1 imports train.trainer"),
        ("fastimagen/cli.py", "from .config import Config", "fastimagen.cli:1 imports config outside of functions"),
        (
            "fastimagen/__init__.py",
            "from .unet import UNet",
            "fastimagen:1 imports unet; the package may import nothing",
        ),
        ("fastimagen/config.py", "import torch", "fastimagen.config:1 imports torch outside of functions"),
        (
            "fastimagen/ops/attention.py",
            "import fastimagen_kernels.attention",
            "fastimagen.ops.attention:1 imports fastimagen_kernels outside",
        ),
        (
            "fastimagen/unet.py",
            "def f():\n    import fastimagen_kernels",
            "fastimagen.unet:2 imports fastimagen_kernels",
        ),
        ("fastimagen/text.py", "import transformers", "fastimagen.text:1 imports transformers outside of functions"),
        ("fastimagen/data/shards.py", "class C:\n    import webdataset", "fastimagen.data.shards:2 imports webdataset"),
        ("fastimagen/newcomer.py", "", "fastimagen.newcomer stands in no line of the table"),
        ("fastimagen/info.py", "import benchmarks", "fastimagen.info:1 imports benchmarks"),
        ("fastimagen/train/ema.py", "from . import ema2\n", "train.ema imports itself in a circle"),
        ("kernels/attention.py", "from fastimagen import ops", "fastimagen_kernels.attention:1 imports fastimagen.ops"),
        ("kernels/__init__.py", "", "kernels/ has an __init__.py"),
        ("launch/train.py", "import torch", "launch.train:1 imports torch outside of functions"),
        ("benchmarks/bench.py", "from tests.conftest import ROOT", "benchmarks.bench:1 imports tests"),
    ],
)
def test_every_breach_is_seen(path: str, source: str, complaint: str, tmp_path: Path) -> None:
    for module in ("unet", "text", "config", "data/order", "train/ema", "train/trainer"):
        _write(tmp_path / f"fastimagen/{module}.py", "")
    _write(tmp_path / "fastimagen/train/ema2.py", "from . import ema")
    assert problems(tmp_path) == []
    _write(tmp_path / path, source)
    assert any(line.startswith(complaint) for line in problems(tmp_path)), problems(tmp_path)


def test_a_way_around_a_neighbour_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table itself may be wrong: what stands above the line reaches nothing below, through whomever."""
    monkeypatch.setitem(ALLOWED, "text", ["data"])
    for path, source in (
        ("pipeline", "from .text import T"),
        ("text", "from .data.order import O"),
        ("data/order", ""),
    ):
        _write(tmp_path / f"fastimagen/{path}.py", source)
    assert problems(tmp_path) == [
        f"{name}, above the sampler line, reaches data.order" for name in ("pipeline", "text")
    ]


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


IMPORT_ALL = """
import importlib, os, sys

import fastimagen
for light in ("cli", "info", "config", "presets"):
    importlib.import_module(f"fastimagen.{light}")
assert "torch" not in sys.modules, "fastimagen, its command line and its configuration must not import torch"

import einops, numpy, PIL.Image, PIL.ImageDraw, PIL.ImageFont, safetensors.torch, torch, torch.distributed
import torch.nn.functional

def asked(*arguments, **keywords):
    raise AssertionError("importing asks for a device")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, asked)
torch.accelerator.current_accelerator = torch.accelerator.is_available = asked

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def watch(event, arguments):
    if event == "open" and (str(arguments[0]).endswith((".py", ".pyc", ".so")) and not arguments[2] & WRITES):
        return
    if event.startswith(("open", "socket.", "urllib.", "subprocess.", "os.putenv", "os.unset", "os.mkdir")):
        raise AssertionError(f"importing does {event} {arguments}")

before, had = dict(os.environ), set(sys.modules)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in fastimagen.__all__:
    getattr(fastimagen, name)
assert dict(os.environ) == before, "importing sets environment variables"
heavy = {"transformers", "webdataset", "deepspeed", "triton", "sentencepiece", "psutil"}
heavy &= set(sys.modules) - had
assert not heavy, f"importing brings {heavy}"
"""


def test_importing_does_nothing_but_import() -> None:
    names = list(modules(ROOT / "fastimagen", "fastimagen"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
