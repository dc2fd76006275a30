"""The cascade: stages in order, each enlarging what the one before it drew (Imagen, sections 2.3 and 2.4).

Letters: B batch, C channels, S side of the stage's images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import CascadeConfig, SamplingConfig, StageConfig
from .config_file import validate
from .diffusion.guidance import Denoiser
from .diffusion.inpainting import InitImage, sample_from_image
from .diffusion.process import Diffusion
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import make_schedule
from .diffusion.tiling import in_tiles
from .images import resize
from .networks.unet import UNet
from .seeds import image_noise
from .text.embeddings import TextEmbeddings

Callback = Callable[[str, int, Tensor, Tensor], None]


class Stage:
    """What one stage does with its U-Net: training loss and sampling. Holds no weights.

    `below` is the stage whose images this one enlarges, None for a base stage or a free-standing enlarger.
    """

    def __init__(self, config: StageConfig, below: StageConfig | None = None) -> None:
        self.config = config
        self.name = config.name
        self.diffusion = Diffusion(config.schedule, config.objective)
        self.lowres_size = below.size if below else None
        if config.augmentation:
            self.augmentation = make_schedule(config.augmentation.schedule)

    # ---- training

    def training_loss(
        self,
        unet: nn.Module,
        images: Tensor,
        text: TextEmbeddings | None,
        generator: torch.Generator,
        *,
        drop_captions: bool = True,
    ) -> Tensor:
        """Weighted loss per sample (B,) for images (B, C, S, S) in [-1, 1].

        Times, noise, augmentation and caption dropout all come from `generator`, which lives on the images' device.
        """
        batch = len(images)
        time = self.diffusion.training_times(batch, generator)  # (B,)
        noise = _randn_like(images, generator)
        condition: dict[str, Any] = {}
        if self.config.unet.lowres:
            low, high = self.config.augmentation.train_range
            level = low + (high - low) * torch.rand(batch, generator=generator, device=generator.device)
            condition = self.lowres_condition(self.shrink(images), level, _randn_like(images, generator))
        if text is not None:
            kept = torch.rand(batch, generator=generator, device=generator.device)
            dropout = self.config.objective.caption_dropout if drop_captions else 0.0
            condition |= {"text": text, "keep_text": kept >= dropout}
        x_t = self.diffusion.add_noise(images, noise, time)
        output = unet(self.diffusion.network_input(x_t, time), self.diffusion.schedule.network_time(time), **condition)
        return self.diffusion.loss(output, self.diffusion.target(images, noise, time), time)

    def shrink(self, images: Tensor) -> Tensor:
        """The low-resolution version of images (B, C, S, S), or of crops of them, that the stage below would draw."""
        side = images.shape[-1] * self.lowres_size // self.config.size
        return resize(images, side)  # (B, C, side, side)

    def lowres_condition(self, lowres: Tensor, level: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Resize lowres to noise's size, then noise it at `level` (B,) in [0, 1]: the U-Net's low-res arguments.

        The one path for training and sampling: images are in [-1, 1] before the noise comes (Imagen, section 2.4).
        """
        time = self.augmentation.training_times(level.double())
        alpha, sigma = (c.to(noise)[:, None, None, None] for c in self.augmentation.alpha_sigma(time))
        lowres = resize(lowres, noise.shape[-1])  # (B, C, S, S)
        return {"lowres": alpha * lowres + sigma * noise, "lowres_time": self.augmentation.network_time(time)}

    # ---- sampling

    def check_tile(self, tile: int | None) -> None:
        """Raise ValueError if this stage cannot be drawn in tiles of that side."""
        unet = self.config.unet
        if tile is None or tile >= self.config.size:
            return
        if tile % unet.stride:
            raise ValueError(
                f"tile {tile} of stage {self.name} must be a multiple of {unet.stride}, its U-Net's stride"
            )
        if unet.positional_encoding:
            raise ValueError(f"stage {self.name} knows every pixel's place: it cannot be drawn in tiles")

    @torch.inference_mode()
    def sample(
        self,
        unet: UNet,
        text: TextEmbeddings | None,
        seeds: list[int],
        *,
        lowres: Tensor | None = None,
        negative: TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        sampling: SamplingConfig | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images (B, C, S, S) in [-1, 1], fp32, image i a function of (caption i, seeds[i], lowres[i]).

        lowres (B, C, s, s) in [-1, 1] for super-resolution; negative captions that guidance leads away from, in place
        of none; `init_image` to start from an image; `sampling` overrides the stage's own settings.
        """
        sampling = sampling or self.config.sampling
        device = next(unet.parameters()).device
        shape = (self.config.unet.channels, self.config.size, self.config.size)
        condition: dict[str, Tensor] = {}
        if self.config.unet.lowres:
            level = torch.full((len(seeds),), self.config.augmentation.sample_level, dtype=torch.float64, device=device)
            noise = image_noise(seeds, shape, stage=f"{self.name}/augmentation", step=0, device=device)
            condition = self.lowres_condition(lowres.to(noise), level, noise)
        denoise = self._denoiser(unet, text, negative, condition, sampling)

        def step_noise(step: int) -> Tensor:
            return image_noise(seeds, shape, stage=self.name, step=step, device=device)

        schedule, walk = self.diffusion.schedule, SAMPLERS[sampling.sampler]
        times = schedule.grid(sampling.steps)
        shown = callback and (lambda step, x, x0: callback(self.name, step, x, x0))
        if init_image is None:
            x = walk(denoise, step_noise(-1), times, schedule=schedule, noise=step_noise, callback=shown)
        else:
            x = sample_from_image(
                walk,
                denoise,
                init_image.at(self.config.size, device),
                times,
                schedule=schedule,
                noise=step_noise,
                callback=shown,
            )
        return x.clamp(-1, 1)

    def _denoiser(
        self,
        unet: UNet,
        text: TextEmbeddings | None,
        negative: TextEmbeddings | None,
        condition: dict[str, Tensor],
        sampling: SamplingConfig,
    ) -> Denoiser:
        """The U-Net as a denoiser: captions, encoded once for all steps, low-res image and guidance built in."""
        weight = None if text is None or sampling.guidance == 1.0 else sampling.guidance
        if text is None:
            state = None
        elif weight is None:
            state = unet.encode_text(text)
        elif negative is None:
            rows = torch.arange(len(text), device=text.embeds.device).repeat(2)  # (2B,)
            state = unet.encode_text(text[rows], torch.arange(len(rows), device=rows.device) < len(text))
        else:
            state = unet.encode_text(TextEmbeddings.cat([text, negative.to(device=text.embeds.device)]))
        if weight is not None:
            condition = {name: torch.cat([value, value]) for name, value in condition.items()}
        if sampling.tile is None or sampling.tile >= self.config.size:
            return Denoiser(partial(unet, text=state, **condition), self.diffusion, sampling, guidance=weight)
        maps = {name: condition.pop(name) for name in ("lowres",) if name in condition}

        def network(x: Tensor, time: Tensor) -> Tensor:
            return in_tiles(lambda x, **cut: unet(x, time, text=state, **condition, **cut), sampling.tile, x, **maps)

        return Denoiser(network, self.diffusion, sampling, guidance=weight)


class Cascade(nn.Module):
    """All stages with their U-Nets, `self.unets[name]`."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = [Stage(stage, config.below(stage.name)) for stage in config.stages]
        self.unets = nn.ModuleDict({stage.name: UNet(stage.unet) for stage in config.stages})

    @property
    def text_dim(self) -> int | None:
        """Width of the text embeddings that the stages read; None for an unconditional cascade."""
        return next((stage.unet.text_dim for stage in self.config.stages if stage.unet.text_dim), None)

    def sample(
        self,
        text: TextEmbeddings | None,
        seeds: list[int],
        *,
        settings: Mapping[str, SamplingConfig],
        negative: TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        lowres: Tensor | None = None,
        start_at: str | None = None,
        stop_at: str | None = None,
        callback: Callback | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Run the stages from start_at to stop_at: images (B, C, S, S) of the last of them, in [-1, 1].

        lowres (B, C, s, s) in [-1, 1] is what a super-resolution stage enlarges when it comes first. A given image
        without mask is where the first stage starts; with a mask, all stages keep its pixels. With a device, every
        U-Net is there only while its stage runs. Raises ValueError for what does not fit.
        """
        images = lowres
        for index, stage in enumerate(self.running(start_at, stop_at, lowres)):
            reads = stage.config.unet.text_dim is not None
            unet = self.unets[stage.name]
            with _visiting(unet, device) if device else nullcontext():
                images = stage.sample(
                    unet,
                    text if reads else None,
                    seeds,
                    lowres=images,
                    negative=negative if reads else None,
                    sampling=settings[stage.name],
                    init_image=init_image if init_image and (index == 0 or init_image.mask is not None) else None,
                    callback=callback,
                )
        return images

    def running(self, start_at: str | None, stop_at: str | None, lowres: Tensor | None) -> list[Stage]:
        """The stages from start_at to stop_at, None being the first and the last. Raises ValueError as `sample`."""
        names = [stage.name for stage in self.stages]
        for key, name in (("start_at", start_at), ("stop_at", stop_at)):
            if name is not None and name not in names:
                raise ValueError(f'{key} is the unknown stage "{name}"; the cascade has {", ".join(names)}')
        first, last = names.index(start_at or names[0]), names.index(stop_at or names[-1])
        if first > last:
            raise ValueError(f"start_at {start_at} comes after stop_at {stop_at}")
        enlarges = self.stages[first].config.unet.lowres
        if enlarges and lowres is None:
            raise ValueError(f"stage {names[first]} enlarges an image: give lowres")
        if lowres is not None and not enlarges:
            raise ValueError(f"stage {names[first]} starts from noise, not from lowres: say which stage to start_at")
        return self.stages[first : last + 1]

    def settings(self, **overrides: Any) -> dict[str, SamplingConfig]:
        """Sampling settings by stage: the configured ones with overrides, each None (keep), one value for all stages,
        or a mapping from stage name to value. Raises ValueError for unknown stages and values out of range."""
        names = [stage.name for stage in self.stages]
        for field, value in overrides.items():
            if isinstance(value, Mapping) and (unknown := sorted(set(value) - set(names))):
                raise ValueError(f"{field} is given for unknown stage {unknown[0]}; the cascade has {', '.join(names)}")
        settings = {}
        for stage in self.stages:
            chosen = {
                field: value.get(stage.name) if isinstance(value, Mapping) else value
                for field, value in overrides.items()
            }
            merged = stage.config.sampling.model_dump() | {k: v for k, v in chosen.items() if v is not None}
            settings[stage.name] = validate(SamplingConfig, merged, f"sampling of {stage.name}")
            stage.diffusion.schedule.grid(settings[stage.name].steps)  # refuses more steps than the schedule has
            stage.check_tile(settings[stage.name].tile)
        return settings


@contextmanager
def _visiting(unet: UNet, device: torch.device) -> Iterator[None]:
    """The U-Net on `device`, and afterwards where it was."""
    home = next(unet.parameters()).device
    unet.to(device)
    try:
        yield
    finally:
        unet.to(home)


def _randn_like(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
