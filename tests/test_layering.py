"""Who may import whom (CONTRIBUTING.md, "Layout"), read from the source of every module, and what an import may do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.import_graph import Import, graph, imported_module, imports, modules, reachable

# For each module, or package with all its modules, the others that it may import. A module with an entry of its own is
# not covered by the entry of its package. Modules of one package may import each other. Modules of fastimagen are named
# without the prefix; "fastimagen" itself stands for its __version__ alone.
SAMPLER = {  # what sampling needs: runs with the core dependencies and reaches nothing outside of this table
    "fastimagen": "",
    "section": "",
    "network_config": "config_rules section",
    "sizes": "",
    "data_config": "section sizes",
    "diffusion_config": "config_rules section",
    "config": "config_rules data_config diffusion_config network_config section",
    "config_rules": "config diffusion_config network_config respacing section sizes",
    "respacing": "",
    "files": "",
    "extras": "",
    "images": "files lettering png_strips sizes",
    "png_strips": "",
    "lettering": "",
    "seeds": "",
    "words": "",
    "logs": "",
    "config_file": "config files section",
    "presets": "config config_file diffusion_config network_config transformer_presets",
    "transformer_presets": "config diffusion_config network_config",
    "ops": "extras",
    "networks": "network_config ops text.embeddings",
    "diffusion": "config diffusion_config images ops respacing sizes",
    "text": "extras files",
    "cascade": "config config_file config_rules diffusion diffusion_config images networks seeds sizes text",
    "sampling": "cascade config config_file config_rules diffusion extras fastimagen files images networks.lora sizes "
    "text",
}
TRAINING = {
    "data": "config config_rules data_config network_config extras fastimagen files images seeds sizes text words",
    "train": "cascade config config_file config_rules data data_config diffusion diffusion_config extras fastimagen "
    "files images network_config networks ops presets sampling seeds sizes text words",
    "evaluation": "data fastimagen files images sampling",
    "interop": "cascade config config_file network_config fastimagen files networks presets sampling text",
    "info": "fastimagen ops",
    "demo": "cascade config files images sampling text",
    "starting_files": "",
    "commands": "cascade config config_file data data_config demo diffusion diffusion_config evaluation extras files "
    "network_config presets sampling section starting_files text train",
    "cli": "commands config_file fastimagen info interop logs sampling starting_files train",
    "__main__": "cli",
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
# The third-party packages that may be imported at module level; CORE for modules of fastimagen without an entry.
THIRD_PARTY = {
    "fastimagen": "",
    "config": "pydantic",
    "data_config": "pydantic",
    "config_file": "pydantic",
    "config_rules": "",
    "respacing": "",
    "files": "",
    "extras": "",
    "presets": "",
    "transformer_presets": "",
    "info": "",
    "logs": "",
    "starting_files": "",
    "cli": "",
    "launch": "",
    "fastimagen_kernels": "torch triton",
}
# The third-party packages that may also be imported inside functions.
DEFERRED = {
    "commands": "psutil torch",
    "data": "braceexpand fsspec pyarrow urllib3 webdataset",
    "demo": "gradio starlette",
    "files": "safetensors torch",
    "info": "torch",
    "ops": "fastimagen_kernels xformers",
    "sampling": "huggingface_hub",
    "text": "huggingface_hub transformers",
    "train": "deepspeed matplotlib psutil tqdm transformers wandb",
}
ONLY_DEFERRED = ("cli", "launch")  # import fastimagen inside functions only, so that --help does not import torch


def short(module: str) -> str:
    """The name in the table: modules of fastimagen have no prefix."""
    return module.removeprefix("fastimagen.")


def entry(module: str, table: dict) -> str | None:
    """The key of the entry that covers a module: its own name, or that of the nearest package with an entry."""
    name = short(module)
    while name and name not in table:
        name = name.rpartition(".")[0]
    return name or None


def allows(permission: str, target: str) -> bool:
    """Whether a permission covers the import of module `target`."""
    if permission == "FASTIMAGEN":
        return target.partition(".")[0] == "fastimagen"
    if permission == "fastimagen":
        return target == "fastimagen"
    return short(target) == permission or short(target).startswith(f"{permission}.")


def problems(root: Path) -> list[str]:
    """Every import that breaks a rule, one line each."""
    known = {name: path for folder in FOLDERS for name, path in modules(root, folder).items()}
    found = []
    if "fastimagen_kernels" in known:
        found.append("kernels/ has an __init__.py: it would hide Hugging Face's package `kernels`")
    for module, path in known.items():
        if entry(module, TABLE) is None:
            found.append(f"{module} has no entry in the table")
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
            found += [f"{module} must work with the core dependencies, but reaches {target}" for target in outside]
    run = graph(root, FOLDERS, typing=False)
    return found + [f"{module} is part of an import cycle" for module in run if module in reachable(module, run)]


def own_problem(module: str, target: str, item: Import) -> str | None:
    """What is wrong with importing a module of the repository, or None."""
    owner = entry(module, TABLE)
    exported = item.name.removeprefix("fastimagen.")
    if target == "fastimagen" and module.startswith("fastimagen.") and exported != "__version__":
        return f"{exported} from fastimagen, which loads it lazily: import the module that defines it"
    if owner in ONLY_DEFERRED and not item.deferred and entry(target, TABLE) != owner:
        return f"{short(target)} at module level"
    if target.partition(".")[0] == "fastimagen_kernels" and module.partition(".")[0] == "fastimagen":
        return third_party_problem(module, item)
    if owner == entry(target, TABLE) or any(allows(permission, target) for permission in TABLE[owner or ""]):
        return None
    return f"{short(target)}; {owner} may import {', '.join(TABLE[owner or '']) or 'nothing of the repository'}"


def third_party_problem(module: str, item: Import) -> str | None:
    """What is wrong with importing a third-party package, or None."""
    if item.package in sys.stdlib_module_names or item.package == "__future__":
        return None
    if item.package in ("benchmarks", "tests"):
        return item.package
    if module.partition(".")[0] == "benchmarks":  # it measures third-party packages
        return None
    owner = entry(module, THIRD_PARTY)
    allowed = CORE if owner is None else THIRD_PARTY[owner]
    if item.deferred:
        allowed += " " + DEFERRED.get(entry(module, DEFERRED) or "", "")
    if item.package in allowed.split():
        return None
    return item.package if item.deferred else f"{item.package} at module level"


def test_imports_follow_the_table() -> None:
    assert problems(ROOT) == []


def test_only_the_tests_of_benchmarks_and_the_gpu_tests_import_benchmarks() -> None:
    users = {
        module.rpartition(".")[0]
        for module, path in modules(ROOT, "tests").items()
        if any(item.package == "benchmarks" for item in imports(path, module))
    }
    assert users == {"tests.benchmarks", "tests.gpu"}


def test_no_permission_is_unused() -> None:
    edges = graph(ROOT, FOLDERS)
    unused = []
    for owner, permissions in TABLE.items():
        targets = {target for module in edges if entry(module, TABLE) == owner for target in edges[module]}
        unused += [f"{owner}: {name}" for name in permissions if not any(allows(name, target) for target in targets)]
    used_deferred = {(entry(module, DEFERRED), item.package) for module, item in all_imports() if item.deferred}
    unused += [f"{owner}: {name}" for owner, name in pairs(DEFERRED) if (owner, name) not in used_deferred]
    at_module_level = [(module, item) for module, item in all_imports() if not item.deferred]
    used = {(entry(module, THIRD_PARTY), item.package) for module, item in at_module_level}
    unused += [f"{owner}: {name}" for owner, name in pairs(THIRD_PARTY) if (owner, name) not in used]
    used_core = {item.package for module, item in at_module_level if module.startswith("fastimagen.")}
    unused += [f"core: {name}" for name in CORE.split() if name not in used_core]
    unused += [f"{owner} has no module" for owner in TABLE if not any(entry(name, TABLE) == owner for name in edges)]
    assert unused == []


def pairs(table: dict[str, str]) -> list[tuple[str, str]]:
    """(module or package, permission) for every permission of a table."""
    return [(owner, name) for owner, names in table.items() for name in names.split()]


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
        ("fastimagen/cli.py", "from .config import Config", "imports config at module level"),
        ("fastimagen/config.py", "import torch", "imports torch at module level"),
        ("fastimagen/config.py", "def f():\n    import torch", "imports torch"),
        (
            "fastimagen/ops/attention.py",
            "import fastimagen_kernels.attention",
            "imports fastimagen_kernels at module level",
        ),
        ("fastimagen/networks/unet.py", "def f():\n    import fastimagen_kernels", "imports fastimagen_kernels"),
        ("fastimagen/text/t5.py", "import transformers", "imports transformers at module level"),
        ("fastimagen/data/shards.py", "class C:\n    import webdataset", "imports webdataset at module level"),
        ("fastimagen/new.py", "", "fastimagen.new has no entry in the table"),
        ("fastimagen/sampling/output.py", "from .. import Trainer", "imports Trainer from fastimagen, which loads it"),
        ("fastimagen/data/shards.py", 'import_extra("pandas", user="x", extra="data")', "imports pandas"),
        ("fastimagen/info.py", "import benchmarks.report", "imports benchmarks.report; info may import"),
        ("fastimagen/train/ema.py", "from . import trainer", "train.ema is part of an import cycle"),
        ("kernels/attention.py", "from fastimagen import ops", "imports ops; fastimagen_kernels may import"),
        ("kernels/attention.py", "import einops", "imports einops at module level"),
        (
            "kernels/attention.py",
            "def f():\n    from . import device",
            "fastimagen_kernels.device is part of an import",
        ),
        ("kernels/__init__.py", "", "kernels/ has an __init__.py"),
        ("launch/train.py", "import torch", "imports torch at module level"),
        ("launch/train.py", "def f():\n    from benchmarks import report", "imports benchmarks.report; launch may"),
        ("benchmarks/harness/rows.py", "from ..cases import step", "imports benchmarks.cases.step; benchmarks.harness"),
        ("benchmarks/harness/svg.py", "from .. import report", "imports benchmarks.report; benchmarks.harness may"),
        ("benchmarks/cases/step.py", "from ..studies import tune", "imports benchmarks.studies.tune; benchmarks.cases"),
        ("benchmarks/report.py", "from .studies import tune", "imports benchmarks.studies.tune; benchmarks may"),
        ("benchmarks/report.py", "from tests.conftest import ROOT", "imports tests"),
    ],
)
def test_a_forbidden_import_is_reported(path: str, source: str, complaint: str, tmp_path: Path) -> None:
    for name in ("config", "text/t5", "ops/attention", "data/order", "train/ema"):
        write(tmp_path / f"fastimagen/{name}.py", "")
    write(tmp_path / "fastimagen/train/trainer.py", "from . import ema")
    for name in ("", "ops/"):
        write(tmp_path / f"fastimagen/{name}__init__.py", "")
    write(tmp_path / "kernels/attention.py", "")
    write(tmp_path / "kernels/device.py", "from . import attention")
    for name in ("cases/step", "studies/tune", "report"):
        write(tmp_path / f"benchmarks/{name}.py", "")
    assert problems(tmp_path) == []
    write(tmp_path / path, source)
    assert any(complaint in line for line in problems(tmp_path)), problems(tmp_path)


def test_an_indirect_import_of_training_code_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the table permits every single import on the way."""
    monkeypatch.setitem(TABLE, "text", ["data"])
    write(tmp_path / "fastimagen/sampling/pipeline.py", "from ..text.t5 import T5Encoder")
    write(tmp_path / "fastimagen/text/t5.py", "from ..data.order import Order")
    write(tmp_path / "fastimagen/data/order.py", "")
    assert problems(tmp_path) == [
        f"fastimagen.{name} must work with the core dependencies, but reaches fastimagen.data.order"
        for name in ("sampling.pipeline", "text.t5")
    ]


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

def fail(*arguments, **keywords):
    raise AssertionError("importing queries a device")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, fail)
torch.accelerator.current_accelerator = torch.accelerator.is_available = fail

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORBIDDEN = ("open", "socket.", "urllib.", "subprocess.", "os.putenv", "os.unset", "os.mkdir")
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so")) and not arguments[2] & WRITES:
        return
    if event.startswith(FORBIDDEN):
        raise AssertionError(f"importing does {event} {arguments}")

environment, loaded = dict(os.environ), set(sys.modules)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in fastimagen.__all__:
    getattr(fastimagen, name)
assert dict(os.environ) == environment, "importing sets environment variables"
heavy = {"transformers", "webdataset", "deepspeed", "triton", "sentencepiece", "psutil"}
heavy &= set(sys.modules) - loaded
assert not heavy, f"importing fastimagen also imports {heavy}"
"""


def test_importing_a_module_has_no_side_effect() -> None:
    names = list(modules(ROOT, "fastimagen"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
