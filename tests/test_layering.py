"""Who may import whom (CONTRIBUTING.md, "Layout"), read from the source of every module, and what an import may do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.import_graph import Import, graph, imported_module, imports, modules, reachable

# For each module, or package with all its modules, the others that it may import. A module with its own entry does
# not fall under its package's. Modules of one package may import each other. Names of fastimagen are without prefix.
SAMPLER = {  # runs with the core dependencies; reaches nothing outside of this table
    "fastimagen": "",
    "config": "",
    "files": "",
    "images": "files",
    "seeds": "",
    "logs": "",
    "config_file": "config files",
    "presets": "config config_file",
    "ops": "",
    "networks": "config ops text.embeddings",
    "diffusion": "config images ops",
    "text": "files",
    "cascade": "config config_file diffusion images networks seeds text",
    "sampling": "cascade config config_file diffusion fastimagen files images text",
}
TRAINING = {
    "data": "config files images seeds text",
    "train": "cascade config config_file data fastimagen files images networks presets sampling seeds",
    "evaluation": "data fastimagen files images sampling",
    "interop": "cascade config config_file fastimagen files networks presets sampling text",
    "info": "fastimagen ops",
    "demo": "cascade config files images sampling",
    "commands": "cascade demo diffusion evaluation files images sampling text",
    "cli": "commands config config_file data info interop logs sampling train",
}
KERNELS = {"fastimagen_kernels": ""}
PROGRAMS = {  # may import all of fastimagen
    "launch": "FASTIMAGEN",
    "benchmarks.harness": "FASTIMAGEN",
    "benchmarks.cases": "FASTIMAGEN benchmarks.harness",
    "benchmarks.studies": "FASTIMAGEN benchmarks.harness fastimagen_kernels",
    "benchmarks": "FASTIMAGEN benchmarks.cases benchmarks.harness",
}
TABLE = {name: allowed.split() for name, allowed in {**SAMPLER, **TRAINING, **KERNELS, **PROGRAMS}.items()}
FOLDERS = ("fastimagen", "kernels", "launch", "benchmarks")

CORE = "einops numpy PIL pydantic safetensors torch"
# What may be imported from elsewhere when a module is imported; CORE for modules of fastimagen without an entry.
THIRD_PARTY = {
    "fastimagen": "",
    "config": "pydantic",
    "config_file": "pydantic",
    "files": "",
    "presets": "",
    "info": "",
    "logs": "",
    "cli": "",
    "launch": "",
    "fastimagen_kernels": "torch triton",
}
# What may be imported inside functions as well.
DEFERRED = {
    "data": "braceexpand webdataset",
    "demo": "gradio",
    "files": "safetensors torch",
    "info": "torch",
    "launch": "torch",
    "ops": "fastimagen_kernels xformers",
    "text": "transformers",
    "train": "deepspeed psutil tqdm",
}
ONLY_DEFERRED = ("cli", "launch")  # import fastimagen inside functions: --help must not wait for torch


def short(module: str) -> str:
    """Names as in the table: modules of fastimagen without their prefix."""
    return module.removeprefix("fastimagen.")


def entry(module: str, table: dict) -> str | None:
    """The key of a table that covers a module: its own name or the nearest package's."""
    name = short(module)
    while name and name not in table:
        name = name.rpartition(".")[0]
    return name or None


def allows(permission: str, target: str) -> bool:
    """Whether a permission covers the import of module `target`."""
    if permission == "FASTIMAGEN":
        return target.partition(".")[0] == "fastimagen"
    return short(target) == permission or short(target).startswith(f"{permission}.")


def problems(root: Path) -> list[str]:
    """Every import that breaks a rule, one line each."""
    known = {name: path for folder in FOLDERS for name, path in modules(root, folder).items()}
    found = []
    if "fastimagen_kernels" in known:
        found.append("kernels/ has an __init__.py: another package is called `kernels`, and ours would hide it")
    for module, path in known.items():
        if entry(module, TABLE) is None:
            found.append(f"{module} is in no line of the table")
            continue
        for item in imports(path, module):
            target = imported_module(item.name, known)
            complaint = third_party_problem(module, item) if target is None else own_problem(module, target, item)
            if complaint:
                found.append(f"{module}:{item.line} imports {complaint}")
    edges = graph(root, FOLDERS)
    for module in edges:
        if entry(module, SAMPLER):
            outside = sorted(target for target in reachable(module, edges) if entry(target, {**TRAINING, **PROGRAMS}))
            found += [f"{module} samples without training dependencies, but reaches {target}" for target in outside]
    return found + [f"{module} imports itself in a circle" for module in edges if module in reachable(module, edges)]


def own_problem(module: str, target: str, item: Import) -> str | None:
    """What is wrong with importing a module of the repository, if anything."""
    owner = entry(module, TABLE)
    if owner in ONLY_DEFERRED and not item.deferred and entry(target, TABLE) != owner:
        return f"{short(target)} outside of functions"
    if target.partition(".")[0] == "fastimagen_kernels" and module.partition(".")[0] == "fastimagen":
        return third_party_problem(module, item)
    if owner == entry(target, TABLE) or any(allows(permission, target) for permission in TABLE[owner or ""]):
        return None
    return f"{short(target)}; {owner} may import {', '.join(TABLE[owner or '']) or 'nothing of the repository'}"


def third_party_problem(module: str, item: Import) -> str | None:
    """What is wrong with importing a module from elsewhere, if anything."""
    if item.package in sys.stdlib_module_names or item.package == "__future__":
        return None
    if item.package in ("benchmarks", "tests"):
        return item.package
    if module.partition(".")[0] == "benchmarks":  # measures other packages
        return None
    owner = entry(module, THIRD_PARTY)
    allowed = (THIRD_PARTY[owner] if owner not in (None, "fastimagen") or module == "fastimagen" else CORE).split()
    if item.deferred:
        allowed = [*allowed, *DEFERRED.get(entry(module, DEFERRED) or "", "").split()]
    return None if item.package in allowed else item.package + ("" if item.deferred else " outside of functions")


def test_imports_follow_the_table() -> None:
    assert problems(ROOT) == []


def test_tests_and_benchmarks_are_imported_by_their_own_folders_only() -> None:
    """Tests import benchmarks in tests/benchmarks and tests/gpu only."""
    users = {
        module.rpartition(".")[0]
        for module, path in modules(ROOT, "tests").items()
        if any(item.package == "benchmarks" for item in imports(path, module))
    }
    assert users <= {"tests.benchmarks", "tests.gpu"}


def test_no_permission_is_unused() -> None:
    edges = graph(ROOT, FOLDERS)
    unused = []
    for owner, permissions in TABLE.items():
        targets = {target for module in edges if entry(module, TABLE) == owner for target in edges[module]}
        unused += [f"{owner}: {name}" for name in permissions if not any(allows(name, target) for target in targets)]
    used = {(entry(module, DEFERRED), item.package) for module, item in all_imports()}
    unused += [
        f"{owner}: {name}" for owner, names in DEFERRED.items() for name in names.split() if (owner, name) not in used
    ]
    used = {(entry(module, THIRD_PARTY), item.package) for module, item in all_imports() if not item.deferred}
    unused += [
        f"{owner}: {name}"
        for owner, names in THIRD_PARTY.items()
        for name in names.split()
        if (owner, name) not in used
    ]
    assert unused == []


def all_imports() -> list[tuple[str, Import]]:
    """(module, import) for every import of the repository's own modules."""
    return [
        (module, item)
        for folder in FOLDERS
        for module, path in modules(ROOT, folder).items()
        for item in imports(path, module)
    ]


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("fastimagen/diffusion/samplers.py", "def f():\n    from ..data import order", "imports data.order; diffusion"),
        ("fastimagen/networks/layers.py", "from ..text.t5 import T5Encoder", "imports text.t5; networks may import"),
        ("fastimagen/networks/layers.py", "import fastimagen.train.ema", "imports train.ema; networks may import"),
        ("fastimagen/data/loader.py", "from ..train import ema", "imports train.ema; data may import"),
        ("fastimagen/cli.py", "from .config import Config", "imports config outside of functions"),
        ("fastimagen/config.py", "import torch", "imports torch outside of functions"),
        ("fastimagen/config.py", "def f():\n    import torch", "imports torch"),
        (
            "fastimagen/ops/attention.py",
            "import fastimagen_kernels.attention",
            "fastimagen_kernels outside of functions",
        ),
        ("fastimagen/networks/unet.py", "def f():\n    import fastimagen_kernels", "imports fastimagen_kernels"),
        ("fastimagen/text/t5.py", "import transformers", "imports transformers outside of functions"),
        ("fastimagen/data/shards.py", "class C:\n    import webdataset", "imports webdataset outside of functions"),
        ("fastimagen/new.py", "", "fastimagen.new is in no line of the table"),
        ("fastimagen/info.py", "import benchmarks.report", "imports benchmarks.report; info may import"),
        ("fastimagen/train/ema.py", "from . import trainer", "train.ema imports itself in a circle"),
        ("kernels/attention.py", "from fastimagen import ops", "imports ops; fastimagen_kernels may import"),
        ("kernels/attention.py", "import einops", "imports einops outside of functions"),
        ("kernels/__init__.py", "", "kernels/ has an __init__.py"),
        ("launch/train.py", "import torch", "imports torch outside of functions"),
        ("benchmarks/harness/rows.py", "from ..cases import step", "imports benchmarks.cases.step; benchmarks.harness"),
        ("benchmarks/report.py", "from tests.conftest import ROOT", "imports tests"),
    ],
)
def test_a_forbidden_import_is_reported(path: str, source: str, complaint: str, tmp_path: Path) -> None:
    for name in ("config", "text/t5", "ops/attention", "data/order", "train/ema"):
        write(tmp_path / f"fastimagen/{name}.py", "")
    write(tmp_path / "fastimagen/train/trainer.py", "from . import ema")
    write(tmp_path / "fastimagen/ops/__init__.py", "")
    write(tmp_path / "kernels/attention.py", "")
    write(tmp_path / "benchmarks/cases/step.py", "")
    write(tmp_path / "benchmarks/report.py", "")
    assert problems(tmp_path) == []
    write(tmp_path / path, source)
    assert any(complaint in line for line in problems(tmp_path)), problems(tmp_path)


def test_a_detour_below_the_sampler_line_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the table allowed every single step."""
    monkeypatch.setitem(TABLE, "text", ["data"])
    write(tmp_path / "fastimagen/sampling/pipeline.py", "from ..text.t5 import T5Encoder")
    write(tmp_path / "fastimagen/text/t5.py", "from ..data.order import Order")
    write(tmp_path / "fastimagen/data/order.py", "")
    assert problems(tmp_path) == [
        f"fastimagen.{name} samples without training dependencies, but reaches fastimagen.data.order"
        for name in ("sampling.pipeline", "text.t5")
    ]


def test_relative_and_deferred_imports_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "fastimagen/data/loader.py"
    write(path, "from ..text import t5\nimport torch as t\ndef f():\n    from .order import Order as O\n")
    write(tmp_path / "fastimagen/text/t5.py", "")
    write(tmp_path / "fastimagen/data/order.py", "")
    assert imports(path, "fastimagen.data.loader") == [
        Import("fastimagen.text.t5", 1, deferred=False),
        Import("torch", 2, deferred=False),
        Import("fastimagen.data.order.Order", 4, deferred=True),
    ]
    edges = graph(tmp_path, ("fastimagen",))
    assert edges["fastimagen.data.loader"] == {"fastimagen.text.t5", "fastimagen.data.order"}


def write(path: Path, source: str) -> None:
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


def test_importing_a_module_has_no_side_effect() -> None:
    names = list(modules(ROOT, "fastimagen"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
