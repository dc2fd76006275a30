"""The quickstart's phases, without running them: `make quickstart` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastimagen.cli import main, parser
from fastimagen.commands import quickstart
from tests.conftest import ROOT


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the quickstart starts; none of them does anything, and `evaluate` reports nothing."""
    commands: list[list[str]] = []

    def start(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])  # without python -u
        for run in ("runs/quickstart", "runs/shapes-transformer"):
            for folder, name in ((quickstart.EVALUATION, "report.json"), (quickstart.IMAGES, "grid.png")):
                Path(run, folder).mkdir(parents=True, exist_ok=True)
                Path(run, folder, name).write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    return commands


@pytest.mark.parametrize(
    ("flags", "run"),
    [
        ([], "runs/quickstart"),
        (["--config", "launch/configs/shapes_transformer.json"], "runs/shapes-transformer"),
    ],
)
def test_it_runs_commands_that_exist_in_an_empty_folder(
    flags: list[str],
    run: str,
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--dir", "here", *flags]) == 0
    assert "copied ds.json, launch/captions.txt" in capsys.readouterr().out
    assert json.loads(Path(run, "report.json").read_text())["total_seconds"] >= 0  # the folder is `here`
    assert Path(run, "grid.png").exists()
    assert [command[:3] for command in started if command[0] == "-m"] and len(started) == 7
    for command in started:
        words = command[2:]
        if command[1] == "deepspeed.launcher.runner":
            assert (tmp_path / "here" / words[2]).is_file()
            words = ["train", *words[3:]]
        options = parser().parse_args(words)
        for name in (getattr(options, "config", None), *(getattr(options, "captions", None) or [])):
            assert name is None or (tmp_path / "here" / name).is_file()


def test_another_configuration_is_not_touched(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # main changes it
    Path("ds.json").write_text((ROOT / "launch/configs/own_images.json").read_text())
    assert main(["quickstart"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'ds.json'} does not train on the built-in shapes: ")
    assert started == [] and sorted(path.name for path in tmp_path.iterdir()) == ["ds.json"]


def test_without_deepspeed_it_says_what_to_install(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastimagen.extras.find_spec", lambda name: None)
    assert main(["quickstart", "--dir", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "error: the quickstart needs deepspeed: pip install --editable '.[train]'\n"
    assert not (tmp_path / "new").exists()


def test_ctrl_c_ends_the_quickstart_after_the_training_processes(tmp_path: Path) -> None:
    """DeepSpeed's real launcher with a script that takes a second to save, as training does."""
    script = """
import os, signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(1)
    Path("saved").touch()
    sys.exit(75)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, lambda number, frame: None)
Path("training").touch()
time.sleep(60)
"""
    (tmp_path / "train.py").write_text(script)
    phase = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "train.py"]
    code = "import sys; from fastimagen.commands.quickstart import _run; sys.exit(_run(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, *phase],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "training").exists():
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    printed = child.communicate(timeout=60)[0]
    assert (tmp_path / "saved").exists() and child.returncode != 0
    assert "Traceback" not in printed, printed
