"""Sampling with only the core dependencies installed, and the command line's help without heavy imports."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from fastimagen import __version__
from fastimagen.cli import main
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import ROOT

CORE = ["torch", "safetensors", "numpy", "einops", "pydantic", "pillow"]

# Hides all other packages from imports and from importlib.metadata, as if they were not installed.
HIDE = """
import json, sys
from importlib.metadata import DistributionFinder

hidden, distributions = (set(names) for names in json.loads(sys.argv[1]))

class Minimal:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *rest)
    def find_distributions(self, context=DistributionFinder.Context()):
        find = getattr(self.finder, "find_distributions", lambda context: ())
        return (d for d in find(context) if d.metadata["Name"].lower().replace("_", "-") in distributions)

modules_at_start = set(sys.modules)
sys.meta_path[:] = [Minimal(finder) for finder in sys.meta_path]
"""

SAMPLE = (
    HIDE
    + """
from pathlib import Path
from fastimagen import ImagenPipeline, TextEmbeddings
from fastimagen.cli import main

model, text, out = map(Path, sys.argv[2:])
pipe = ImagenPipeline.from_pretrained(model)
images = pipe(text=TextEmbeddings.load(text), seeds=[3, 4])
images.save(out / "python")
images.grid().save(out / "grid.png")
sample = ["sample", "--model", str(model), "--seed", "3"]
assert main([*sample, "--embeddings", str(text), "--out", str(out / "cli")]) == 0
try:
    pipe(["a red circle"])
except ImportError as error:
    print(error)
assert main([*sample, "--captions", "a red circle", "--out", str(out / "none")]) == 1
assert main(["info"]) == 0
imported = hidden & (set(sys.modules) - modules_at_start)
assert not imported, imported
"""
)


def minimal() -> list[list[str]]:
    """A minimal installation: the modules to hide, and the distributions to show.

    Shown are the core dependencies and their own dependencies.
    """
    distributions: set[str] = set()
    waiting = [*CORE]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in distributions:
            distributions.add(name)
            for requirement in map(Requirement, requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not {*distributions, "fastimagen"} & {canonicalize_name(owner) for owner in owners}
    }
    return [sorted(hidden), sorted(distributions)]


def test_only_the_core_dependencies_count_as_installed() -> None:
    hidden, distributions = minimal()
    assert {"transformers", "webdataset", "deepspeed", "sentencepiece", "tqdm", "psutil"} <= set(hidden)
    assert {*CORE, "pydantic-core"} <= set(distributions)
    assert not {"torch", "PIL", "fastimagen"} & set(hidden)


def run_python(script: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own inside `folder`; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert child.returncode == 0, child.stderr
    return child


def test_sampling_needs_only_the_core_dependencies(toy_model: Path, tmp_path: Path) -> None:
    captions = ["a red circle", "a small blue star"]
    pipe = ImagenPipeline.from_pretrained(toy_model)
    text = tmp_path / "text.safetensors"
    pipe.encode(captions).save(text, captions)
    child = run_python(SAMPLE, json.dumps(minimal()), str(toy_model), str(text), str(tmp_path), folder=tmp_path)

    needs_text = "the text encoder needs transformers: pip install --editable '.[text]'"
    assert needs_text in child.stdout.splitlines()
    assert child.stderr.splitlines() == [f"error: {needs_text}"]
    assert not (tmp_path / "none").exists()
    rows = facts(child.stdout)
    assert rows["torch"] == torch.__version__
    assert rows["deepspeed"] == rows["transformers"] == "not installed"

    expected = pipe(text=TextEmbeddings.load(text), seeds=[3, 4])
    assert Image.open(tmp_path / "grid.png").size == expected.grid().size
    expected.save(tmp_path / "expected")
    for name in ("images/000000.png", "images/000001.png"):
        pixels = read_pixels(tmp_path / "expected" / name)
        for folder in ("python", "cli"):
            assert (read_pixels(tmp_path / folder / name) - pixels).abs().max() <= 1
    assert (tmp_path / "cli/captions.txt").read_text().splitlines() == captions


def read_pixels(path: Path) -> torch.Tensor:
    """The values of an image file, in [0, 255]."""
    return torch.tensor(list(Image.open(path).tobytes()))


def facts(printed: str) -> dict[str, str]:
    """The table that `fastimagen info` prints: two columns, separated by two or more spaces."""
    rows = [line.partition("  ") for line in printed.splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, _, value in rows}


def test_info_lists_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    rows = facts(capsys.readouterr().out)
    assert rows["fastimagen"] == __version__ and rows["python"] == platform.python_version()
    for name in [*CORE, "transformers", "webdataset", "deepspeed"]:
        assert rows[name] == (torch.__version__ if name == "torch" else version(name))
    assert rows["system"] and rows["kernels"] and int(rows["threads"]) >= 1
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in rows["gpu 0"] and rows["cuda"] == torch.version.cuda
    else:
        assert rows["gpu"] == "none" and rows["cuda"]


HELP = """
import contextlib, io, re, sys
from fastimagen.cli import main

def check(*command):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main([*command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
    assert shown.getvalue().startswith(" ".join(["usage: fastimagen", *command])), shown.getvalue()
    print(*command)
    for subcommand in re.findall(r"^    ([a-z-]+)(?: |$)", shown.getvalue(), re.MULTILINE):
        check(*command, subcommand)

check()
heavy = {"torch", "numpy", "PIL", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    commands = set(run_python(HELP).stdout.splitlines())
    assert {"", "sample", "shards", "shards folder", "shards shapes", "embed", "export"} <= commands
    assert {"demo", "evaluate", "import-minimagen", "info"} <= commands
