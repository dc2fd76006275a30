"""Few-step students: a stage learns to do in a few DDIM steps what a trained model does in many.

The teacher's guidance and thresholding are part of the target, so that the student needs neither. The targets are in
diffusion/distillation.py; data, times, noise and the loop are those of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..cascade import Stage, encode_halves
from ..config import CascadeConfig, DistillConfig, SamplingConfig, StageConfig
from ..config_file import validate
from ..data_config import TextConfig
from ..diffusion.distillation import Predict, Segments
from ..diffusion.draws import Draws
from ..diffusion.guidance import guided
from ..diffusion.process import expand
from ..diffusion.schedule import make_schedule
from ..diffusion_config import ObjectiveConfig
from ..files import read_safetensors
from ..networks.build import build_network
from ..networks.network import Network
from ..sampling.model_directory import load_weights, read_cascade, read_shapes
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5_NAMES, encoder_identity

FIRST_SUBSTEPS = 4  # of consistency distillation, which doubles them in the training, as in its paper
STUDENT_STEPS, ENLARGING_STEPS = 4, 2
"""Steps of a student by default; its low-resolution input decides nearly all of a super-resolution stage's image."""
SMALL_ALPHA = 1e-3
"""At the noisiest time, 5e-5 for DeepFloyd IF: errors of a predicted epsilon reach x0 more than a thousandfold."""


# ---- configuration


def student_cascade(teacher: CascadeConfig, steps: int | Mapping[str, int] | None = None) -> CascadeConfig:
    """The cascade of students: the teacher's networks, sampled by DDIM in a few steps without guidance.

    steps: of all stages, or by stage; by default STUDENT_STEPS, and ENLARGING_STEPS for super-resolution. Raises
    ValueError for unknown stages.
    """
    by_stage = dict(steps) if isinstance(steps, Mapping) else {}
    if unknown := sorted(by_stage.keys() - {stage.name for stage in teacher.stages}):
        names = ", ".join(stage.name for stage in teacher.stages)
        raise ValueError(f'--steps names the unknown stage "{unknown[0]}"; the model has {names}')
    students = []
    for stage in teacher.stages:
        default = ENLARGING_STEPS if stage.unet.lowres else STUDENT_STEPS
        own = steps if isinstance(steps, int) else by_stage.get(stage.name, default)
        students.append(student_of(stage, own))
    return CascadeConfig(stages=tuple(students))


def student_of(teacher: StageConfig, steps: int) -> StageConfig:
    """The stage of a student that samples in `steps` steps of DDIM. What its network predicts of a variance is not
    trained, because DDIM needs none."""
    old = teacher.objective
    objective = ObjectiveConfig(  # captions are never dropped, and the loss has a weight of its own
        prediction=_prediction_of_student(teacher),
        loss=old.loss,
        difference_weight=old.difference_weight,
        sigma_data=old.sigma_data,
        caption_dropout=0.0,
    )
    sampling = SamplingConfig(
        sampler="ddim",
        steps=steps,
        guidance=1.0,
        threshold="none" if teacher.sampling.threshold == "none" else "static",
        tile=teacher.sampling.tile,
        augmentation_level=teacher.sampling.augmentation_level,
    )
    changed = teacher.model_dump() | {"objective": objective.model_dump(), "sampling": sampling.model_dump()}
    return validate(StageConfig, changed, f"the student of stage {teacher.name}")


def _prediction_of_student(teacher: StageConfig) -> Literal["epsilon", "x0", "v", "edm", "flow"]:
    """The teacher's own, or v in place of epsilon where x0 = (x - sigma epsilon) / alpha has nothing left of it at the
    time from which a student takes its first, large step."""
    prediction = teacher.objective.prediction
    if prediction != "epsilon":
        return prediction
    schedule = make_schedule(teacher.schedule)
    alpha, _ = schedule.alpha_sigma(schedule.sampling_times(1)[:1])
    return "v" if alpha.item() < SMALL_ALPHA else prediction


def check_distillation(cascade: CascadeConfig, distill: DistillConfig) -> None:
    """Raise ValueError, with one line that names the key, for a cascade that the model of `distill` cannot teach."""
    teacher = read_cascade(distill.model)[0]
    for stage in cascade.stages:
        if stage.name not in {other.name for other in teacher.stages}:
            raise ValueError(f'train.distill: {distill.model} has no stage "{stage.name}"')
        other, label = teacher.stage(stage.name), f'train.distill: stage "{stage.name}"'
        if stage.sampling.sampler != "ddim" or stage.sampling.guidance != 1:
            raise ValueError(
                f'{label} must be sampled as it is trained: set sampling.sampler to "ddim" and sampling.guidance to 1, '
                f"or let `fastimagen distill` write the configuration"
            )
        if stage.objective.perceptual is not None:
            raise ValueError(f"{label}: distillation has a loss of its own: set objective.perceptual to null")
        for name in ("size", "schedule", "augmentation"):
            if getattr(stage, name) != getattr(other, name):
                raise ValueError(f"{label} differs from that of {distill.model} in {name}")
        for name in ("channels", "lowres", "text_dim"):
            if getattr(stage.unet, name) != getattr(other.unet, name):
                raise ValueError(f"{label} differs from that of {distill.model} in unet.{name}")
        total, timesteps = stage.sampling.steps * distill.substeps, stage.schedule.timesteps
        if timesteps is not None and total > timesteps:
            raise ValueError(
                f"{label}: {stage.sampling.steps} steps of {distill.substeps} substeps are more than the {timesteps} "
                f"timesteps of its schedule: lower train.distill.substeps"
            )


def describe_distillation(student: StageConfig, distill: DistillConfig) -> str:
    """What a student learns, and what it costs beside training, in one line."""
    path = Path(distill.model) / student.name / "model.safetensors"
    parameters = sum(math.prod(shape) for shape in read_shapes(path).values())
    teacher = read_cascade(distill.model)[0].stage(student.name)
    halves = 1 if teacher.unet.text_dim is None or teacher.sampling.guidance == 1 else 2
    calls = halves * distill.substeps if distill.method == "progressive" else halves + 1
    own, others = student.objective.prediction, teacher.objective.prediction
    changed = "" if own == others else f" It predicts {own} and its teacher {others}: give it more training steps."
    return (
        f"learns {student.sampling.steps} steps from {distill.model}, {distill.method}, {distill.substeps} substeps "
        f"each; its frozen teacher adds {parameters / 1e6:.2f} M parameters in memory and {calls} forward passes to "
        f"a training step: estimates leave both out.{changed}"
    )


def check_text_encoder(teacher: Mapping[str, Any] | None, model: str, text: TextConfig) -> None:
    """Raise ValueError if the configuration's text encoder is not the one in the teacher's model_index.json."""
    if teacher is None:
        return
    if not teacher["included"]:
        same = T5_NAMES.get(text.encoder, (text.encoder,))[0] == T5_NAMES.get(teacher["name"], (teacher["name"],))[0]
    else:
        folder = Path(model) / teacher["name"]
        own, others = (encoder_identity(path) for path in (text.encoder, folder))
        same = all(own[key] == others[key] for key in ("revision", "tokenizer"))
    if not same:
        raise ValueError(
            f"fastimagen.text.encoder {text.encoder} is not the text encoder of {model}: set it to that, and run "
            f"fastimagen embed"
        )


# ---- the objective


def distillations(
    student: Stage, settings: DistillConfig, steps: int, device: torch.device, dtype: torch.dtype
) -> Callable[[int], Distillation]:
    """The objective of the student by step, counted from 1. Loads the teacher's stage in `dtype` to `device`."""
    teacher = Teacher(student, settings.model, device, dtype)
    substeps = [settings.substeps]
    while settings.method == "consistency" and substeps[0] >= 2 * FIRST_SUBSTEPS:
        substeps.insert(0, substeps[0] // 2)
    rounds = [
        Distillation(
            student,
            teacher,
            Segments.of(student.diffusion.schedule, student.config.sampling.steps, number, device),
            itself=settings.method == "consistency",
        )
        for number in substeps
    ]
    return lambda step: rounds[(step - 1) * len(rounds) // steps]


class Teacher:
    """A frozen stage of a model directory, with its own guidance and thresholding."""

    def __init__(self, student: Stage, model: str, device: torch.device, dtype: torch.dtype) -> None:
        config = read_cascade(model)[0].stage(student.name)
        self.stage = Stage(config, empty_text=student.empty_text)
        with torch.device("meta"):
            self.network: Network = build_network(config.unet)
        path = Path(model) / config.name / "model.safetensors"
        load_weights(self.network, read_safetensors(path), str(path), assign=True)
        self.network.to(device, dtype).eval().requires_grad_(False)

    def predict(self, text: TextEmbeddings | None, condition: Mapping[str, Tensor]) -> Predict:
        """x0 as the teacher's own sampling computes it, for samples with times of their own. condition: the
        low-resolution arguments of the network."""
        diffusion, sampling, network = self.stage.diffusion, self.stage.config.sampling, self.network
        weight = None if text is None or sampling.guidance == 1 else sampling.guidance
        keywords: dict[str, Any] = dict(condition)
        if weight is not None:
            keywords = {name: torch.cat([value, value]) for name, value in condition.items()}  # (2B, ...)
        if text is not None and weight is None:
            keywords["text"] = network.encode_text(text)
        elif text is not None:
            keywords["text"] = encode_halves(network, text, self.stage.null_text(text))

        def predict(x: Tensor, time: Tensor) -> Tensor:
            model_input, network_time = diffusion.network_input(x, time), diffusion.schedule.network_time(time)
            if weight is None:
                output = network(model_input, network_time, **keywords).to(x.dtype)
            else:
                doubled = torch.cat([model_input, model_input])  # (2B, C, H, W)
                both = network(doubled, network_time.repeat(2), **keywords).to(x.dtype)  # (2B, C, H, W)
                conditional, unconditional = both.chunk(2)  # (B, C, H, W) each
                weights = torch.where(guided(diffusion, sampling, time), weight, 1.0)  # (B,)
                output = unconditional.lerp(conditional, expand(weights, x).to(x.dtype))
            return _thresholded(diffusion.x0(_without_variance(output, x), x, time), sampling)

        return predict


def _without_variance(output: Tensor, x: Tensor) -> Tensor:
    """The prediction for x (B, C, H, W) in a network's output (B, C or 2 C, H, W)."""
    return output[:, : x.shape[1]]  # (B, C, H, W)


def _thresholded(x0: Tensor, sampling: SamplingConfig) -> Tensor:
    if sampling.threshold == "dynamic":
        return ops.dynamic_threshold(x0, sampling.percentile, ceiling=sampling.ceiling)
    return x0.clamp(-1, 1) if sampling.threshold == "static" else x0


@dataclass(frozen=True)
class Distillation:
    """The objective of a student: the x0 that one of its steps needs."""

    student: Stage
    teacher: Teacher
    segments: Segments
    itself: bool
    """Whether the student itself goes the way that is left after one step of the teacher (consistency)."""

    def training_loss(
        self,
        unet: nn.Module,
        images: Tensor,
        text: TextEmbeddings | None,
        draws: Draws,
        *,
        drop_captions: bool = True,
    ) -> Tensor:
        """Weighted loss per sample (B,) for images (B, C, H, W) in [-1, 1]. Captions are never dropped: the student is
        not guided."""
        condition = self.student.training_lowres(images, draws)
        start, diffusion = self._start(draws), self.student.diffusion
        time = self.segments.times[start]  # (B,)
        x = diffusion.add_noise(images, draws.noise, time)  # (B, C, H, W)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            keywords: dict[str, Any] = condition if text is None else {**condition, "text": text}
            output = unet(diffusion.network_input(x, time), diffusion.schedule.network_time(time), **keywords)
            return diffusion.x0(_without_variance(output, x), x, time)

        def predict_as_sampled(x: Tensor, time: Tensor) -> Tensor:
            return _thresholded(predict(x, time), self.student.config.sampling)

        with torch.no_grad():
            itself = predict_as_sampled if self.itself else None
            target = self.segments.target(start, x, self.teacher.predict(text, condition), itself)  # (B, C, H, W)
        losses = diffusion.penalty(predict(x, time) - target)  # (B,)
        return losses * self.segments.weight(start).to(losses)

    def noise_levels(self, draws: Draws) -> Tensor:
        """The noise levels sigma (B,) at which the student's steps start."""
        return self.student.diffusion.schedule.alpha_sigma(self.segments.times[self._start(draws)])[1]

    def _start(self, draws: Draws) -> Tensor:
        return self.segments.start(draws.time, inside=self.itself)
