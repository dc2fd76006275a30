"""The `fastimagen` command in a terminal or a pipe, started as a user starts it."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastimagen import __version__
from fastimagen.cli import EXIT_BROKEN_PIPE, main, parser
from fastimagen.logs import configure_logging
from tests.conftest import ROOT


def run_module(*arguments: str, pipe_to: str = "cat", **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastimagen ARGUMENTS | PIPE_TO`, with the exit status of the former."""
    command = shlex.join([sys.executable, "-m", "fastimagen", *arguments])
    script = f"{command} | {pipe_to}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_version_is_printed_without_importing_torch() -> None:
    child = run_module("--version", PYTHONPROFILEIMPORTTIME="1")
    assert child.stdout == f"fastimagen {__version__}\n"
    assert "fastimagen.cli" in child.stderr and "torch" not in child.stderr


def test_a_closed_pipe_ends_a_command_without_a_traceback() -> None:
    child = run_module("info", pipe_to="true")
    assert (child.returncode, child.stderr) == (EXIT_BROKEN_PIPE, "")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One to a child process or a server, say: standard output is intact, so the user must hear of it."""

    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "a server")

    monkeypatch.setattr("fastimagen.info.report", fail)
    with open(os.dup(1), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info"]) == 1
    assert "error: [Errno 32] Broken pipe: 'a server'" in capfd.readouterr().err


def test_an_ascii_terminal_gets_escapes_and_keeps_the_images(toy_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(toy_model), "--captions", "ein rötlicher Kreis", "--steps", "1"]
    child = run_module(
        "sample", *arguments, "--out", str(tmp_path / "größer"), PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert child.returncode == 0 and "Loading" not in child.stderr, child.stderr
    assert child.stdout.strip().endswith("gr\\xf6\\xdfer")
    assert (tmp_path / "größer/grid.png").is_file()


def test_train_is_a_command_of_the_package() -> None:
    """What a wheel has; launch/train.py of a clone runs the same."""
    child = run_module("train", "--config", "ds.json", "--dry-run", "--set", "fastimagen.train.stages.base.steps=70")
    assert child.returncode == 0, child.stderr
    assert child.stdout == run_launcher(
        "--config", "ds.json", "--dry-run", "--set", "fastimagen.train.stages.base.steps=70"
    )
    assert '"steps": 70' in child.stdout and "WARNING" not in child.stdout


def run_launcher(*arguments: str) -> str:
    command = [sys.executable, "launch/train.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample --modle m --captions dog", "sample: error: unknown flag --modle; did you mean --model?"),
        ("train --config=ds.json --dryrun", "train: error: unknown flag --dryrun; did you mean --dry-run?"),
        ("shards folder photos --ot=new", "shards folder: error: unknown flag --ot; did you mean --out?"),
        ("info --frobnicate", "info: error: unknown flag --frobnicate; -h lists all flags"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_one(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2 and capsys.readouterr().err.endswith(f"fastimagen {message}\n")


def test_flags_may_be_shortened_and_those_of_a_launcher_are_its_own() -> None:
    assert parser().parse_args(["sample", "--model", "m", "--captions", "dog", "--coun", "3"]).count == 3
    launcher = ["torchrun", "--standalone", "train.py", "--config", "ds.json"]
    assert parser().parse_args(["supervise", *launcher]).command == launcher


def test_nothing_is_coloured_in_a_terminal(toy_model: Path, tmp_path: Path) -> None:
    """So that NO_COLOR has nothing to turn off. The help is left out: from Python 3.14, argparse obeys NO_COLOR."""
    command = [sys.executable, "-m", "fastimagen", "sample", "--model", str(toy_model), "--captions", "dog"]
    master, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    arguments = [*command, "--steps", "1", "--out", str(tmp_path / "out")]
    subprocess.run(arguments, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT, check=True)
    os.close(terminal)
    printed = os.read(master, 65536)
    os.close(master)
    assert b"step 1 of 1" in printed and b"\x1b" not in printed


def test_names_that_deepspeed_should_not_use_are_no_concern_of_a_run() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        configure_logging()
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather"):
            warnings.warn(f"`torch.distributed.{name}` is deprecated. Please use another.", FutureWarning, stacklevel=1)
    assert [str(warning.message).split("`")[1] for warning in shown] == ["torch.distributed.all_gather"]
