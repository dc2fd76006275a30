"""The parts of training, alone and in real runs: clipping, EMA, validation, preview grids, metrics, stopping."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastimagen.cascade import Stage
from fastimagen.cli import parser
from fastimagen.commands.distill import student_config
from fastimagen.config import EMAConfig, StageConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.source import open_data
from fastimagen.files import write_json
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.seeds import mix_seed
from fastimagen.train import power_average
from fastimagen.train.checkpoint import read_average, read_state, write_validated
from fastimagen.train.ema import EMA
from fastimagen.train.export import export
from fastimagen.train.metrics import Metrics
from fastimagen.train.run_lock import holder, stage_lock
from fastimagen.train.stage_setup import initial_unet
from fastimagen.train.trainer import Trainer
from fastimagen.train.validation import preview_sampling, sample_grid
from tests.conftest import ROOT, TOY_STAGES, toy_tree, write_toy_model


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- real runs, one after the other in one process: DeepSpeed takes seconds to start

RUNS = """
import json, os, signal, sys
from pathlib import Path
from fastimagen.config_file import config_from_dict
from fastimagen.train.preemption import TrainingInterrupted
from fastimagen.train.trainer import Trainer, TrainingDiverged
from fastimagen.train.validation import Validator

check, signals = Validator._check, []

def check_after_signal(self):
    if signals:
        current = self.phases.current
        signals[0][2] -= [current.phase, current.step] == signals[0][:2]
        if not signals[0][2]:
            signals.pop()
            os.kill(os.getpid(), signal.SIGTERM)
    check(self)

Validator._check = check_after_signal
for name, tree, *signals in json.loads(Path(sys.argv[1]).read_text()):
    try:
        Trainer(config_from_dict(tree), Path(sys.argv[1]).parent / name, stage="base").fit()
    except (TrainingDiverged, TrainingInterrupted) as error:
        print(f"{name}: {error}")
"""


@pytest.fixture(scope="module")
def runs(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of the base stage: clipped, live, averaged (interrupted and resumed), still and still8,
    held (validation out of the training shards), alone (no validation), nan (all embeddings are damaged), stopped (live
    with signals: [phase, step, number of the check]), student (distilled, interrupted and resumed), whole (the same
    without interruption) and own (consistency). The file `output` has what they printed."""

    def tree(*, steps: int, decay: float = 0.0, **deepspeed: Any) -> dict[str, Any]:
        content = toy_tree(toy_data)
        del content["scheduler"], content["fastimagen"]["train"]["stages"]
        content["fastimagen"]["train"] |= {
            "steps": steps,
            "checkpoint_every": 1,
            "keep_checkpoints": 10,
            "validate_every": 1,
            "validation_samples": 40,
            "sample_every": 100,
            "sample_count": 1,
            "ema": {"decay": decay, "warmup": 4.0},
        }
        return {**content, **deepspeed}

    # With a decay of 0 the average is the weights themselves, so their checkpoints show every step.
    still = {"optimizer": {"type": "AdamW", "params": {"lr": 0.0}}}
    trees = [
        (
            "clipped",
            tree(
                steps=2,
                optimizer={"type": "SGD", "params": {"lr": 1.0}},
                gradient_clipping=0.01,
                zero_allow_untested_optimizer=True,
            ),
        ),
        ("live", tree(steps=4)),
        ("averaged", tree(steps=2, decay=0.9)),
        ("averaged", tree(steps=4, decay=0.9)),
        ("still", tree(steps=2, **still)),
        ("still8", tree(steps=1, train_batch_size=8, train_micro_batch_size_per_gpu=2, **still)),
    ]
    held, alone = tree(steps=1), tree(steps=1)
    held["fastimagen"]["data"]["validation"] = {"count": 12}
    held["fastimagen"]["train"]["validation_samples"] = "all"
    alone["fastimagen"]["data"]["validation"] = None
    del alone["fastimagen"]["train"]["steps"]
    alone["fastimagen"]["train"]["epochs"] = 0.04  # 2.56 of 64 samples, in batches of 2
    alone["train_batch_size"] = 2
    folder = tmp_path_factory.mktemp("parts")
    nan = tree(steps=10)
    for split in ("train", "val"):
        shutil.copytree(toy_data / split, folder / "damaged" / split)
    shutil.copytree(toy_data / "text_encoder", folder / "damaged/text_encoder")
    shutil.copy(toy_data / "shapes.json", folder / "damaged")
    nan["fastimagen"]["data"] |= {"shards": str(folder / "damaged/train"), "validation": None}
    nan["fastimagen"]["text"]["encoder"] = str(folder / "damaged/text_encoder")
    nan["fastimagen"]["train"] |= {"max_nonfinite": 3, "log_every": 2}
    (cache,) = (folder / "damaged/train").glob("*.safetensors")
    damage_embeddings(cache)
    trees += [("held", held), ("alone", alone), ("nan", nan)]
    signals = [["validation", 2, 2], ["validation", 4, 1], ["samples", 4, 2]]
    trees += [("stopped", tree(steps=4), signal) for signal in signals] + [("stopped", tree(steps=4))]
    teacher = str(write_toy_model(folder / "teacher", toy_data / "text_encoder"))

    def student(**keys: Any) -> dict[str, Any]:
        flags = ["distill", "--model", teacher, "--out", "unused", "--config", "unused"]
        content = json.loads(student_config(config_from_dict(tree(**keys)), parser().parse_args(flags)).to_json())
        content["fastimagen"]["train"] |= {"sample_every": 4, "distill": {"model": teacher, "substeps": 2}}
        return content

    itself = student(steps=3)
    itself["fastimagen"]["train"]["distill"] |= {"method": "consistency", "substeps": 8}
    trees += [
        ("student", student(steps=2)),
        ("student", student(steps=4)),
        ("whole", student(steps=4)),
        ("own", itself),
    ]
    (folder / "trees.json").write_text(json.dumps(trees))
    child = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder / "trees.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stdout + child.stderr
    (folder / "output").write_text(child.stdout)
    return folder


def damage_embeddings(cache: Path) -> None:
    """Replace all embeddings of a cache by NaN."""
    with safe_open(cache, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del tensors["sums"], header["tables"]  # as in caches from before they had checksums, which would find the change
    save_file({**tensors, "tokens": tensors["tokens"] * torch.nan}, cache, header)


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """The EMA weights after a step; those of step 0 are the initial weights of every run with this seed."""
    if step:
        return read_average(run / f"checkpoints/base/step-{step:08d}")
    unet = initial_unet(StageConfig.model_validate(TOY_STAGES[0]), seed=mix_seed(0, "base", "weights"))
    return {name: weight.detach() for name, weight in unet.named_parameters()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum((first[name].double() - second[name].double()).square().sum().item() for name in first) ** 0.5


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_defect_1_gradients_are_clipped(runs: Path) -> None:
    """SGD with learning rate 1 moves the weights by the gradient itself."""
    norms = [record["grad_norm"] for record in records(runs / "clipped") if "loss" in record]
    assert len(norms) == 2 and min(norms) > 0.05, "nothing to clip"
    for step in (1, 2):
        moved = distance(weights(runs / "clipped", step), weights(runs / "clipped", step - 1))
        assert 0.0099 < moved < 0.01001


def test_ema_of_a_run_is_the_average_of_its_weights(runs: Path) -> None:
    """The same run without averaging shows each step's weights; their average is taken here in float64."""
    average = {name: weight.double() for name, weight in weights(runs / "live", 0).items()}
    for step in range(1, 5):
        live = weights(runs / "live", step)
        decay = min(0.9, (1 + step) / (4.0 + step))
        average = {name: decay * average[name] + (1 - decay) * live[name].double() for name in average}
        saved = weights(runs / "averaged", step)
        assert all((saved[name].double() - average[name]).abs().max() < 1e-6 for name in average)
        assert distance(saved, live) > 1e-3


def test_power_averages_of_a_run_go_on_where_they_were(runs: Path) -> None:
    """Step s of n has the share (s / n)^(gamma + 1) - ((s - 1) / n)^(gamma + 1), also in the run that was resumed."""
    history = [weights(runs / "live", step) for step in range(1, 5)]
    last = runs / "averaged/checkpoints/base/step-00000004"
    for sigma_rel, quantity in power_average.QUANTITIES.items():
        power = power_average.gamma(sigma_rel) + 1
        shares = [(step / 4) ** power - ((step - 1) / 4) ** power for step in range(1, 5)]
        for name, saved in read_average(last, quantity).items():
            expected = sum(share * step[name].double() for share, step in zip(shares, history))
            assert (saved.double() - expected).abs().max() < 1e-6


def test_a_resumed_run_records_no_step_twice(runs: Path) -> None:
    lines = [(record["step"], "val_loss" in record) for record in records(runs / "averaged")]
    assert lines == [(step, kind) for step in (1, 2, 3, 4) for kind in (False, True)]


def test_a_signal_ends_a_validation_and_a_preview_grid_which_the_next_start_does_again(runs: Path) -> None:
    def curve(run: Path) -> list[dict[str, Any]]:
        return [{key: record.get(key) for key in ("step", "loss", "val_loss", "grad_norm")} for record in records(run)]

    assert curve(runs / "stopped") == curve(runs / "live")
    output = (runs / "output").read_text()
    assert re.findall(r"^stopped: (.*)", output, re.MULTILINE) == [
        "SIGTERM: saved a checkpoint of base at step 2; rerun the command to resume",
        "SIGTERM: saved a checkpoint of base at step 4; rerun the command to resume",
        f"SIGTERM: {runs}/stopped/checkpoints/base/step-00000004 is as it was; rerun the command to resume",
    ]
    assert re.findall(r"^base: resuming from step (., with.*)", output, re.MULTILINE) == [
        "2, with its validation",
        "4, with its validation and preview grid",
        "4, with its preview grid",
    ]
    for step in range(1, 5):
        ours, theirs = (read_state(runs / name / f"checkpoints/base/step-{step:08d}") for name in ("stopped", "live"))
        assert ours["val_loss"] == theirs["val_loss"] and ours["unfinished"] == []
    grid = "samples/base/step-00000004.png"
    assert (runs / "stopped" / grid).read_bytes() == (runs / "live" / grid).read_bytes()


def test_a_damaged_note_about_a_later_validation_does_not_count(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"step": 3, "val_loss": None, "unfinished": ["validation", "samples"]})
    write_validated(tmp_path, 0.5, ["samples"])
    write_validated(tmp_path, None, [])
    assert read_state(tmp_path) == {"step": 3, "val_loss": 0.5, "unfinished": []}
    text = (tmp_path / "validated.json").read_text()
    (tmp_path / "validated.json").write_text(text.replace("0.5", "0.4"))
    assert read_state(tmp_path)["unfinished"] == ["validation", "samples"]


def test_defect_7_validation_loss_depends_on_the_ema_weights_only(runs: Path) -> None:
    losses = [
        record["val_loss"] for name in ("still", "still8") for record in records(runs / name) if "val_loss" in record
    ]
    assert len(losses) == 3 and losses[0] > 0 and losses == [losses[0]] * 3
    moving = [record["val_loss"] for record in records(runs / "live") if "val_loss" in record]
    averaged = [record["val_loss"] for record in records(runs / "averaged") if "val_loss" in record]
    assert len(set(moving)) == 4 and averaged[3] != moving[3]


def test_micro_batches_read_the_whole_batch(runs: Path) -> None:
    """8 images as 4 micro-batches of 2."""
    training = [record for record in records(runs / "still8") if "loss" in record]
    assert [record["step"] for record in training] == [1] and training[0]["read"] >= 8


def test_held_out_samples_are_validated_and_counted(runs: Path) -> None:
    (training, validation) = records(runs / "held")
    assert training["held_out"] == 12 and validation["val_loss"] > 0
    assert json.loads((runs / "held/config.json").read_text())["fastimagen"]["data"]["validation"]["count"] == 12


def test_without_validation_data_grids_show_training_captions_and_epochs_become_steps(runs: Path) -> None:
    assert [(record["step"], "val_loss" in record) for record in records(runs / "alone")] == [(1, False), (2, False)]
    assert (runs / "alone/samples/base/step-00000002.png").exists()


def test_skipped_steps_are_recorded_with_reason_and_samples(runs: Path) -> None:
    """Even if nothing else is: all steps of this run are skipped."""
    shard = next((runs / "damaged/train").glob("*.tar"))
    skipped = [record for record in records(runs / "nan") if "skipped" in record]
    assert [record["step"] for record in skipped] == [1, 2, 3]
    assert {record["skipped"] for record in skipped} == {"non-finite text embeddings"}
    assert [record["skipped_steps"] for record in skipped] == [1, 2, 3]
    assert all(len(record["samples"]) == 4 for record in skipped)
    assert all(sample.endswith(f" of {shard}") for record in skipped for sample in record["samples"])
    (regular,) = (record for record in records(runs / "nan") if "skipped" not in record)  # log_every is 2
    assert regular["step"] == 2 and "loss" not in regular and regular["images_per_s"] > 0
    output = (runs / "output").read_text()
    assert f"base 3/10  step skipped: non-finite text embeddings: {skipped[2]['samples'][0]}" in output
    (line,) = (line for line in output.splitlines() if line.startswith("nan: base: the gradient was not finite in 3"))
    assert "run fastimagen embed again" in line


def test_a_student_trains_and_resumes_as_any_stage_does(runs: Path) -> None:
    resumed, whole = (weights(runs / name, 4) for name in ("student", "whole"))
    assert distance(resumed, whole) == 0 < distance(whole, weights(runs / "whole", 2))
    for run, steps in (("student", 4), ("own", 3)):
        losses = [record["val_loss"] for record in records(runs / run) if "val_loss" in record]
        assert len(losses) == steps and all(0 < loss < 10 for loss in losses)
    assert (runs / "student/samples/base/step-00000004.png").exists()
    assert "base: learns 4 steps from" in (runs / "output").read_text()


def test_a_student_is_a_model_that_samples_in_its_own_steps(runs: Path, tmp_path: Path) -> None:
    """With the sampler, guidance and threshold that it was trained with, and a card that says what it is."""
    model = export(runs / "student", tmp_path / "model")
    pipe = ImagenPipeline.from_pretrained(model)
    rows: list[int] = []
    pipe.cascade.unets["base"].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    assert pipe(["a red circle", "a blue star"]).images.shape == (2, 3, 8, 8)
    assert rows == [2] * 4
    with pytest.raises(ValueError, match="guidance 2 needs a network that was trained without captions too"):
        pipe("a red circle", guidance=2.0)
    card = (model / "README.md").read_text()
    assert "# student\n\nA few-step student of `teacher`, distilled with fastimagen" in card
    assert "| base | 8x8 | " in card and "base in 4 steps of `ddim`, without guidance" in card


def test_records_say_where_the_time_went_and_what_is_left(runs: Path) -> None:
    *_, last = (record for record in records(runs / "live") if "loss" in record)
    shares = [last[f"time/{name}"] for name in ("data", "forward", "backward", "step", "other")]
    assert sum(shares) == pytest.approx(1.0) and last["time/backward"] > 0.02
    assert last["eta_s"] == 0.0 and last["memory_gib"] > 0.1
    by_noise = [value for key, value in last.items() if key.startswith("loss/noise_")]
    assert by_noise and min(by_noise) <= last["loss"] <= max(by_noise)
    assert "mfu" not in last and "slowest_rank" not in last
    output = (runs / "output").read_text()
    assert output.count("that of this CPU is unknown") == output.count("parameters,")


def test_a_run_ends_with_the_commands_that_come_next(runs: Path) -> None:
    run = runs / "live"
    assert (
        f"sample grids: {run}/samples\ndraw its curves: fastimagen plot {run}\n"
        f"still to train: sr (--stage sr, or --stage all)\n"
        f"export what is trained so far: fastimagen export --run {run} --out models/live\n"
    ) in (runs / "output").read_text()


def test_the_dry_run_says_what_epochs_mean(toy_config: dict, tmp_path: Path) -> None:
    train = toy_config["fastimagen"]["train"]
    del train["steps"]
    train["epochs"] = 2
    train["stages"]["sr"] = {"steps": 7}
    toy_config["fastimagen"]["data"]["validation"] = {"share": 0.2}
    trainer = Trainer(config_from_dict(toy_config), tmp_path / "run")
    lines = trainer.describe().splitlines()
    samples = trainer.run.samples
    assert samples is not None and 64 > samples > 32
    steps = -(-2 * samples // 4)
    assert f"base: 2 epochs of {samples} samples in batches of 4: {steps} steps" in lines
    assert any(line.startswith("base: 8x8") and f"{steps} steps of 4 images" in line for line in lines)
    assert any(line.startswith("sr: 16x16") and "7 steps of 4 images" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_two_lengths_are_refused(toy_config: dict) -> None:
    toy_config["fastimagen"]["train"]["epochs"] = 1.5
    with pytest.raises(ValueError, match=r"fastimagen.train: steps 6 and epochs 1.5 both set .* --set KEY=null"):
        config_from_dict(toy_config)
    toy_config["fastimagen"]["train"]["steps"] = None  # as --set fastimagen.train.steps=null does
    config_from_dict(toy_config)
    del toy_config["fastimagen"]["train"]["epochs"]
    toy_config["fastimagen"]["train"]["stages"]["base"] |= {"steps": 3, "epochs": 2}
    with pytest.raises(ValueError, match=r"fastimagen.train.stages.base: steps 3 and epochs 2 both"):
        config_from_dict(toy_config)


# ---- preview grids


def test_preview_grids_take_32_steps_of_the_same_sampler(toy_config: dict, tmp_path: Path, one_process: None) -> None:
    stages = copy.deepcopy(toy_config["fastimagen"]["cascade"]["stages"])
    stages[0]["sampling"] |= {"steps": 500, "sampler": "ddpm", "guidance": 1.0}
    toy_config["fastimagen"]["cascade"]["stages"] = stages
    trainer = Trainer(config_from_dict(toy_config), tmp_path, stage="base")
    assert "base: preview grids take 32 sampling steps, not the stage's 500" in trainer.describe().splitlines()
    (config,) = trainer.stages
    assert preview_sampling(config) == config.sampling.model_copy(update={"steps": 32})
    unet = initial_unet(config, seed=0).eval()
    calls = []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    _, validation_data = open_data(trainer.config.fastimagen, with_text=True)
    assert validation_data is not None
    sample_grid(Stage(config, None), unet, validation_data, trainer.config, tmp_path / "grid.png")
    assert len(calls) == 32 and (tmp_path / "grid.png").exists()
    (tmp_path / "folder").touch()  # where a folder should be: nothing can be saved there
    problem = sample_grid(Stage(config, None), unet, validation_data, trainer.config, tmp_path / "folder/grid.png")
    assert problem is not None and problem.startswith(f"cannot save the preview grid {tmp_path}/folder/grid.png: ")


def test_short_samplers_keep_their_steps_in_preview_grids() -> None:
    config = StageConfig.model_validate(TOY_STAGES[0])
    assert preview_sampling(config) == config.sampling


# ---- EMA


def test_ema_is_a_weighted_sum_of_all_earlier_weights() -> None:
    """The closed form, in float64: weight n has (1 - d_n) d_(n+1) ... d_N, the start has d_1 ... d_N."""
    generator = torch.Generator().manual_seed(0)
    history = [[torch.randn(size, generator=generator) for size in (7, 3)] for _ in range(40)]
    shards = [shard.clone() for shard in history[0]]
    ema = EMA(shards, EMAConfig(decay=0.8, warmup=10.0))
    for step in range(1, 40):
        for shard, value in zip(shards, history[step]):
            shard.copy_(value)
        ema.update(step)
    decays = [min(0.8, (1 + step) / (10.0 + step)) for step in range(1, 40)]
    assert decays[0] == 2 / 11 and decays[-1] == 0.8
    for index, average in enumerate(ema.average):
        expected = torch.zeros(average.shape, dtype=torch.float64)
        for step in range(40):
            share = 1.0 if step == 0 else 1 - decays[step - 1]
            for later in decays[step:]:
                share *= later
            expected += share * history[step][index].double()
        assert (average.double() - expected).abs().max() < 1e-6


# ---- metrics


def open_metrics(folder: Path, start: int, stage: str = "base", rank: int = 0) -> Metrics:
    return Metrics(folder, stage=stage, steps=10, start=start, rank=rank, monitor=SimpleNamespace(enabled=False))


def test_later_and_incomplete_records_are_removed_and_no_others(tmp_path: Path) -> None:
    for stage in ("base", "sr"):
        metrics = open_metrics(tmp_path, 0, stage)
        for step in range(1, 6):
            metrics.write(step, loss=step / 10)
            metrics.write(step, val_loss=step / 20)
        metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sr", "step": 6, "lo')  # a kill in the middle of a line
    metrics = open_metrics(tmp_path, 3, "sr")
    metrics.drop_later_records()
    for step in range(4, 8):
        metrics.write(step, loss=9.0)
    metrics.close()
    found = [(record["stage"], record["step"], record.get("loss")) for record in records(tmp_path) if "loss" in record]
    assert found == [("base", step, step / 10) for step in range(1, 6)] + [
        ("sr", step, step / 10) for step in (1, 2, 3)
    ] + [("sr", step, 9.0) for step in (4, 5, 6, 7)]
    assert len([record for record in records(tmp_path) if "val_loss" in record]) == 5 + 3


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = open_metrics(tmp_path, 0, rank=1)
    metrics.write(1, loss=1.0)
    metrics.say("hello")
    metrics.advance()
    metrics.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# ---- stopping


def test_a_stage_of_a_run_directory_has_one_writer(tmp_path: Path) -> None:
    with stage_lock(tmp_path, ["base"]):
        message = f"stage base of .* is in use by process {os.getpid()} on .*: wait until it ends, train another stage"
        with pytest.raises(ValueError, match=message), stage_lock(tmp_path, ["sr", "base"]):
            raise AssertionError("two writers")
        with stage_lock(tmp_path, ["sr"]):
            assert all(f"process {os.getpid()} on" in str(holder(tmp_path, stage)) for stage in ("base", "sr"))
        assert holder(tmp_path, "sr") is None
    assert holder(tmp_path, "base") is None and holder(tmp_path, "never locked") is None
