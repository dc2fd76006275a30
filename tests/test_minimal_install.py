"""Sampling with nothing installed but the core dependencies, and a command line that is there at once."""

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
from tests.conftest import ROOT, write_toy_encoder, write_toy_model

CORE = ["torch", "safetensors", "numpy", "einops", "pydantic", "pillow"]

# Finders that do not know the other packages, neither to import nor to list: a machine without them.
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

started = set(sys.modules)
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
found = hidden & (set(sys.modules) - started)
assert not found, found
"""
)


def minimal() -> list[list[str]]:
    """What stands in for a minimal installation: the modules to hide, and the distributions to show:
    the core dependencies and what they need themselves."""
    distributions: set[str] = set()
    waiting = [*CORE]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in distributions:
            distributions.add(name)
            needs = map(Requirement, requires(name) or [])
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not {*distributions, "fastimagen"} & {canonicalize_name(owner) for owner in owners}
    }
    return [sorted(hidden), sorted(distributions)]


def test_what_is_hidden_from_the_sampler() -> None:
    hidden, distributions = minimal()
    assert {"transformers", "webdataset", "deepspeed", "sentencepiece", "tqdm", "psutil"} <= set(hidden)
    assert {*CORE, "pydantic-core"} <= set(distributions) and not {"torch", "PIL", "fastimagen"} & set(hidden)


def test_the_core_dependencies_are_enough_to_sample(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "model", write_toy_encoder(tmp_path / "encoder"))
    captions = ["a red circle", "a small blue star"]
    pipe = ImagenPipeline.from_pretrained(model)
    pipe.encode(captions).save(tmp_path / "text.safetensors", captions)
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            SAMPLE,
            json.dumps(minimal()),
            str(model),
            str(tmp_path / "text.safetensors"),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert child.returncode == 0, child.stderr

    needs_text = "the T5 text encoder needs transformers: pip install --editable '.[text]'"
    assert needs_text in child.stdout.splitlines()
    assert child.stderr.splitlines() == [f"error: {needs_text}"] and not (tmp_path / "none").exists()
    rows = facts(child.stdout)
    assert rows["torch"] == torch.__version__ and rows["deepspeed"] == rows["transformers"] == "not installed"

    expected = pipe(text=TextEmbeddings.load(tmp_path / "text.safetensors"), seeds=[3, 4])
    assert Image.open(tmp_path / "grid.png").size == expected.grid().size
    expected.save(tmp_path / "here")
    for index in range(2):
        paths = [tmp_path / f"{folder}/images/{index:06d}.png" for folder in ("here", "python", "cli")]
        ours, *others = (torch.tensor(list(Image.open(path).tobytes())) for path in paths)
        assert all((ours - other).abs().max() <= 1 for other in others)
    assert (tmp_path / "cli/captions.txt").read_text().splitlines() == captions


def facts(printed: str) -> dict[str, str]:
    """`fastimagen info` as a mapping."""
    return {
        line.split("  ", 1)[0].strip(): line.split("  ", 1)[1].strip() for line in printed.splitlines() if "  " in line
    }


def test_info_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    rows = facts(capsys.readouterr().out)
    assert rows["fastimagen"] == __version__ and rows["python"] == platform.python_version()
    for name in [*CORE, "transformers", "webdataset", "deepspeed"]:
        assert rows[name] == version(name)
    assert rows["system"] and rows["kernels"] and int(rows["threads"]) >= 1
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in rows["gpu 0"] and rows["cuda"] == torch.version.cuda
    else:
        assert rows["gpu"] == "none" and rows["cuda"]


def test_every_command_has_help_and_none_of_it_imports_torch() -> None:
    commands = [
        [],
        ["sample"],
        ["shards"],
        ["shards", "folder"],
        ["shards", "shapes"],
        ["embed"],
        ["export"],
        ["evaluate"],
        ["import-minimagen"],
        ["info"],
    ]
    script = """
import contextlib, io, json, sys
from fastimagen.cli import main

for command in json.loads(sys.argv[1]):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main([*command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
    assert shown.getvalue().startswith(" ".join(["usage: fastimagen", *command])), shown.getvalue()
heavy = {"torch", "numpy", "PIL", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    child = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr
