"""The diffusion process of a stage, as sections of the configuration: noise schedule, objective, augmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from . import config_rules
from .section import Section


class ScheduleConfig(Section):
    """Noise schedule: x_t = alpha(t) x_0 + sigma(t) noise."""

    name: Literal["cosine", "linear", "squaredcos", "flow"] = "cosine"
    """"cosine" is continuous in time (Nichol and Dhariwal 2021), "linear" has discrete betas (DDPM, MinImagen),
    "squaredcos" those of the cosine schedule (DeepFloyd IF), "flow" is the straight path of flow matching, alpha = 1 -
    t and sigma = t (Lipman et al. 2023), continuous in time."""
    timesteps: int | None = Field(None, ge=2)
    """Timesteps of the discrete schedules, linear and squaredcos; None is continuous time."""
    shift: float = Field(1.0, gt=0)
    """Factor on sigma / alpha of the cosine schedule (Hoogeboom et al. 2023) or of flow (Esser et al. 2024, section
    5.3.2); above 1 is noisier."""
    logsnr_range: tuple[float, float] = (-15.0, 15.0)
    """Bounds of the cosine schedule's log signal-to-noise ratio, so that alpha never reaches zero."""

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        config_rules.check_schedule(self)
        return self


class LPIPSConfig(Section):
    """Distance of images in the features of a VGG16 (LPIPS: Zhang et al. 2018), for local patterns such as textures."""

    vgg: str
    """File with the weights of a VGG16 under torchvision's names, such as vgg16-397923af.pth: .safetensors, or a .pth
    with tensors only. Its convolutions are read, and no other layers."""
    linear: str
    """File with the linear layers of LPIPS for VGG16: weights/v0.1/vgg.pth of the package lpips."""
    weight: float = Field(0.1, gt=0)
    """Factor on the distance, which is added to the loss."""


class DINOConfig(Section):
    """1 - cosine between the patch tokens of two images in a vision transformer of DINO, for what images show."""

    model: str
    """Folder of a DINOv2 or DINOv3 transformer as the package transformers writes it: config.json and
    model.safetensors."""
    size: int = Field(224, ge=1)
    """Height and width that images are resized to for it, in pixels: a multiple of its patch size."""
    weight: float = Field(0.01, gt=0)
    """Factor on the distance, which is added to the loss."""


class PerceptualConfig(Section):
    """Losses on features of the estimated x0 (after PixelGen: Ma et al. 2026, arXiv 2602.02493). Give at least one."""

    lpips: LPIPSConfig | None = None
    """LPIPS; None leaves it out."""
    dino: DINOConfig | None = None
    """Features of DINO; None leaves them out."""
    max_noise: float = Field(2.0, gt=0)
    """Largest noise level sigma / alpha at which they act. At higher ones x0 is the mean of many images, and features
    that are sharper than it cost variety."""

    @model_validator(mode="after")
    def _consistent(self) -> PerceptualConfig:
        config_rules.check_perceptual(self)
        return self


class ObjectiveConfig(Section):
    """What the U-Net predicts and how its error is weighted."""

    prediction: Literal["epsilon", "x0", "v", "edm", "flow"] = "v"
    """The network's output: the noise, the image, v = alpha noise - sigma image (Salimans and Ho 2022), the
    preconditioned residual of Karras et al. 2022, table 1, or with the schedule "flow" the velocity noise - image
    (Lipman et al. 2023)."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Loss function between the network's output and its target."""
    difference_weight: float = Field(0.0, ge=0)
    """Weight of the same loss on differences between neighbouring pixels of the error, horizontal plus vertical; it
    sharpens outlines (after the image gradient difference loss of Mathieu et al. 2016)."""
    perceptual: PerceptualConfig | None = None
    """Perceptual losses in addition; None has none."""
    weighting: Literal["none", "min_snr"] = "none"
    """Loss weight as a function of the noise level. "min_snr": Hang et al. 2023; "none": constant, except for the
    prediction "edm", which then has the weight of Karras et al. 2022."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Largest signal-to-noise ratio in the "min_snr" weight."""
    times: Literal["uniform", "edm", "logit_normal"] = "uniform"
    """Distribution of training times: "uniform" in t, log-normal noise levels ("edm": Karras et al. 2022), or a normal
    log(t / (1 - t)) ("logit_normal": Esser et al. 2024, section 3.1)."""
    edm_mean: float = -1.2
    """P_mean of the log-normal noise levels."""
    edm_std: float = Field(1.2, gt=0)
    """P_std of the log-normal noise levels."""
    logit_mean: float = 0.0
    """Mean of the logit-normal times; above 0 trains more on noisy images."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of the logit-normal times."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the images, for the scalings of the prediction "edm"."""
    variance: Literal["frozen", "hybrid"] = "frozen"
    """The predicted variance of a network that has one (unet.learned_variance): "frozen" gives it no gradient, "hybrid"
    adds the term of Nichol and Dhariwal 2021, eq. 16, to the loss."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Probability of dropping a caption in training, for classifier-free guidance (Imagen, section 2.2)."""

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        config_rules.check_objective(self)
        return self


class AugmentationConfig(Section):
    """Noise conditioning augmentation of the low-resolution image (Imagen, section 2.4)."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise schedule of the augmentation."""
    train_range: tuple[float, float] = (0.0, 1.0)
    """Range within [0, 1] from which training draws one augmentation level per sample, uniformly."""
    sample_level: float = Field(0.1, ge=0, le=1)
    """Augmentation level in sampling, within train_range."""
    resize: Literal["bicubic", "bilinear_corners"] = "bicubic"
    """How the low-resolution image is enlarged; "bilinear_corners" is bilinear, corner on corner (DeepFloyd IF)."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentationConfig:
        config_rules.check_augmentation(self)
        return self
