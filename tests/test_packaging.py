"""The source distribution and the wheel: built once, then looked into and used without the clone."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import fastimagen
from fastimagen import extras
from fastimagen.extras import install_command
from tests.conftest import ROOT
from tests.import_graph import imports, modules
from tests.test_layering import CORE

GENERATED = ("PKG-INFO", "setup.cfg", "fastimagen.egg-info/")


class Built(NamedTuple):
    """The names of all files of the source distribution; the wheel, and an environment with the wheel installed."""

    source: set[str]
    wheel: Path
    python: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("distributions")
    run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder], cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        source = {name.partition("/")[2] for name in tar.getnames() if not tar.getmember(name).isdir()}
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run([sys.executable, "-P", "-c", build], cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return Built(source, wheel, install(wheel, folder / "environment"))


def install(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel and this environment's other packages; returns its interpreter."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    return folder / "bin/python"


def run(command: list[str | Path], **options: object) -> str:
    """The output of a command that must succeed."""
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert child.returncode == 0, f"{command}\n{child.stdout}{child.stderr}"
    return child.stdout + child.stderr


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a clone: the list of files is not known")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_source_distribution_is_the_repository(built: Built) -> None:
    files = {name for name in built.source if not name.startswith(GENERATED)}
    assert files == tracked()


def test_the_wheel_has_all_modules_and_the_files_to_start_from(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastimagen").rglob("*.py*") if path.suffix != ".pyc"}
    modules |= {f"fastimagen_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    start = {str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*") if path.is_file()} | {"ds.json"}
    start = {f"fastimagen/_starting_files/{name}" for name in start if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == modules | start | {"fastimagen/py.typed"}


def test_the_metadata_is_accepted_and_shows_nothing_that_is_not_there(built: Built) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    assert "PASSED" in run([sys.executable, "-m", "twine", "check", "--strict", built.wheel])
    archive = zipfile.ZipFile(built.wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    description = str(metadata.get_payload())
    assert metadata["Version"] == fastimagen.__version__ and metadata["License-File"] == "LICENSE"
    assert description.startswith("# fastimagen\n") and "](" not in description.replace("](http", "")
    assert metadata.get_all("Project-URL") is None, "name only addresses that exist"


SCRIPT = """
from fastimagen import CascadeConfig, ImagenPipeline, TextEmbeddings

pipe = ImagenPipeline.from_pretrained("model", device="cpu")
out = pipe("a red circle", count=2, seed=0)
reveal_type(pipe)
reveal_type(out.captions)
reveal_type(CascadeConfig.model_fields)
TextEmbeddings.load("text.safetensors").lengths
pipe("a red circle", cuont=2)
pipe.smaple("a red circle")
ImagenPipeline.from_pretrained("model", offload="sometimes")
"""


def test_a_type_checker_sees_the_types_of_an_installed_wheel(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "script.py").write_text(SCRIPT)
    heavy = ("torch", "numpy", "PIL", "pydantic", "safetensors", "transformers", "deepspeed")  # slow to read
    settings = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n" for name in heavy)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{settings}")
    command = [sys.executable, "-m", "mypy", "--python-executable", built.python, "script.py"]
    child = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    shown = child.stdout
    assert 'Revealed type is "fastimagen.sampling.pipeline.ImagenPipeline"' in shown, shown
    assert 'Revealed type is "list[str]"' in shown
    assert '"ImagenPipeline" has no attribute "smaple"' in shown and 'Argument "offload"' in shown
    assert shown.strip().endswith("Found 2 errors in 1 file (checked 1 source file)")


def test_public_names_and_their_types_are_the_same() -> None:
    stub = (ROOT / "fastimagen/__init__.pyi").read_text()
    for name, module in fastimagen._MODULES.items():
        assert f"from .{module} import {name} as {name}\n" in stub
    assert stub.count(" as ") == len(fastimagen._MODULES)


def test_a_wheel_starts_without_a_clone(built: Built, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [built.python, "-m", "fastimagen", "starting-files", "--out", "here"]
    written = run(start, cwd=tmp_path, env=environment).splitlines()
    assert "here/ds.json" in written and "here/launch/configs/own_images.json" in written
    for name in written:
        assert (tmp_path / name).read_bytes() == (ROOT / Path(name).relative_to("here")).read_bytes()
    again = subprocess.run(list(map(str, start)), cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert again.returncode == 1 and again.stderr.startswith("error: here/ds.json exists: choose another folder")
    hints = "from fastimagen.extras import install_command as i; print(i('text'), i('demo'), i('xformers'), sep='\\n')"
    text, demo, xformers = run([built.python, "-c", hints], cwd=tmp_path).splitlines()
    assert text == "pip install 'transformers>=5.0' 'sentencepiece>=0.2' protobuf"
    assert demo == f"{text} 'gradio>=6.0'" and xformers == "pip install xformers"


HINTED_BY = {"braceexpand": "webdataset", "psutil": "deepspeed", "tqdm": "deepspeed"}
"""Packages that are installed with another one, whose absence is said first."""


def test_every_optional_package_has_a_hint_how_to_install_it() -> None:
    """Each third-party package that is imported inside functions is asked for by import_extra or require_extra."""
    source = "".join(path.read_text() for path in (ROOT / "fastimagen").rglob("*.py"))
    hinted = set(re.findall(r"(?:import_extra|require_extra|import_for_text|find_spec)\(\s*\"(\w+)", source))
    optional = {
        item.package
        for name, path in modules(ROOT, "fastimagen").items()
        for item in imports(path, name)
        if item.deferred and item.package not in {*sys.stdlib_module_names, *CORE.split(), "fastimagen"}
    } - {"fastimagen_kernels", "starlette", "wandb"}  # ours; a part of gradio; in MONITORS of train/
    assert {"deepspeed", "gradio", "huggingface_hub", "transformers", "webdataset"} <= optional
    assert {HINTED_BY.get(name, name) for name in optional} <= hinted


def test_in_a_clone_the_hint_names_the_extra() -> None:
    assert (extras.SOURCE, install_command("text")) == (ROOT, "pip install --editable '.[text]'")
