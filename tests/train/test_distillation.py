"""Distillation: what a student is asked for, the command, and the student as a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.cascade import Stage
from fastimagen.cli import main, parser
from fastimagen.commands.distill import student_config
from fastimagen.config import CascadeConfig, Config, DistillConfig
from fastimagen.config_file import config_from_dict
from fastimagen.networks.build import build_network
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.seeds import image_noise
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.distillation import Distillation, distillations, student_cascade
from fastimagen.train.objective import objectives
from fastimagen.train.trainer import Trainer
from tests.conftest import TOY_STAGES, toy_cascade, toy_tree, write_toy_model

CPU, FLOAT = torch.device("cpu"), torch.float32
TEXT = TextEmbeddings(
    torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, dtype=torch.bool)
)
PREDICTIONS: list[dict[str, Any]] = [
    {"prediction": "v"},
    {"prediction": "x0", "loss": "huber", "difference_weight": 1.0},
    {"prediction": "epsilon", "schedule": {"name": "linear", "timesteps": 1000}},
    {"prediction": "edm", "times": "edm"},
]


def teacher(tmp_path: Path, sampling: dict[str, Any], **changes: Any) -> Path:
    """A model directory whose stages have these sampling settings and changes."""
    config = toy_cascade()
    stages = []
    for stage in config.model_dump()["stages"]:
        own = {**sampling, "guidance": 1.0} if stage["name"] == "sr" else sampling
        stages.append(stage | {"sampling": own} | changes)
    return write_toy_model(tmp_path / "teacher", config=CascadeConfig.model_validate({"stages": stages}))


def objective(model: Path, name: str, steps: int, step: int = 1, **settings: Any) -> Distillation:
    """The objective of a student after `step` of 8 steps."""
    config = student_cascade(ImagenPipeline.from_pretrained(model).cascade.config, {name: steps})
    student = Stage(config.stage(name), config.below(name))
    return distillations(student, DistillConfig(model=str(model), **settings), 8, CPU, FLOAT)(step)


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", ["base", "sr"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"guidance": 3.0},
        {"guidance": 3.0, "guidance_range": "0.5:100", "threshold": "static"},
        {"guidance": 2.0, "percentile": 0.8, "ceiling": 1.2},
        {"guidance": 0.5, "threshold": "none"},
    ],
)
def test_a_target_is_what_the_teacher_samples(name: str, sampling: dict, tmp_path: Path) -> None:
    """A student of one step is asked for the teacher's DDIM sample from the same noise, guided and thresholded."""
    model = teacher(tmp_path, sampling)
    pipe = ImagenPipeline.from_pretrained(model)
    stage = pipe.cascade.stages[["base", "sr"].index(name)]
    size = stage.config.size
    noise = image_noise([3, 4], (3, size, size), stage=name, step=-1, device=CPU)
    condition, lowres = {}, images(8) if name == "sr" else None
    if lowres is not None:
        added = image_noise([3, 4], (3, size, size), stage="sr/augmentation", step=0, device=CPU)
        condition = stage.lowres_condition(lowres, torch.tensor(0.1, dtype=torch.float64), added)
    settings = stage.config.sampling.model_copy(update={"sampler": "ddim", "steps": 3})
    sampled = stage.sample(pipe.cascade.unets[name], TEXT, [3, 4], lowres=lowres, sampling=settings)
    own = objective(model, name, 1, substeps=3)
    with torch.no_grad():
        target = own.segments.target(torch.zeros(2, dtype=torch.long), noise, own.teacher.predict(TEXT, condition))
    torch.testing.assert_close(target.clamp(-1, 1), sampled, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["base", "sr"])
@pytest.mark.parametrize("changes", PREDICTIONS, ids=lambda changes: changes["prediction"])
def test_a_student_that_is_its_teacher_has_no_error(name: str, changes: dict, tmp_path: Path) -> None:
    """In one step of the teacher without guidance, for every kind of prediction; with guidance it has to learn."""
    schedule = {"schedule": changes["schedule"]} if "schedule" in changes else {}
    changes = {"objective": {key: value for key, value in changes.items() if key != "schedule"}, **schedule}
    plain = teacher(tmp_path / "plain", {"guidance": 1.0, "threshold": "none"}, **changes)
    unet = ImagenPipeline.from_pretrained(plain).cascade.unets[name]
    own = objective(plain, name, 5, substeps=1)
    pixels = images(own.student.config.size)
    draws = own.student.draw(0, [0, 1], pixels)
    assert own.training_loss(unet, pixels, TEXT, draws).tolist() == pytest.approx([0, 0], abs=1e-8)
    if name == "base":
        guided = teacher(tmp_path / "guided", {"guidance": 4.0, "threshold": "none"}, **changes)
        assert objective(guided, name, 5, substeps=1).training_loss(unet, pixels, TEXT, draws).min() > 1e-6


IF_UNET = {
    **dict(kind="if", dims=(16, 32), num_blocks=1, attention=(False, True), head_dim=16, pool_heads=4, groups=8),
    **dict(text_dim=64, max_text_length=4, zero_init=False),
}
EMPTY = TextEmbeddings(
    torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)), torch.ones(1, 4, dtype=torch.bool)
)


@pytest.mark.parametrize("name", ["base", "sr"])
def test_a_network_of_deepfloyd_if_teaches_its_guided_steps(name: str, tmp_path: Path) -> None:
    """Guided against the empty caption, on IF's schedule, with a variance behind its prediction that stays as it is."""
    stages = toy_cascade().model_dump()["stages"]
    for stage in stages:
        stage["unet"] = IF_UNET | {"lowres": stage["name"] == "sr"}
        stage["schedule"] = {"name": "squaredcos", "timesteps": 1000}
        stage["objective"] = {"prediction": "epsilon", "variance": "hybrid"}
        stage["sampling"] = {
            "guidance": 3.0,
            "percentile": 0.9,
            "ceiling": 1.5,
            "variance": "learned",
            "sampler": "ddpm",
        }
    model = write_toy_model(tmp_path / "if", config=CascadeConfig.model_validate({"stages": stages}))
    pipe = ImagenPipeline.from_pretrained(model)
    stage, size = pipe.cascade.stages[["base", "sr"].index(name)], {"base": 8, "sr": 16}[name]
    stage.empty_text = EMPTY
    config = student_cascade(pipe.cascade.config, 1).stage(name)
    assert (config.objective.prediction, config.objective.variance) == ("v", "frozen")  # alpha is 5e-5 at the start
    assert config.unet == stage.config.unet
    student = Stage(config, pipe.cascade.config.below(name), empty_text=EMPTY)
    own = distillations(student, DistillConfig(model=str(model), substeps=3), 8, CPU, FLOAT)(1)

    noise, lowres = image_noise([3, 4], (3, size, size), stage=name, step=-1, device=CPU), None
    condition: dict[str, torch.Tensor] = {}
    if name == "sr":
        lowres = images(8)
        added = image_noise([3, 4], (3, size, size), stage="sr/augmentation", step=0, device=CPU)
        condition = stage.lowres_condition(lowres, torch.tensor(0.1, dtype=torch.float64), added)
    settings = stage.config.sampling.model_copy(update={"sampler": "ddim", "variance": "small", "steps": 3})
    sampled = stage.sample(pipe.cascade.unets[name], TEXT, [3, 4], lowres=lowres, sampling=settings)
    with torch.no_grad():
        target = own.segments.target(torch.zeros(2, dtype=torch.long), noise, own.teacher.predict(TEXT, condition))
    torch.testing.assert_close(target.clamp(-1, 1), sampled, rtol=0, atol=2e-5)

    unet = build_network(config.unet)
    pixels = images(size)
    own.training_loss(unet, pixels, TEXT, student.draw(0, [0, 1], pixels)).mean().backward()
    last = unet.get_parameter("conv_out.weight").grad
    assert last is not None and last[:3].any() and not last[3:].any(), "the variance is not trained"


def test_gradients_reach_the_student_and_not_the_teacher(tmp_path: Path) -> None:
    """Also not through the student's own part of the target."""
    model = teacher(tmp_path, {"guidance": 2.0})
    unet = ImagenPipeline.from_pretrained(model).cascade.unets["base"].requires_grad_(True)
    own = objective(model, "base", 2, step=8, method="consistency", substeps=16)
    calls: list[bool] = []
    unet.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))
    pixels = images(8)
    own.training_loss(unet, pixels, TEXT, own.student.draw(0, [0, 1], pixels)).mean().backward()
    assert calls == [False, True] and any(parameter.grad is not None for parameter in unet.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in own.teacher.network.parameters())


def test_consistency_doubles_its_substeps(tmp_path: Path) -> None:
    model = teacher(tmp_path, {"guidance": 2.0})
    at = [objective(model, "base", 4, step, method="consistency", substeps=16) for step in range(1, 9)]
    assert [len(own.segments.times) - 1 for own in at] == [16, 16, 16, 32, 32, 32, 64, 64]
    assert len(objective(model, "base", 4, substeps=16).segments.times) - 1 == 64


def test_noise_levels_are_those_of_the_students_steps(tmp_path: Path) -> None:
    own = objective(teacher(tmp_path, {"guidance": 2.0}), "base", 4, substeps=8)
    pixels = torch.zeros(64, 3, 8, 8)
    levels = own.noise_levels(own.student.draw(0, range(64), pixels))
    schedule = own.student.diffusion.schedule
    steps = schedule.alpha_sigma(schedule.sampling_times(4)[:-1])[1]
    torch.testing.assert_close(levels.unique(), steps.flip(0))


# ---- configuration


def configured(toy_data: Path, model: Path, *flags: str, **changes: Any) -> Config:
    tree = toy_tree(toy_data)
    tree["fastimagen"]["train"] |= changes
    arguments = ["distill", "--model", str(model), "--out", "student", "--config", "unused", *flags]
    return student_config(config_from_dict(tree), parser().parse_args(arguments))


@pytest.fixture
def trained(toy_data: Path, tmp_path: Path) -> Path:
    """A model of the toy data, in its own folder."""
    return write_toy_model(tmp_path / "teacher", toy_data / "text_encoder")


def test_the_command_writes_a_configuration_that_trains_students(toy_data: Path, trained: Path) -> None:
    config = configured(toy_data, trained, "--method", "consistency").fastimagen
    cascade = config.cascade
    assert isinstance(cascade, CascadeConfig) and config.train.distill is not None
    assert (config.train.distill.method, config.train.distill.model) == ("consistency", str(trained))
    assert [(s.sampling.sampler, s.sampling.steps, s.sampling.guidance) for s in cascade.stages] == [
        ("ddim", 4, 1.0),
        ("ddim", 2, 1.0),
    ]
    assert {stage.sampling.threshold for stage in cascade.stages} == {"static"}
    assert {stage.objective.caption_dropout for stage in cascade.stages} == {0.0}
    assert {config.train.stages[name].init_from for name in ("base", "sr")} == {str(trained)}
    assert config.train.stages["base"].deepspeed["optimizer"] == {"type": "Muon"}  # the file's own
    by_stage = configured(toy_data, trained, "--steps", "base=8").fastimagen.cascade
    assert isinstance(by_stage, CascadeConfig) and [s.sampling.steps for s in by_stage.stages] == [8, 2]
    objective_at = objectives(Stage(cascade.stages[0]), config.train, 6, CPU, FLOAT)
    assert isinstance(objective_at(1), Distillation)


def test_the_dry_run_names_teacher_and_cost(toy_data: Path, trained: Path, tmp_path: Path) -> None:
    text = Trainer(configured(toy_data, trained), tmp_path / "run").describe()
    assert f"base: learns 4 steps from {trained}, progressive, 8 substeps each; its frozen teacher adds 0." in text


def test_its_settings_are_set_without_naming_the_teacher_twice(
    toy_data: Path, trained: Path, write_config: Callable, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(toy_tree(toy_data))
    arguments = ["distill", "--model", str(trained), "--out", "student", "--config", str(config)]
    assert main([*arguments, "--set", "fastimagen.train.distill.substeps=3", "--dry-run"]) == 0
    assert "learns 4 steps" in (text := capsys.readouterr().out) and "3 substeps each" in text


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--steps", "0"], {}, "--steps: give a number of steps, or base=4,sr=2"),
        (["--steps", "base=x"], {}, "--steps: give a number of steps"),
        (["--steps", "top=4"], {}, '--steps names the unknown stage "top"; the model has base, sr'),
        ([], {"distill": {"model": "m", "method": "x"}}, "distill.method: Input should be 'progressive' or 'consis"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(
    flags: list[str], changes: dict, message: str, toy_data: Path, trained: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        configured(toy_data, trained, *flags, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"sampling": {"steps": 4}}, 'stage "base" must be sampled as it is trained: set sampling.sampler to "ddim"'),
        ({"size": 12}, 'stage "base" differs from that of .* in size'),
        ({"schedule": {"shift": 2.0}}, 'stage "base" differs from that of .* in schedule'),
        ({"name": "first"}, 'has no stage "first"'),
        (
            {"objective": {"perceptual": {"dino": {"model": "dino"}}, "caption_dropout": 0.0}},
            'stage "base": distillation has a loss of its own: set objective.perceptual to null',
        ),
    ],
)
def test_a_cascade_that_the_model_cannot_teach_is_refused(
    stage: dict, message: str, toy_data: Path, trained: Path
) -> None:
    tree = toy_tree(toy_data)
    student = {**TOY_STAGES[0], "sampling": {"sampler": "ddim", "steps": 4, "guidance": 1.0}, **stage}
    tree["fastimagen"]["cascade"] = {"stages": [student]}
    tree["fastimagen"]["train"] |= {"distill": {"model": str(trained)}, "stages": {}}
    with pytest.raises(ValueError, match=message):
        Trainer(config_from_dict(tree))


def test_a_discrete_schedule_needs_enough_timesteps(toy_data: Path, tmp_path: Path) -> None:
    config = toy_cascade(schedule={"name": "linear", "timesteps": 25}, objective={"prediction": "v"})
    model = write_toy_model(tmp_path / "teacher", toy_data / "text_encoder", config)
    with pytest.raises(ValueError, match=r"4 steps of 8 substeps are more than the 25 timesteps .*distill.substeps"):
        Trainer(configured(toy_data, model))
    Trainer(configured(toy_data, model, distill={"model": "any", "substeps": 6}))


def test_another_text_encoder_is_refused(toy_data: Path, trained: Path) -> None:
    weights = trained / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"text.encoder .* is not the text encoder of .*teacher: set it to that"):
        configured(toy_data, trained)
    index = json.loads((trained / "model_index.json").read_text())
    index["text_encoder"] |= {"included": False, "name": "t5_base"}
    (trained / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not the text encoder of"):
        configured(toy_data, trained)
