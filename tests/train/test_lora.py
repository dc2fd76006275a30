"""Training adapters: what a run keeps, resumes and exports, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.config import StageTrainConfig
from fastimagen.config_file import config_from_dict
from fastimagen.files import read_safetensors
from fastimagen.network_config import LoraConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.lora import merge
from fastimagen.sampling.adapters import ADAPTER_FILE
from fastimagen.sampling.model_directory import read_model
from fastimagen.seeds import mix_seed
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.checkpoint import read_average
from fastimagen.train.export import export, export_adapters
from fastimagen.train.plan import Target, headline, plan_stage
from fastimagen.train.run_config import as_trained
from fastimagen.train.stage_setup import initial_unet, resolve_cascade
from fastimagen.train.trainer import Trainer
from tests.conftest import toy_cascade, toy_tree, write_toy_model
from tests.drills.forked import free_port
from tests.forked import ForkedProcess

LORA = {"rank": 2, "alpha": 8.0}


def tree(data: Path, model: Path, lora: dict[str, Any] | None = LORA, **stage: Any) -> dict[str, Any]:
    """A configuration that trains adapters of the base stage of a model."""
    found = toy_tree(data)
    found["fastimagen"]["cascade"] = {"model": str(model)}
    found["fastimagen"]["train"] |= {"steps": 3, "validation_samples": 4, "stages": {"base": {"lora": lora, **stage}}}
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("lora") / "model")


def train(config: dict[str, Any], run: Path, ranks: int = 1) -> str:
    """Train the base stage. Returns what the first rank printed."""
    run.parent.mkdir(exist_ok=True)
    path = run.parent / "ds.json"
    path.write_text(json.dumps(config))
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(free_port())
    arguments = ["train", "--config", str(path), "--run-dir", str(run), "--stage", "base"]
    processes = [
        ForkedProcess(arguments, environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return outputs[0]


def records(run: Path, key: str) -> dict[int, float]:
    """{step: value} of metrics.jsonl."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in found if key in record}


def check(config: dict[str, Any], run: Path) -> None:
    """Ask whether a run would resume for two more steps. Raises ValueError if not."""
    config["fastimagen"]["train"]["steps"] = 6
    trainer = Trainer(config_from_dict(config), run, stage="base")
    trainer.run.check_run(trainer.run.look_for_checkpoint)


@pytest.mark.slow
def test_a_run_of_two_ranks_keeps_adapters_resumes_on_one_and_is_exported(toy_data: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", write_toy_model(tmp_path / "model")
    before = (model / "base/model.safetensors").read_bytes()
    output = train(tree(toy_data, model) | {"zero_optimization": {"stage": 2}}, run, ranks=2)
    assert "of them in adapters, which alone are trained)" in output
    checkpoints = run / "checkpoints/base"
    adapters = read_average(checkpoints / "step-00000003")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in adapters)
    assert all(weight.any() for weight in adapters.values()), "every adapter has learned"
    seed = mix_seed(0, "base", "weights")
    drawn = initial_unet(toy_cascade().stages[0], seed=seed, init_from=str(model), lora=LoraConfig(**LORA)).state_dict()
    for name, weight in adapters.items():
        assert (weight - drawn[name]).abs().max() < 0.05, "both ranks start from the same adapters"

    # What a killed run has: the checkpoint of step 2. It ends as the one that was not killed, also on one rank, where
    # the frozen weights are partitioned, which validation and export gather.
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints/base/step-00000003")
    output = train(tree(toy_data, model) | {"zero_optimization": {"stage": 3}}, killed)
    assert "resuming from step 2" in output and "base 3/3  val_loss" in output
    torch.testing.assert_close(read_average(killed / "checkpoints/base/step-00000003"), adapters)
    for key, steps in (("loss", {1, 2, 3}), ("val_loss", {3})):
        ours, theirs = records(killed, key), records(run, key)
        assert ours.keys() == theirs.keys() == steps and ours == pytest.approx(theirs, rel=0, abs=2e-6)
    recorded = json.loads((killed / "config.json").read_text())["fastimagen"]["train"]["stages"]["base"]
    assert recorded["lora"] == {**LORA, "targets": None}

    lines: list[str] = []
    cascade, weights, _ = read_model(export(run, tmp_path / "exported", say=lines.append))
    base = read_model(model)[1]
    expected = merge(base["base"], adapters, 4.0)
    assert all(torch.equal(weights["base"][name], expected[name]) for name in expected)
    changed = {name for name in expected if not torch.equal(weights["base"][name], base["base"][name])}
    assert changed == {name.replace("lora_A.", "") for name in adapters if "lora_A" in name}
    # The stage that is not trained is that of the model.
    assert lines[1] == f"sr: not trained, as in {model / 'sr'}" and [stage.name for stage in cascade.stages] == [
        "base",
        "sr",
    ]
    assert all(torch.equal(weights["sr"][name], base["sr"][name]) for name in base["sr"])
    assert (model / "base/model.safetensors").read_bytes() == before

    # Not merged: the adapters beside the layers, as they were trained, compute the same.
    unmerged = initial_unet(cascade.stages[0], seed=0, init_from=str(model), lora=LoraConfig(**LORA))
    unmerged.load_state_dict(adapters, strict=False)
    merged = initial_unet(cascade.stages[0], seed=0, init_from=str(tmp_path / "exported"))
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([7.0, 500.0])
    text = TextEmbeddings(torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool))
    expected_output = unmerged(*inputs, text=text)
    assert (merged(*inputs, text=text) - expected_output).abs().max() <= 1e-5 * expected_output.abs().max()

    # Alone: names of PEFT, alpha equal to the rank; and averages of another length.
    alone = read_safetensors(export_adapters(run, tmp_path / "alone") / "base" / ADAPTER_FILE)
    assert alone.keys() == {f"unet.{name}" for name in adapters}
    bare = {name.removeprefix("unet."): weight for name, weight in alone.items()}
    torch.testing.assert_close(merge(base["base"], bare, 1.0), expected)
    longer = read_safetensors(export_adapters(run, tmp_path / "longer", ema=0.1) / "base" / ADAPTER_FILE)
    assert any(not torch.equal(longer[name], alone[name]) for name in alone)

    # Other weights under the same adapters, and none; other adapters.
    with pytest.raises(ValueError, match=r"train\.lora\.rank 2 -> 3"):
        check(tree(toy_data, model, {"rank": 3, "alpha": 8.0}), killed)
    weights_file = model / "base/model.safetensors"
    other = bytearray(before)
    other[-1] ^= 1
    weights_file.write_bytes(other)
    with pytest.raises(ValueError, match="has other weights than those that the adapters of stage base"):
        export(run, tmp_path / "other")
    with pytest.raises(ValueError, match=r"train\.lora\.base .* or of other weights under them"):
        check(tree(toy_data, model), killed)
    weights_file.unlink()
    with pytest.raises(ValueError, match=r"was trained as adapters of .* there is no such file"):
        export(run, tmp_path / "gone")


def test_the_dry_run_plans_adapters() -> None:
    """Master weights, moments, averages and checkpoints are those of the adapters alone."""
    stage, lora = toy_cascade().stages[0], LoraConfig(**LORA)
    deepspeed = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    adapters, whole = (plan_stage(stage, deepspeed, 1, Target(1, "cuda"), each) for each in (lora, None))
    unet = build_network(stage.unet, lora)
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    assert (adapters.trained, adapters.parameters) == (trained, whole.parameters + trained)
    assert (adapters.memory.master, adapters.memory.weights) == (4 * trained, 2 * adapters.parameters)
    assert adapters.checkpoint / whole.checkpoint == pytest.approx(trained / whole.parameters)
    assert adapters.flops.training < whole.flops.training and adapters.flops.forward > whole.flops.forward
    assert adapters.memory.backward < whole.memory.backward
    assert f"({trained / 1e6:.2f} M of them in adapters, which alone are trained)" in headline(
        stage, (adapters.parameters, trained), 1, deepspeed, 1, "cuda"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cascade": "shapes"}, r"stages.base.lora adapts trained weights: set init_from beside it"),
        (
            {"lora": {"targets": ["to_q", "to_p"]}},
            r'stages.base.lora: targets: no linear layer is called "to_p"; there are',
        ),
        ({"lora": {"targets": ["stem.convs.0"]}}, r"no linear layer is called"),
        ({"distill": True}, r"stages.base.lora does not go with train.distill"),
        ({"lora": {"rank": 0}}, r"lora.rank"),
    ],
)
def test_contradictions_are_refused(
    change: dict[str, Any], complaint: str, model: Path, toy_data: Path, tmp_path: Path
) -> None:
    config = tree(toy_data, model, change.get("lora", LORA))
    if "cascade" in change:
        config["fastimagen"]["cascade"] = {"stages": toy_tree(toy_data)["fastimagen"]["cascade"]["stages"]}
    if "distill" in change:
        student = copy.deepcopy(toy_tree(toy_data)["fastimagen"]["cascade"]["stages"][0])
        student |= {"sampling": {"sampler": "ddim", "guidance": 1.0, "steps": 2}}
        config["fastimagen"]["cascade"] = {"stages": [student]}
        config["fastimagen"]["train"]["stages"]["base"]["init_from"] = str(model)
        config["fastimagen"]["train"]["distill"] = {"model": str(model), "substeps": 2}
    with pytest.raises(ValueError, match=complaint):
        Trainer(config_from_dict(config), tmp_path / "run", stage="base")


def test_the_record_of_a_trained_stage_keeps_its_adapters(model: Path, toy_data: Path) -> None:
    """Also where a later start has none."""
    config = resolve_cascade(config_from_dict(tree(toy_data, model, None)))
    stage = config.fastimagen.cascade.stage("base")  # type: ignore[union-attr]
    own = StageTrainConfig(lora=LoraConfig(**LORA), init_from=str(model))
    ema = {f"train.ema.{key}": value for key, value in config.fastimagen.train.ema.model_dump().items()}
    lora = {f"train.lora.{key}": value for key, value in LoraConfig(**LORA).model_dump().items()}
    saved = {"train.steps": 4, "train.epochs": None, "train.init_from": str(model), **ema, **lora}
    state = {"stage": stage.model_dump(mode="json"), "settings": saved}
    assert as_trained(config, {"base": state}).fastimagen.train.stages["base"].lora == own.lora
