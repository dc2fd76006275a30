"""Whole training runs in processes of their own: killed, stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastimagen.train.checkpoint import damage, read_average
from tests.conftest import ROOT
from tests.forked import ForkedProcess

pytestmark = pytest.mark.slow

EXIT_INTERRUPTED = 75


def start(config: Path, run: Path, *extra: str, **kwargs: Any) -> ForkedProcess:
    return ForkedProcess(["train", "--config", str(config), "--run-dir", str(run), *extra], **kwargs)


def launch(launcher: list[str], config: Path, run: Path, *extra: str, **kwargs: Any) -> subprocess.Popen:
    """Start the script as a user does."""
    command = [*launcher, str(ROOT / "launch/train.py"), "--config", str(config), "--run-dir", str(run), *extra]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def finish(process: ForkedProcess | subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def records(run: Path, key: str = "loss") -> dict[tuple[str, int], float]:
    """{(stage, step): value} of metrics.jsonl; fails if a step is recorded twice."""
    found: dict[tuple[str, int], float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if key in record:
            assert (record["stage"], record["step"]) not in found, "a step is recorded twice"
            found[record["stage"], record["step"]] = record[key]
    return found


def wait_for(condition: Callable[[], bool], process: ForkedProcess | subprocess.Popen, pause: float = 0.001) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, neither killed nor stopped."""
    from tests.conftest import toy_tree

    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "ds.json").write_text(json.dumps(toy_tree(toy_data)))
    finish(launch([sys.executable], folder / "ds.json", folder / "run"))
    return folder / "run"


def test_a_run_directory_has_records_grids_and_checkpoints(uninterrupted: Path) -> None:
    assert {stage for stage, _ in records(uninterrupted)} == {"base", "sr"}
    assert [step for stage, step in records(uninterrupted) if stage == "base"] == [1, 2, 3, 4, 5, 6]
    assert len(records(uninterrupted, "val_loss")) == 4
    assert (uninterrupted / "samples/base/step-00000006.png").exists()
    assert (uninterrupted / "samples/sr/step-00000006.png").exists()
    kept = sorted(path.name for path in (uninterrupted / "checkpoints/base").iterdir())
    # The last two, none incomplete, and the averages of the one before.
    assert kept == ["snapshot-00000002", "step-00000004", "step-00000006"]
    times = [f"time/{name}" for name in ("data", "forward", "backward", "step", "other")]
    for key in ("images_per_s", "memory_gib", *times, "grad_norm", "lr", "bad", "excluded", "skipped_steps"):
        assert len(records(uninterrupted, key)) == 12


def saving(run: Path) -> bool:
    return any(run.glob("checkpoints/base/.step-*.partial/*"))


@pytest.mark.parametrize("moment", ["between checkpoints", "while a checkpoint is written", "in the second stage"])
def test_a_killed_run_resumes_bit_for_bit(
    moment: str, toy_config: dict, write_config: Callable, tmp_path: Path, uninterrupted: Path
) -> None:
    config, run = write_config(toy_config), tmp_path / "run"
    process = start(config, run)
    if moment == "while a checkpoint is written":
        wait_for(lambda: saving(run), process, pause=0)
    else:
        stage, count = ("base", 3) if moment == "between checkpoints" else ("sr", 9)
        wait_for(lambda: lines(run) >= count and any(run.glob(f"checkpoints/{stage}/step-*")), process)
    process.kill()
    process.wait()
    if moment == "while a checkpoint is written":
        assert saving(run), "the checkpoint was complete before the kill"
    output = finish(start(config, run))
    assert moment == "while a checkpoint is written" or "resuming from step" in output
    assert records(run) == records(uninterrupted)
    assert records(run, "val_loss") == records(uninterrupted, "val_loss")
    for stage in ("base", "sr"):
        ours, theirs = (read_average(path / f"checkpoints/{stage}/step-00000006") for path in (run, uninterrupted))
        assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_that_resumes(
    number: int, toy_config: dict, write_config: Callable, tmp_path: Path, uninterrupted: Path
) -> None:
    toy_config["fastimagen"]["train"]["checkpoint_every"] = 1000
    config, run = write_config(toy_config), tmp_path / "run"
    process = start(config, run)
    wait_for(lambda: lines(run) >= 2, process)
    process.send_signal(number)
    assert "rerun the command to resume" in finish(process, EXIT_INTERRUPTED)
    assert list(run.glob("checkpoints/base/step-*"))
    finish(start(config, run))
    assert records(run) == records(uninterrupted)


def test_two_ranks_of_the_deepspeed_launcher_stop_when_it_dies(
    toy_config: dict, write_config: Callable, tmp_path: Path
) -> None:
    toy_config["fastimagen"]["train"] |= {
        "steps": 400,
        "checkpoint_every": 1000,
        "validate_every": 1000,
        "sample_every": 1000,
    }
    config, run = write_config(toy_config), tmp_path / "run"
    deepspeed = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = launch(deepspeed, config, run, "--stage", "base", env=environment)
    wait_for(lambda: lines(run) >= 3, process, pause=0.05)
    process.terminate()  # only the launcher's first process; launch.py and the ranks get no signal
    process.wait()
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/base/step-*")):
        assert time.monotonic() < deadline, "the ranks still run without their launcher"
        time.sleep(0.1)
    state = json.loads(next(run.glob("checkpoints/base/step-*/state.json")).read_text())
    assert state["world_size"] == 2 and len(state["averages"]["loss_sums"]) == 2
    # A checkpoint of two processes resumes on one.
    steps = f"fastimagen.train.steps={state['step'] + 1}"
    output = finish(start(config, run, "--stage", "base", "--set", steps))
    assert f"resuming from step {state['step']}" in output
    assert list(run.glob(f"checkpoints/base/step-{state['step'] + 1:08d}"))
    assert "still to train: sr (--stage sr, or --stage all)\nexport what is trained so far: " in output


def test_a_second_writer_is_refused(toy_config: dict, write_config: Callable, tmp_path: Path) -> None:
    toy_config["fastimagen"]["train"]["steps"] = 1000
    config, run = write_config(toy_config), tmp_path / "run"
    first = start(config, run, "--stage", "base")
    wait_for(lambda: lines(run) >= 1, first)
    assert f"is in use by process {first.pid}" in finish(start(config, run), 1).splitlines()[-1]
    toy_config["fastimagen"]["train"]["seed"] = 7
    other = finish(start(write_config(toy_config), run, "--stage", "sr"), 1).splitlines()[-1]
    assert f"error: process {first.pid} on " in other and "trains stage base" in other
    assert "(fastimagen.train.seed 0 -> 7): use the same one" in other
    first.kill()
    first.communicate()


def test_stages_train_side_by_side_on_any_number_of_ranks(
    toy_config: dict, write_config: Callable, tmp_path: Path, uninterrupted: Path
) -> None:
    """Super-resolution on two ranks, both stages in micro-batches of one sample, at once, in one run directory."""
    toy_config["train_micro_batch_size_per_gpu"] = 1
    config, run = write_config(toy_config), tmp_path / "run"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    processes = [
        start(config, run, "--stage", "sr", environment=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    for process in [*processes, start(config, run, "--stage", "base")]:
        finish(process)
    for key in ("loss", "val_loss"):
        expected = records(uninterrupted, key)
        for (stage, step), value in records(run, key).items():
            bound = 1e-6 if stage == "sr" else 2e-5  # Muon, which computes in bf16, enlarges rounding errors
            assert value == pytest.approx(expected[stage, step], rel=0, abs=bound), (stage, step)
        assert len(records(run, key)) == len(expected) == (12 if key == "loss" else 4)


def test_another_architecture_is_refused_and_changes_no_file(
    toy_config: dict, write_config: Callable, tmp_path: Path, uninterrupted: Path
) -> None:
    toy_config["fastimagen"]["cascade"]["stages"][0]["unet"]["dim"] = 16

    def files() -> dict[Path, bytes]:
        paths = [path for path in uninterrupted.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
        return {path: path.read_bytes() for path in paths}

    before = files()
    output = finish(start(write_config(toy_config), uninterrupted), 1)
    line = output.splitlines()[-1]
    assert "cannot resume with unet.dim 8 -> 16 (the checkpoint's weights belong to the other network)" in line
    assert files() == before


def test_a_full_disk_keeps_the_older_checkpoint(toy_config: dict, write_config: Callable, tmp_path: Path) -> None:
    toy_config["fastimagen"]["train"] |= {"steps": 2, "checkpoint_every": 2}
    run = tmp_path / "run"
    finish(start(write_config(toy_config), run, "--stage", "base"))
    toy_config["fastimagen"]["train"]["steps"] = 4
    size = max(path.stat().st_size for path in run.rglob("*") if path.is_file()) // 2
    no_space = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    output = finish(start(write_config(toy_config), run, "--stage", "base", before=no_space), 1)
    assert output.splitlines()[-1].startswith("error: cannot write the checkpoint of step 4")
    assert [path.name for path in (run / "checkpoints/base").iterdir()] == ["step-00000002"]
    finish(start(write_config(toy_config), run, "--stage", "base"))
    assert damage(run / "checkpoints/base/step-00000004") is None


def test_gradients_that_stay_non_finite_end_the_run(toy_config: dict, write_config: Callable, tmp_path: Path) -> None:
    toy_config["optimizer"]["params"]["lr"] = 1e30
    del toy_config["scheduler"]
    toy_config["fastimagen"]["train"] |= {
        "steps": 100,
        "max_nonfinite": 3,
        "validate_every": 1000,
        "sample_every": 1000,
    }
    output = finish(start(write_config(toy_config), tmp_path / "run", "--stage", "base"), 1)
    assert "not finite in 3 consecutive steps" in output.splitlines()[-1]


def test_an_export_has_the_average_that_was_asked_for_and_its_card_names_it(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file

    from fastimagen.cli import main

    for out, flags in {"decay": [], "length": ["--ema", "base=0.1"]}.items():
        assert main(["export", "--run", str(uninterrupted), "--out", str(tmp_path / out), *flags]) == 0
    assert "average of length 0.1" in capsys.readouterr().err
    rows = [line for line in (tmp_path / "length/README.md").read_text().splitlines() if line.startswith("| ")]
    decay = json.loads((uninterrupted / "config.json").read_text())["fastimagen"]["train"]["ema"]["decay"]
    assert [row.split(" | ")[-1] for row in rows[2:]] == ["length 0.1 |", f"decay {decay:g} |"]
    for stage, same in {"base": False, "sr": True}.items():
        ours, theirs = (load_file(tmp_path / out / stage / "model.safetensors") for out in ("decay", "length"))
        assert all(ours[name].equal(theirs[name]) for name in ours) == same


def test_a_run_starts_from_exported_weights(
    toy_config: dict, write_config: Callable, tmp_path: Path, uninterrupted: Path
) -> None:
    from fastimagen.train.export import export

    model = export(uninterrupted, tmp_path / "model")
    toy_config["fastimagen"]["train"] |= {"steps": 1, "stages": {"base": {"init_from": str(model)}}}
    toy_config["optimizer"]["params"]["lr"] = 0.0
    del toy_config["scheduler"]
    finish(start(write_config(toy_config), tmp_path / "run", "--stage", "base"))
    from safetensors.torch import load_file

    ours = read_average(tmp_path / "run/checkpoints/base/step-00000001")
    theirs = load_file(model / "base/model.safetensors")
    assert all(ours[name].allclose(theirs[name]) for name in theirs)
