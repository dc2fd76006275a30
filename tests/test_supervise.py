"""`fastimagen supervise`: exit statuses, restarts and requests to stop, around small programs in place of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastimagen.commands.supervise import _for_torchrun
from tests.conftest import ROOT

# A launcher of one training process, which records its start and status as training does. It counts its runs.
PROGRAM = """
import os, signal, sys, time
from fastimagen.train.exit_status import record, record_start, stop_file_exists
runs = len(open("runs").read()) if os.path.exists("runs") else 0
open("runs", "a").write("x")
how = sys.argv[1 + min(runs, len(sys.argv) - 2)]
if how == "usage":
    sys.exit(2)
record_start()
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "killed under torchrun":
    sys.exit(1)
if how == "hidden":
    record(75); sys.exit(1)
if how == "waits":
    while not stop_file_exists(): time.sleep(0.02)
    record(75); sys.exit(1)
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); print("deaf", flush=True); time.sleep(60)
sys.exit(record(int(how)))
"""


def supervise(folder: Path, *flags: str, program: list[str]) -> subprocess.Popen:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "fastimagen", "supervise", *flags, "--", sys.executable, "program.py", *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("program", "restarts", "status", "runs"),
    [
        (["0"], 2, 0, 1),
        (["killed", "69", "0"], 2, 0, 3),  # restarted until it finishes
        (["killed under torchrun", "0"], 1, 0, 2),
        (["69"], 2, 69, 3),  # restarts are bounded
        (["1"], 2, 1, 1),  # a mistake of the user's
        (["usage"], 2, 2, 1),
        (["hidden"], 2, 75, 1),  # torchrun's own status is 1
    ],
)
def test_status_and_restarts(
    program: list[str], restarts: int, status: int, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argparse import Namespace

    from fastimagen.commands import supervise as module

    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "POLL", 0.01)
    before = {number: signal.getsignal(number) for number in module.SIGNALS}
    command = ["--", sys.executable, "program.py", *program]
    try:
        assert module.supervise(Namespace(command=command, restarts=restarts, patience=5.0)) == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len((tmp_path / "runs").read_text()) == runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_request_and_status_75(number: signal.Signals, tmp_path: Path) -> None:
    process = supervise(tmp_path, "--restarts", "3", program=["waits"])
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "runs").read_text() == "x"


def test_what_ignores_the_request_is_killed(tmp_path: Path) -> None:
    process = supervise(tmp_path, "--patience", "0.5", program=["deaf"])
    assert process.stdout is not None and process.stdout.readline() == "deaf\n"
    process.terminate()
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 75 and "still running" in output


def test_a_command_is_required(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastimagen", "supervise"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: supervise needs a command")


def test_run_is_no_abbreviation_under_torchrun() -> None:
    words = ["torchrun", "launch/train.py", "--run", "here", "--run=there"]
    assert _for_torchrun(words)[2:] == ["--run-dir", "here", "--run-dir=there"]
    assert _for_torchrun(["deepspeed", *words[1:]])[2:] == ["--run", "here", "--run=there"]
