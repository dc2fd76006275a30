"""The configuration as one typed tree, and the only place where defaults are defined.

The user's file (ds.json) has DeepSpeed's keys at the top level and all fastimagen settings under ``"fastimagen"``.
Settings that DeepSpeed already has (optimizer, clipping, accumulation, precision, monitors) are not repeated here.
config_file.py reads the file and writes the error messages; config_rules.py holds the rules between fields.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from . import config_rules
from .data_config import DataConfig, TextConfig
from .diffusion_config import AugmentationConfig, ObjectiveConfig, ScheduleConfig
from .network_config import AnyNetworkConfig, LoraConfig
from .section import Section

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "heun"]


def _low_high(value: Any) -> Any:
    """A range as the command line and the web page write it, "0.2:5", as its two numbers; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        low, high = map(float, value.split(":"))
    except ValueError:
        raise ValueError("give two numbers, low:high, as in 0.2:5") from None
    return low, high


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low < high:
        raise ValueError(f"must ascend from 0 or above, got {low:g}:{high:g}")
    return value


LowHigh = Annotated[tuple[float, float], BeforeValidator(_low_high), AfterValidator(_ascending)]
"""A range of numbers: [0.2, 5] in a file, 0.2:5 on the command line."""
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
"""Modes of torch.compile."""


class SamplingConfig(Section):
    """Default sampling settings of a stage; each can be overridden when sampling."""

    sampler: SamplerName = "dpmpp_2m"
    """Sampler."""
    steps: int = Field(32, ge=1)
    """Sampling steps."""
    respacing: str = "even"
    """Which steps of a discrete schedule: "even", from its last to its first; "leading", multiples of a whole number,
    as in diffusers; fast27, smart27, smart50, smart100, smart185, super27, super40 or super100 of DeepFloyd IF; or the
    steps of each section of the schedule, from clean to noise: "10,10,3,2,2"."""
    variance: Literal["small", "learned"] = "small"
    """Variance of the steps of ddpm; the other samplers have none. "small" is the lower bound, "learned" what the
    network predicts (unet.learned_variance)."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance weight; 1 turns guidance off."""
    guidance_range: LowHigh | None = None
    """Noise levels sigma / alpha, low:high, between which guidance acts (Kynkäänniemi et al. 2024); outside, a step
    runs the network once and not twice. None guides at all of them."""
    threshold: Literal["dynamic", "static", "none"] = "dynamic"
    """Thresholding of x0 in every step (Imagen, section 2.3)."""
    percentile: float = Field(0.995, gt=0, le=1)
    """Percentile of |x0| for dynamic thresholding, as a fraction."""
    ceiling: float | None = Field(None, ge=1)
    """Largest threshold of dynamic thresholding: x0 is divided by no more than this. 1 is static thresholding; without
    it there is no limit, as in the paper."""
    tile: int | None = Field(None, ge=16)
    """Size of overlapping tiles, in pixels, for images that do not fit into memory as a whole."""
    augmentation_level: float | None = Field(None, ge=0, le=1)
    """Noise level of the low-resolution image of super-resolution stages; None takes augmentation.sample_level."""


class StageConfig(Section):
    """One stage of the cascade: a U-Net, its diffusion process and its sampler."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the stage, for folders and --stage."""
    size: int = Field(ge=4)
    """Height and width of the stage's images."""
    crop: int | None = None
    """Size of the random crops to train on (256 for the paper's 1024 stage); sampling is always at full size."""
    lowres_size: int | None = Field(None, ge=1)
    """Size of the images that a super-resolution stage enlarges, where no stage below it says so."""
    unet: AnyNetworkConfig
    """The network, by its `kind`."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Training objective."""
    augmentation: AugmentationConfig | None = None
    """Required for super-resolution stages, and only for these."""
    sampling: SamplingConfig = SamplingConfig()
    """Default sampling settings."""

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        config_rules.check_stage(self)
        return self


class CascadeConfig(Section):
    """The stages in order of size, smallest first."""

    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """One or more stages of ascending size; every stage after the first has a low-resolution input."""

    @model_validator(mode="after")
    def _consistent(self) -> CascadeConfig:
        config_rules.check_cascade(self)
        return self

    @property
    def channels(self) -> int:
        """Channels of the images, the same for all stages."""
        return self.stages[0].unet.channels

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`. Raises ValueError with the list of names if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f'no stage "{name}"; the cascade has {", ".join(s.name for s in self.stages)}')

    def below(self, name: str) -> StageConfig | None:
        """The stage whose output is the low-resolution input of stage `name`; None for the first."""
        index = self.stages.index(self.stage(name))
        return self.stages[index - 1] if index else None


class CascadeChanges(Section):
    """A preset or a model with changes: {"preset": "paper-light", "stages": {"base64": {"unet": {"dim": 192}}}}."""

    preset: str | None = None
    """Name of a preset (presets.py)."""
    model: str | None = None
    """Model directory: its stages, whose training starts from its weights."""
    stages: dict[str, dict[str, Any] | None] = {}
    """By stage name: the keys to change, or null to leave the stage out."""

    @model_validator(mode="after")
    def _consistent(self) -> CascadeChanges:
        if (self.preset is None) == (self.model is None):
            raise ValueError('give one of "preset" and "model", or "stages" as a list with all stages in full')
        return self


class EMAConfig(Section):
    """Exponential moving average of the fp32 weights."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Decay per optimizer step after the warm-up."""
    warmup: float = Field(10.0, gt=0)
    """At step n the decay is at most (1 + n) / (warmup + n), so that the average forgets early weights."""


class DistillConfig(Section):
    """Distillation: the stages learn to sample in few steps from a trained model (`fastimagen distill`)."""

    model: str
    """Model directory of the teacher."""
    method: Literal["progressive", "consistency"] = "progressive"
    """Who goes from a noisy image to the end of a student's step: "progressive", the teacher in `substeps` steps (after
    Salimans and Ho 2022); "consistency", the teacher in one and then the student itself (Heek et al. 2024)."""
    substeps: int = Field(8, ge=1)
    """DDIM steps of the teacher in each step of the student. Consistency begins with 4 and doubles them."""


class StageTrainConfig(Section):
    """Training settings of one stage."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; with neither steps nor epochs the stage takes those of train."""
    epochs: float | None = Field(None, gt=0)
    """Times that the stage reads every training sample, instead of steps."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed keys of this stage, merged over the top level of the file."""
    ema: EMAConfig | None = None
    """EMA of this stage; None takes train.ema."""
    init_from: str | None = None
    """Model directory with the initial weights of this stage."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the initial weights, which stay as they are; None trains the whole network."""

    @model_validator(mode="after")
    def _consistent(self) -> StageTrainConfig:
        _one_length(self.steps, self.epochs)
        return self


def _one_length(steps: int | None, epochs: float | None) -> None:
    """Raise ValueError if a training has two lengths."""
    if steps is not None and epochs is not None:
        raise ValueError(
            f"steps {steps} and epochs {epochs:g} both set the length of training: remove one of them "
            "(on the command line with --set KEY=null)"
        )


class TimeoutConfig(Section):
    """Seconds after which a run that hangs ends, on every rank. Rerun the command to resume."""

    heartbeat: float = Field(20.0, ge=1)
    """A process from which the others hear nothing for so long is lost: dead, stopped, or cut off from the network."""
    rendezvous: float = Field(300.0, gt=0)
    """Until all processes have found each other."""
    start: float = Field(3600.0, gt=0)
    """Phase before the first stage: rendering the built-in shapes, embedding their captions."""
    engine: float = Field(1800.0, gt=0)
    """Building a stage's network and engine, and loading its checkpoint."""
    data: float = Field(600.0, gt=0)
    """Waiting for one micro-batch."""
    forward: float = Field(300.0, gt=0)
    """Forward pass of one micro-batch."""
    backward: float = Field(300.0, gt=0)
    """Backward pass of one micro-batch, with the communication in it."""
    step: float = Field(300.0, gt=0)
    """Optimizer step."""
    log: float = Field(300.0, gt=0)
    """Writing a record of the metrics."""
    validation: float = Field(3600.0, gt=0)
    """Validation loss."""
    samples: float = Field(3600.0, gt=0)
    """Preview grid."""
    checkpoint: float = Field(1800.0, gt=0)
    """Saving a checkpoint."""
    first: float = Field(1800.0, gt=0)
    """Added when a stage enters a phase for the first time, since kernels may have to be compiled."""
    stop: float = Field(300.0, gt=0)
    """After a signal, until the checkpoint of the current step is being saved. What kills the job afterwards, such as
    Slurm, must not come earlier."""

    @property
    def longest(self) -> float:
        """As long as any phase may last."""
        return max(getattr(self, name) for name in type(self).model_fields) + self.first


class TrainConfig(Section):
    """The training loop."""

    run: str = "runs/train"
    """Run directory; --run-dir overrides it."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, data order, times, noise and dropout."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of every stage without its own; 1000 if there are neither steps nor epochs."""
    epochs: float | None = Field(None, gt=0)
    """Times that a stage without its own length reads every training sample, instead of steps."""
    stages: dict[str, StageTrainConfig] = {}
    """Overrides by stage name."""
    ema: EMAConfig = EMAConfig()
    """EMA of every stage without its own."""
    distill: DistillConfig | None = None
    """Learn from a trained model and not from images alone; None is ordinary training."""
    log_every: int = Field(10, ge=1)
    """Steps between records in metrics.jsonl and on the console."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept per stage: the last ones. The one with the smallest validation loss is kept as well."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of multiples of so many steps are kept too; a multiple of checkpoint_every."""
    validate_every: int = Field(500, ge=1)
    """Steps between validations on EMA weights."""
    validation_samples: Annotated[int, Field(ge=1)] | Literal["all"] = 256
    """Maximum number of validation samples, or "all"."""
    sample_every: int = Field(1000, ge=1)
    """Steps between preview grids, which take at most 32 sampling steps."""
    sample_count: int = Field(16, ge=1)
    """Images of a grid: the first captions of the validation set, with seeds 0, 1, 2, ... Without validation data, the
    first captions of the training set."""
    compile: CompileMode | None = None
    """Mode of torch.compile for the U-Nets; only with CUDA."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its algorithms for every new shape of a convolution and keep the fastest; only with CUDA. Another
    run may choose others, with other rounding errors."""
    max_nonfinite: int = Field(10, ge=1)
    """Consecutive steps with a non-finite loss or gradient that end the run."""
    timeouts: TimeoutConfig = TimeoutConfig()
    """When a run that hangs ends."""
    profile: int = Field(0, ge=0)
    """Steps of every stage, after 5 others, whose torch profiler trace goes to the folder profile of the run."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        _one_length(self.steps, self.epochs)
        for name, stage in self.stages.items():
            if "fastimagen" in stage.deepspeed:
                raise ValueError(f'train.stages.{name}.deepspeed takes DeepSpeed keys only: remove "fastimagen"')
        return self


def _kind_of_cascade(value: Any) -> str:
    """The tag of the form that a cascade is given in."""
    if isinstance(value, str):
        return "<preset>"
    if isinstance(value, CascadeChanges) or (isinstance(value, dict) and not isinstance(value.get("stages"), list)):
        return "<changes>"
    return "<stages>"


class FastimagenConfig(Section):
    """The "fastimagen" section of ds.json."""

    cascade: Annotated[
        Annotated[str, Tag("<preset>")]
        | Annotated[CascadeConfig, Tag("<stages>")]
        | Annotated[CascadeChanges, Tag("<changes>")],
        Discriminator(_kind_of_cascade),
    ] = "shapes"
    """Name of a preset (presets.py), a preset or a model directory with changes, or all stages in full."""
    data: DataConfig = DataConfig()
    """Images and captions."""
    text: TextConfig = TextConfig()
    """Text encoder and embedding cache."""
    train: TrainConfig = TrainConfig()
    """Training loop."""


class Config(Section):
    """A whole ds.json: DeepSpeed's keys and the "fastimagen" section."""

    deepspeed: dict[str, Any]
    """Every top-level key of the file except "fastimagen", for DeepSpeed."""
    fastimagen: FastimagenConfig
    """All fastimagen settings."""

    def to_json(self) -> str:
        """The content of the ds.json that has this configuration, with all defaults."""
        settings = self.fastimagen.model_dump(mode="json", exclude_defaults=False)
        return json.dumps({**self.deepspeed, "fastimagen": settings}, indent=2) + "\n"
