"""Perceptual losses: the estimate of x0 and the image, compared in the features of frozen networks.

Both networks come from local files; nothing is downloaded. They are no part of the model: they stay on every process,
outside of its engine, and no checkpoint or export has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ..cascade import Stage
from ..config import StageConfig
from ..diffusion.draws import Draws
from ..diffusion_config import DINOConfig, LPIPSConfig, PerceptualConfig
from ..extras import import_extra
from ..files import first_line, read_json_object, read_pth, read_safetensors
from ..sampling.model_directory import load_weights
from ..text.embeddings import TextEmbeddings
from ..text.t5 import bars_in_terminals_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VGG_SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions between its poolings (Simonyan and Zisserman 2015, configuration D)."""
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of ImageNet in [-1, 1], as in LPIPS."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet in [0, 1], as DINO was trained."""
NEEDED = {"user": "objective.perceptual.dino", "extra": "text"}
DINO_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def standardized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std by channel, fp32; grey images (B, 1, H, W) become (B, 3, H, W)."""
    channels = images.float().expand(-1, 3, -1, -1).unbind(dim=1)  # 3 x (B, H, W)
    return torch.stack([(c - m) / s for c, m, s in zip(channels, mean, std, strict=True)], dim=1)  # (B, 3, H, W)


# ---- LPIPS


class VGG16(nn.Module):
    """Images (B, 3, H, W), standardized, to features after each slice's last ReLU: (B, C, H / 2^i, W / 2^i)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, widths in enumerate(VGG_SLICES):
            if index:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class LPIPSLinear(nn.ModuleDict):
    """The weights (1, C, 1, 1) of the channels of each slice, under the names that they have in LPIPS's file."""

    def __init__(self) -> None:
        super().__init__({f"lin{i}": self._layer(widths[-1]) for i, widths in enumerate(VGG_SLICES)})

    @staticmethod
    def _layer(channels: int) -> nn.Module:
        return nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))})


class LPIPS(nn.Module):
    """The distance (B,) between images (B, C, H, W) in [-1, 1] of Zhang et al. 2018, eq. 1, with VGG16."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg, self.linear = VGG16(), LPIPSLinear()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        with torch.no_grad():
            targets = self.vgg(standardized(y, LPIPS_MEAN, LPIPS_STD).to(dtype))
        features = self.vgg(standardized(x, LPIPS_MEAN, LPIPS_STD).to(dtype))
        total = x.new_zeros(len(x), dtype=torch.float32)  # (B,)
        for weight, feature, target in zip(self.linear.parameters(), features, targets):
            difference = F.normalize(feature.float(), dim=1) - F.normalize(target.float(), dim=1)  # (B, C, H', W')
            total = total + torch.einsum("bchw,c->bhw", difference.square(), weight.float().flatten()).mean((1, 2))
        return total


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name. Raises ValueError that names the file."""
    return read_safetensors(path) if Path(path).suffix == ".safetensors" else read_pth(path)


def load_lpips(config: LPIPSConfig) -> LPIPS:
    """LPIPS from its two files. Raises ValueError that names the key, the file, and the weights that do not fit."""
    with torch.device("meta"):
        lpips = LPIPS()
    try:
        vgg = {name: w for name, w in read_weights(config.vgg).items() if not name.startswith("classifier.")}
        load_weights(lpips.vgg, vgg, config.vgg, assign=True)
    except ValueError as error:
        raise ValueError(f"objective.perceptual.lpips.vgg: {error}") from None
    try:
        load_weights(lpips.linear, read_weights(config.linear), config.linear, assign=True)
    except ValueError as error:
        raise ValueError(f"objective.perceptual.lpips.linear: {error}") from None
    return lpips


# ---- DINO


class DINO(nn.Module):
    """The mean over patches of 1 - cosine between their tokens, (B,), for images (B, C, H, H) in [-1, 1]."""

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.num_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        """Tokens before those of the patches: of the class, and registers."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._tokens(y)  # (B, N, C)
        return 1 - F.cosine_similarity(self._tokens(x), target, dim=-1).mean(dim=1)  # (B,)

    def _tokens(self, images: Tensor) -> Tensor:
        """The tokens (B, N, C) of the patches of images (B, C, H, H), fp32."""
        images = standardized((resized(images.float(), self.size) + 1) / 2, IMAGENET_MEAN, IMAGENET_STD)
        output = self.model(pixel_values=images.to(next(self.parameters()).dtype))
        return output.last_hidden_state[:, self.num_prefix :].float()


def resized(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, H) as (B, C, size, size), bicubic with antialiasing.

    As two products of matrices: the backward pass of F.interpolate adds in an order that changes from run to run.
    """
    side = images.shape[-1]
    if side == size:
        return images
    pixels = torch.eye(side, device=images.device)[None, None]  # (1, 1, H, H)
    rows = F.interpolate(pixels, (size, side), mode="bicubic", antialias=True)[0, 0]  # (size, H)
    return rows @ images @ rows.T  # (B, C, size, size)


def new_dino(config: DINOConfig) -> DINO:
    """A transformer as the folder's config.json describes it, with new weights, on PyTorch's default device.

    Raises ValueError that names the key, if the folder has none or the images' size does not fit it.
    """
    settings = _dino_settings(config)
    return DINO(import_extra("transformers", **NEEDED).AutoModel.from_config(settings), config.size)


def load_dino(config: DINOConfig) -> DINO:
    """The transformer of a folder. Raises ValueError that names the key, and the weights that do not fit."""
    _dino_settings(config)
    transformers = import_extra("transformers", **NEEDED)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # instead of its table of weights that do not fit, the line below
    try:
        with bars_in_terminals_only():
            model, info = transformers.AutoModel.from_pretrained(
                config.model,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"objective.perceptual.dino.model: {config.model}: {first_line(error)}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"{key} has shape {tuple(found)}, expected {tuple(own)}" for key, found, own in info["mismatched_keys"]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"objective.perceptual.dino.model: {config.model}: weights and config.json do not match: "
            f"{'; '.join(problems[:3])}{more}"
        )
    return DINO(model, config.size)


def _dino_settings(config: DINOConfig) -> PretrainedConfig:
    """The folder's config.json, checked."""
    transformers = import_extra("transformers", **NEEDED)
    try:
        kind = read_json_object(Path(config.model) / "config.json").get("model_type")
        if kind not in DINO_KINDS:
            raise ValueError(f'the model_type is "{kind}", and must be one of {", ".join(DINO_KINDS)}')
        settings = transformers.AutoConfig.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"objective.perceptual.dino.model: {config.model}: {first_line(error)}") from None
    if config.size % settings.patch_size:
        raise ValueError(
            f"objective.perceptual.dino.size {config.size} must be a multiple of {settings.patch_size}, the patch size "
            f"of {config.model}"
        )
    return settings


# ---- the objective


def check_perceptual(config: PerceptualConfig) -> None:
    """Raise ValueError, in one line that names the key, for files that do not fit."""
    if config.lpips is not None:
        load_lpips(config.lpips)
    if config.dino is not None:
        load_dino(config.dino)


def describe_perceptual(stage: StageConfig) -> str:
    """What the perceptual losses of a stage cost beside training, in one line."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # these two read files when they are imported
    from torch.utils.flop_counter import FlopCounterMode

    perceptual, side = stage.objective.perceptual, stage.crop or stage.size
    assert perceptual is not None
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        distances: dict[str, nn.Module] = {} if perceptual.lpips is None else {"LPIPS": LPIPS()}
        if perceptual.dino is not None:
            distances["DINO"] = new_dino(perceptual.dino)
        images = torch.empty(1, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            for distance in distances.values():
                distance.requires_grad_(False)
                distance(images.requires_grad_(), images.detach()).sum().backward()
    parameters = sum(parameter.numel() for distance in distances.values() for parameter in distance.parameters())
    return (
        f"perceptual losses of {' and '.join(distances)} act up to noise level {perceptual.max_noise:g}; their frozen "
        f"networks add {parameters / 1e6:.2f} M parameters in memory and {counter.get_total_flops() / 1e12:.4g} TFLOP "
        f"per image to a training step: estimates leave both out"
    )


@dataclass(frozen=True)
class PerceptualObjective:
    """The objective of a stage with perceptual losses.

    distances: by name, the factor and the distance (B,) between two batches of images. max_noise: at a higher noise
    level sigma / alpha they are zero.
    """

    stage: Stage
    distances: Sequence[tuple[float, Callable[[Tensor, Tensor], Tensor]]]
    max_noise: float

    def training_loss(
        self,
        unet: nn.Module,
        images: Tensor,
        text: TextEmbeddings | None,
        draws: Draws,
        *,
        drop_captions: bool = True,
    ) -> Tensor:
        """The stage's loss per sample (B,), plus the perceptual losses of its estimate of x0."""
        diffusion = self.stage.diffusion
        x_t, time, output = self.stage.denoise(unet, images, text, draws, drop_captions=drop_captions)
        losses = self.stage.losses(images, draws, x_t, time, output)  # (B,)
        alpha, sigma = diffusion.schedule.alpha_sigma(time)
        acts = sigma <= self.max_noise * alpha  # (B,)
        # Elsewhere the image takes the place of its estimate, so that no gradient, not even NaN, comes back.
        estimate = diffusion.x0(output[:, : images.shape[1]], x_t, time)  # (B, C, H, W)
        estimate = torch.where(acts[:, None, None, None], estimate, images)  # (B, C, H, W)
        for factor, distance in self.distances:
            losses = losses + torch.where(acts, factor * distance(estimate, images), 0.0)
        return losses

    def noise_levels(self, draws: Draws) -> Tensor:
        """The noise levels sigma (B,) of the noisy images."""
        return self.stage.noise_levels(draws)


def perceptual_objective(stage: Stage, device: torch.device, dtype: torch.dtype) -> PerceptualObjective:
    """The objective of a stage whose configuration has perceptual losses. Loads their networks in `dtype`."""
    config = stage.config.objective.perceptual
    assert config is not None
    networks: list[tuple[float, nn.Module]] = []
    if config.lpips is not None:
        networks.append((config.lpips.weight, load_lpips(config.lpips)))
    if config.dino is not None:
        networks.append((config.dino.weight, load_dino(config.dino)))
    distances = [(factor, network.to(device, dtype).eval().requires_grad_(False)) for factor, network in networks]
    return PerceptualObjective(stage, distances, config.max_noise)
