"""The configuration as one typed tree, and the only place with defaults.

The file the user writes (ds.json) holds plain DeepSpeed keys at the top level and everything of ours under
``"fastimagen"``. What DeepSpeed already expresses (optimizer, clipping, accumulation, precision, monitors) has no
second knob here. config_file.py reads it and words the errors.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Base class of all sections: an unknown key is an error, values are frozen, docstrings describe the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class UNetConfig(Section):
    """One U-Net. Presets (presets.py) give MinImagen's and the paper's networks."""

    channels: int = Field(3, ge=1)
    """Image channels, in and out."""
    lowres: bool = False
    """Conditioned on a low-resolution image: super-resolution."""
    text_dim: int | None = Field(None, ge=1)
    """Width of the text embeddings (T5-XXL: 4096); None builds a network without any text path."""
    dim: int = Field(128, ge=2)
    """Channels after the stem; every level has dim * dim_mults[level]."""
    dim_mults: tuple[int, ...] = (1, 2, 4)
    """Width of each resolution level, in units of dim."""
    num_blocks: int | tuple[int, ...] = 1
    """Residual blocks per level after the first, one number for all levels or one each."""
    self_attention: bool | tuple[bool, ...] = True
    """Transformer block (self-attention, feed-forward) at the end of these levels."""
    cross_attention: bool | tuple[bool, ...] = True
    """Cross-attention to the text tokens in the first residual block of these levels."""
    middle_attention: bool = False
    """Self-attention between the two middle blocks."""
    heads: int = Field(8, ge=1)
    """Query heads of self-attention and of attention pooling."""
    cross_heads: int | None = Field(None, ge=1)
    """Heads of cross-attention; None means heads."""
    head_dim: int = Field(64, ge=16, le=128, multiple_of=8)
    """Channels per head."""
    cond_dim: int | None = Field(None, ge=1)
    """Width of the conditioning tokens (time and text); None means dim."""
    time_tokens: int = Field(2, ge=1)
    """Conditioning tokens made from the time embedding, and as many from the low-res time."""
    stem_kernels: tuple[int, ...] = (3, 7, 15)
    """Odd kernel sizes of the parallel stem convolutions (MultiScaleStem); the paper's is a single 3."""
    downsample_first: bool = False
    """Efficient U-Net: the stride comes before a level's blocks going down and after them going up."""
    full_resolution: Literal["plain", "extra_block"] = "plain"
    """Layers of an Efficient U-Net at full resolution besides stem and last block. "extra_block" adds a residual
    block after the stem, its skip connection, and the low-res image before the last convolution, which prevents
    colour shift."""
    stem_stride: int = Field(1, ge=1)
    """Patch side folded into channels before the stem (pixel-unshuffle) and unfolded after the last convolution."""
    positional_encoding: bool = False
    """Add sines and cosines of every pixel's position, through a 1x1 convolution, to the stem's output. Small networks
    learn words like "left" sooner. Not allowed for stages that train on crops."""
    groups: int = Field(8, ge=1)
    """GroupNorm groups."""
    text_padding: Literal["none", "null"] = "none"
    """"none": a sample attends to its real tokens only; "null": to max_text_length tokens, with padding replaced by
    learned null tokens (MinImagen)."""
    max_text_length: int = Field(256, ge=1)
    """Text tokens beyond this are an error."""
    text_pooling: Literal["mean", "attention"] = "attention"
    """How text tokens become the vector that is added to the time embedding (Imagen, section 2.5: attention)."""
    text_in_self_attention: bool = False
    """Text keys and values inside self-attention, as in the paper's 64 and 256 models (appendix B)."""
    qk_norm: bool = False
    """l2-normalize queries and keys, with learned scales per channel."""
    zero_init: bool = True
    """Start the last convolution, and with it the network's output, at zero."""
    checkpoint_levels: tuple[int, ...] = ()
    """Levels whose activations are recomputed in the backward pass to save memory."""

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        levels = len(self.dim_mults)
        if not levels or min(self.dim_mults) < 1:
            raise ValueError(f"dim_mults must hold at least one positive number, got {self.dim_mults}")
        for name in ("num_blocks", "self_attention", "cross_attention"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries but dim_mults has {levels} levels")
        for width in (self.dim, *(self.dim * mult for mult in self.dim_mults)):
            if width % self.groups:
                raise ValueError(f"a level of {width} channels cannot be split into groups = {self.groups}")
        if min(self.per_level("num_blocks")) < 0:
            raise ValueError(f"num_blocks must not be negative, got {self.num_blocks}")
        if not self.stem_kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in self.stem_kernels):
            raise ValueError(f"stem_kernels must be odd, got {self.stem_kernels}")
        if self.text_dim is None and (self.text_in_self_attention or self.text_padding == "null"):
            raise ValueError("text_in_self_attention and text_padding need text_dim")
        if any(not 0 <= level < levels for level in self.checkpoint_levels):
            raise ValueError(f"checkpoint_levels {self.checkpoint_levels} outside the {levels} levels 0..{levels - 1}")
        if self.full_resolution == "extra_block" and not self.downsample_first:
            raise ValueError('full_resolution "extra_block" is for U-Nets with downsample_first')
        return self

    def per_level(self, name: str) -> tuple:
        """Field `name` as one value for each level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.dim_mults)

    @property
    def stride(self) -> int:
        """Image height and width must be multiples of this."""
        halvings = len(self.dim_mults) - (0 if self.downsample_first else 1)
        return self.stem_stride * 2**halvings


class ScheduleConfig(Section):
    """Variance-preserving noise schedule: x_t = alpha(t) x_0 + sigma(t) noise."""

    name: Literal["cosine", "linear"] = "cosine"
    """"cosine" is continuous in time (Nichol and Dhariwal 2021), "linear" has discrete betas (DDPM, MinImagen)."""
    timesteps: int | None = Field(None, ge=2)
    """Steps of a discrete schedule; None is continuous time (cosine only)."""
    shift: float = Field(1.0, gt=0)
    """Noise level multiplier sigma/alpha of the shifted cosine (Hoogeboom et al. 2023); above 1 is noisier."""
    logsnr_range: tuple[float, float] = (-15.0, 15.0)
    """Bounds of the log signal-to-noise ratio, so that alpha never reaches zero."""

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if self.name == "linear" and self.timesteps is None:
            raise ValueError('the linear schedule is discrete: give "timesteps" (DDPM and MinImagen: 1000)')
        if self.name == "cosine" and self.timesteps is not None:
            raise ValueError('the cosine schedule is continuous: leave "timesteps" out')
        if self.name == "linear" and self.shift != 1.0:
            raise ValueError('"shift" belongs to the cosine schedule')
        if self.logsnr_range[0] >= self.logsnr_range[1]:
            raise ValueError(f"logsnr_range must ascend, got {self.logsnr_range}")
        return self


class ObjectiveConfig(Section):
    """What the U-Net predicts and how its error is weighted."""

    prediction: Literal["epsilon", "x0", "v", "edm"] = "v"
    """The network's output: the noise, the image, v = alpha noise - sigma image (Salimans and Ho 2022), or the
    preconditioned residual of Karras et al. 2022, table 1."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Error between prediction and target."""
    weighting: Literal["none", "min_snr"] = "none"
    """Weight of a sample by its noise level; min_snr: Hang et al. 2023. For "edm", "none" is Karras et al.'s own."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Ceiling of the signal-to-noise ratio in the min_snr weight."""
    times: Literal["uniform", "edm"] = "uniform"
    """Distribution of training times: uniform in t, or log-normal noise levels (Karras et al. 2022, section 5)."""
    edm_mean: float = -1.2
    """P_mean of the log-normal noise levels."""
    edm_std: float = Field(1.2, gt=0)
    """P_std of the log-normal noise levels."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the images, for EDM's scalings."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of captions replaced by the null text, for classifier-free guidance (Imagen, section 2.2)."""


class AugmentationConfig(Section):
    """Noise conditioning augmentation of the low-resolution image (Imagen, section 2.4)."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Schedule of the augmentation noise."""
    train_range: tuple[float, float] = (0.0, 1.0)
    """Training draws one level per sample, uniformly from this part of [0, 1]."""
    sample_level: float = Field(0.1, ge=0, le=1)
    """Level used in sampling."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentationConfig:
        low, high = self.train_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"train_range must ascend within [0, 1], got {self.train_range}")
        return self


SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "heun"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
"""Modes of torch.compile."""


class SamplingConfig(Section):
    """Defaults of a stage's sampler; every one can be overridden when sampling."""

    sampler: SamplerName = "dpmpp_2m"
    """Sampler."""
    steps: int = Field(32, ge=1)
    """Sampling steps."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance weight; 1 is the conditional model alone."""
    threshold: Literal["dynamic", "static", "none"] = "dynamic"
    """Clipping of x0 in every step (Imagen, section 2.3)."""
    percentile: float = Field(0.995, gt=0, le=1)
    """Percentile of |x0| in dynamic thresholding."""
    tile: int | None = Field(None, ge=16)
    """Size of overlapping tiles, in pixels, for images that do not fit into memory as a whole."""


class StageConfig(Section):
    """One stage of the cascade: a U-Net, its diffusion process and its sampler."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the stage: folders and --stage use it."""
    size: int = Field(ge=4)
    """Height and width of the stage's images."""
    crop: int | None = None
    """Train on random crops of this side (the paper's 1024 stage: 256); sampling is always at full size."""
    unet: UNetConfig
    """The network."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Training objective."""
    augmentation: AugmentationConfig | None = None
    """Required for super-resolution stages, and only for these."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults of sampling."""

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        for label, side in (("size", self.size), ("crop", self.crop or self.size)):
            if side % self.unet.stride:
                raise ValueError(
                    f'stage "{self.name}": {label} {side} is not a multiple of {self.unet.stride}, '
                    f"the total stride of its U-Net"
                )
        if self.crop is not None and self.crop > self.size:
            raise ValueError(f'stage "{self.name}": crop {self.crop} is larger than size {self.size}')
        if self.unet.lowres and self.augmentation is None:
            raise ValueError(f'stage "{self.name}" has a low-resolution input, so it needs "augmentation"')
        if self.crop is not None and self.unet.positional_encoding:
            raise ValueError(
                f'stage "{self.name}" trains on crops, which a positional encoding of the whole image '
                f"does not fit: remove one of the two"
            )
        if not self.unet.lowres and self.augmentation is not None:
            raise ValueError(f'stage "{self.name}" has no low-resolution input, so it takes no "augmentation"')
        return self


class CascadeConfig(Section):
    """The stages in order, smallest first."""

    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """One or more, of ascending size; every stage after the first has a low-resolution input."""

    @model_validator(mode="after")
    def _consistent(self) -> CascadeConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        sizes = [stage.size for stage in self.stages]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"stage sizes must ascend, got {sizes}")
        for stage in self.stages[1:]:
            if not stage.unet.lowres:
                raise ValueError(f'stage "{stage.name}" follows another, so its U-Net needs "lowres": true')
        widths = {stage.unet.text_dim for stage in self.stages if stage.unet.text_dim is not None}
        if len(widths) > 1:
            raise ValueError(f"all stages read the same text, but text_dim differs: {sorted(widths)}")
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`. Raises ValueError that lists the names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f'no stage "{name}"; the cascade has {", ".join(s.name for s in self.stages)}')

    def below(self, name: str) -> StageConfig | None:
        """The stage whose images stage `name` enlarges; None for the first."""
        index = self.stages.index(self.stage(name))
        return self.stages[index - 1] if index else None


class ShapesConfig(Section):
    """The built-in captioned shapes, which training renders if data.shards is missing."""

    count: int = Field(20000, ge=1)
    """Training images."""
    size: int = Field(64, ge=16)
    """Height and width of the images."""
    seed: int = Field(0, ge=0)
    """Seed of the images."""


class DataConfig(Section):
    """Where images and captions come from."""

    shards: str | tuple[str, ...] = "data/shapes/train"
    """WebDataset tars: a folder, a glob, a {000..999} range or a list; local paths or URLs."""
    validation: str | tuple[str, ...] | None = "data/shapes/val"
    """Validation tars; None trains without validation."""
    shapes: ShapesConfig | None = None
    """Render the built-in shapes into the parent folder of data.shards if they are missing."""
    cache: str | None = None
    """Folder for downloaded shards; required for remote shards."""
    threads: int = Field(2, ge=1)
    """Threads that decode images, per process."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Training stops if a larger share of the samples is unreadable or has no caption."""


class TextConfig(Section):
    """The text encoder and its embedding cache."""

    encoder: str = "data/shapes/text_encoder"
    """Hugging Face name or folder of a T5 encoder, or one of the short names (t5_small ... xxl1.1)."""
    revision: str | None = None
    """Revision of the encoder on the hub."""
    max_length: int = Field(256, ge=1)
    """Tokens of a caption that are kept."""
    cache: str | None = None
    """Folder of the embedding cache; None is next to the shards."""
    batch_size: int = Field(64, ge=1)
    """Captions encoded at once."""


class EMAConfig(Section):
    """Exponential moving average of the fp32 weights."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Decay per optimizer step after the warm-up."""
    warmup: float = Field(10.0, gt=0)
    """At step n the decay is at most (1 + n) / (warmup + n), so that the average forgets early weights."""


class StageTrainConfig(Section):
    """What differs from stage to stage in training."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; None takes train.steps."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed keys of this stage, merged over the top level of the file."""
    ema: EMAConfig | None = None
    """EMA of this stage; None takes train.ema."""
    init_from: str | None = None
    """Model directory with the initial weights of this stage."""


class TrainConfig(Section):
    """The training loop."""

    run: str = "runs/train"
    """Run directory; --run-dir overrides it."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, data order, times, noise and dropout."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of every stage without its own."""
    stages: dict[str, StageTrainConfig] = {}
    """Overrides by stage name."""
    ema: EMAConfig = EMAConfig()
    """EMA of every stage without its own."""
    log_every: int = Field(10, ge=1)
    """Steps between records in metrics.jsonl and on the console."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept per stage."""
    validate_every: int = Field(500, ge=1)
    """Steps between validations on EMA weights."""
    validation_samples: int = Field(256, ge=1)
    """Maximum number of validation samples."""
    sample_every: int = Field(1000, ge=1)
    """Steps between sample grids."""
    sample_count: int = Field(16, ge=1)
    """Images of a grid: the first captions of the validation set, with seeds 0, 1, 2, ..."""
    compile: CompileMode | None = None
    """Mode of torch.compile for the U-Nets; only with CUDA."""
    max_nonfinite: int = Field(10, ge=1)
    """Consecutive steps with a non-finite loss or gradient that end the run."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for name, stage in self.stages.items():
            if "fastimagen" in stage.deepspeed:
                raise ValueError(f'train.stages.{name}.deepspeed takes DeepSpeed keys, not "fastimagen"')
        return self


class FastimagenConfig(Section):
    """The "fastimagen" section of ds.json."""

    cascade: Annotated[
        Annotated[str, Tag("<preset>")] | Annotated[CascadeConfig, Tag("<stages>")],
        Discriminator(lambda value: "<preset>" if isinstance(value, str) else "<stages>"),
    ] = "shapes"
    """Name of a preset (presets.py) or the stages in full."""
    data: DataConfig = DataConfig()
    """Images and captions."""
    text: TextConfig = TextConfig()
    """Text encoder and embedding cache."""
    train: TrainConfig = TrainConfig()
    """Training loop."""


class Config(Section):
    """A whole ds.json: DeepSpeed's keys as they are, and ours."""

    deepspeed: dict[str, Any]
    """Every top-level key of the file but "fastimagen", for DeepSpeed."""
    fastimagen: FastimagenConfig
    """Everything of ours."""

    def to_json(self) -> str:
        """The file this configuration stands for."""
        ours = self.fastimagen.model_dump(mode="json", exclude_defaults=False)
        return json.dumps({**self.deepspeed, "fastimagen": ours}, indent=2) + "\n"
