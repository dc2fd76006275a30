"""The cascade: a base stage and the super-resolution stages that enlarge its images (Imagen, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .config import CascadeConfig, SamplingConfig, StageConfig
from .config_file import validate
from .config_rules import check_sampling
from .diffusion.draws import Draws, draw
from .diffusion.guidance import Denoiser, NetworkCall
from .diffusion.inpainting import InitImage, default_strength, sample_from_image
from .diffusion.process import Diffusion
from .diffusion.samplers import SAMPLERS
from .diffusion.schedule import make_schedule, sampling_times
from .diffusion.tiling import in_tiles
from .diffusion.variance import hybrid_term
from .diffusion_config import AugmentationConfig
from .images import enlarge_by_corners, resize
from .networks.build import build_network
from .networks.conditioning import TextState
from .networks.network import Network
from .seeds import image_noise
from .sizes import ImageSize
from .text.embeddings import TextEmbeddings

Callback = Callable[[str, int, Tensor, Tensor], object]
"""callback(stage, step, x, x0) after every step of the sampler; sampling stops if it returns False."""


class StopSampling(Exception):
    """A callback returned False. x0 (B, C, H, W) is the estimate of the stage's images at that step."""

    def __init__(self, stage: str, step: int, x0: Tensor) -> None:
        super().__init__(f"stopped by the callback in stage {stage} after step {step + 1}")
        self.x0 = x0


class Stage:
    """Training loss and sampling of one stage, for a U-Net that the caller passes in. Has no trainable parameters.

    `below` is the stage whose images this one enlarges; None for a base stage, or for super-resolution on its own.
    `empty_text`: the embeddings (1, L, E) of the empty caption, which stand for dropped captions where the network has
    no null text. Such a network needs them in training and, without negative captions, for guidance.
    """

    def __init__(
        self, config: StageConfig, below: StageConfig | None = None, *, empty_text: TextEmbeddings | None = None
    ) -> None:
        self.config, self.empty_text = config, empty_text
        self.name = config.name
        self.diffusion = Diffusion(config.schedule, config.objective)
        self.lowres_size = below.size if below else config.lowres_size
        if config.augmentation:
            self.augmentation = make_schedule(config.augmentation.schedule)

    @property
    def _augmentation_config(self) -> AugmentationConfig:
        assert self.config.augmentation is not None  # StageConfig demands it of super-resolution stages
        return self.config.augmentation

    # ---- training

    def draw(self, seed: int, positions: Iterable[int], images: Tensor) -> Draws:
        """The random numbers that the loss of the samples at `positions` needs; see diffusion/draws.py."""
        return draw(seed, self.name, positions, images, lowres=self.config.unet.lowres)

    def training_loss(
        self,
        unet: nn.Module,
        images: Tensor,
        text: TextEmbeddings | None,
        draws: Draws,
        *,
        drop_captions: bool = True,
    ) -> Tensor:
        """Weighted loss per sample (B,) for images (B, C, H, W) in [-1, 1], without perceptual losses.

        `draws` decides times, noise, augmentation and caption dropout.
        """
        return self.losses(images, draws, *self.denoise(unet, images, text, draws, drop_captions=drop_captions))

    def denoise(
        self, unet: nn.Module, images: Tensor, text: TextEmbeddings | None, draws: Draws, *, drop_captions: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images x_t (B, C, H, W), their times (B,), and the network's output (B, C or 2 C, H, W) from them."""
        time = self.diffusion.training_times(draws.time)  # (B,)
        condition: dict[str, Any] = self.training_lowres(images, draws)
        if text is not None:
            dropout = self.config.objective.caption_dropout if drop_captions else 0.0
            condition |= self._with_dropped(text, draws.caption >= dropout)
        x_t = self.diffusion.add_noise(images, draws.noise, time)  # (B, C, H, W)
        output = unet(self.diffusion.network_input(x_t, time), self.diffusion.schedule.network_time(time), **condition)
        return x_t, time, output

    def losses(self, images: Tensor, draws: Draws, x_t: Tensor, time: Tensor, output: Tensor) -> Tensor:
        """The weighted loss (B,) of what `denoise` returns for images (B, C, H, W)."""
        prediction = output[:, : images.shape[1]]  # (B, C, H, W), without a variance behind it
        losses = self.diffusion.loss(prediction, self.diffusion.target(images, draws.noise, time), time)  # (B,)
        if self.config.objective.variance == "hybrid":
            losses = losses + self._variance_loss(images, x_t, output, time)
        return losses

    def _variance_loss(self, images: Tensor, x_t: Tensor, output: Tensor, time: Tensor) -> Tensor:
        """What the variance adds to the loss (B,); output (B, 2 C, H, W) of the network."""
        prediction, variance = output.chunk(2, dim=1)  # (B, C, H, W) each
        predicted = self.diffusion.x0(prediction.detach().float(), x_t, time)  # (B, C, H, W)
        timesteps = self.config.schedule.timesteps
        assert timesteps is not None  # StageConfig demands it
        return hybrid_term(self.diffusion.schedule, timesteps, images, predicted, variance, time)

    def _with_dropped(self, text: TextEmbeddings, keep: Tensor) -> dict[str, Any]:
        """The network's arguments for captions of which only those with keep (B,) bool are kept."""
        if self.config.unet.has_null_text:
            return {"text": text, "keep_text": keep}
        return {"text": text.where(keep, self._empty_text(text))}

    def null_text(self, text: TextEmbeddings) -> TextEmbeddings | None:
        """What stands for no caption beside text (B, L, E), for each of its rows; None where the network has null text.

        Raises ValueError if the embeddings of the empty caption are not given.
        """
        return None if self.config.unet.has_null_text else self._empty_text(text)[[0] * len(text)]

    def _empty_text(self, like: TextEmbeddings) -> TextEmbeddings:
        """The embeddings (1, L, E) of the empty caption, on the device and in the dtype of `like`."""
        if self.empty_text is None:
            raise ValueError(
                f'stage "{self.name}" was trained with the empty caption for dropped ones: give its embeddings, as '
                f"negative captions or as empty_text"
            )
        self.empty_text = self.empty_text.to(device=like.embeds.device, dtype=like.embeds.dtype)
        return self.empty_text

    def training_lowres(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The U-Net's low-resolution arguments for images (B, C, H, W); none for a base stage."""
        if not self.config.unet.lowres:
            return {}
        assert draws.lowres_noise is not None, "draws of another stage"
        low, high = self._augmentation_config.train_range
        level = low + (high - low) * draws.level  # (B,)
        return self.lowres_condition(self.shrink(images), level, draws.lowres_noise)

    def default_strength(self) -> float:
        """The strength of an init image without a mask, if it gives none, for the stage's own number of steps."""
        return default_strength(self.diffusion.schedule, self.config.sampling.steps)

    def noise_levels(self, draws: Draws) -> Tensor:
        """The noise levels (B,) in [0, 1] that `training_loss` makes of `draws`: sigma where alpha^2 + sigma^2 = 1."""
        alpha, sigma = self.diffusion.schedule.alpha_sigma(self.diffusion.training_times(draws.time))
        return sigma / torch.hypot(alpha, sigma)

    def shrink(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), or crops of them, at the resolution of the stage below: (B, C, h, w)."""
        assert self.lowres_size is not None, "a stage without a stage below has no low-resolution size"
        shown = ImageSize(*images.shape[-2:])
        return resize(images, shown.scaled(self.lowres_size, self.config.size))  # (B, C, h, w)

    def lowres_condition(self, lowres: Tensor, level: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The U-Net's low-resolution arguments: lowres (B, C, h, w), resized to noise (B, C, H, W) and noised.

        level in [0, 1] is the noise level of the augmentation (Imagen, section 2.4), (B,) or, on the CPU, () for all
        images. Training and sampling share this function; images are in [-1, 1] before noise is added.
        """
        time = self.augmentation.training_times(level.double())  # (B,) or ()
        alpha, sigma = self.augmentation.alpha_sigma(time)
        network_time = self.augmentation.network_time(time)
        enlarge = resize if self._augmentation_config.resize == "bicubic" else enlarge_by_corners
        lowres = enlarge(lowres, ImageSize(*noise.shape[-2:]))  # (B, C, H, W)
        if level.dim():
            alpha, sigma = (c.to(noise)[:, None, None, None] for c in (alpha, sigma))  # (B, 1, 1, 1)
            return {"lowres": alpha * lowres + sigma * noise, "lowres_time": network_time}
        # Numbers, because Apple GPUs have no float64, and a copy to a GPU would be a host synchronisation.
        return {
            "lowres": alpha.item() * lowres + sigma.item() * noise,
            "lowres_time": noise.new_full((len(noise),), network_time.item(), dtype=torch.float32),  # (B,)
        }

    # ---- sampling

    @torch.inference_mode()
    def sample(
        self,
        unet: Network,
        text: TextEmbeddings | None,
        seeds: list[int],
        *,
        size: ImageSize | None = None,
        lowres: Tensor | None = None,
        negative: TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        sampling: SamplingConfig | None = None,
        guide: Network | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], fp32. Image i is a function of caption i, seeds[i] and lowres[i].

        size: of the images; None is the stage's square. lowres (B, C, h, w) in [-1, 1] is the input of
        super-resolution. negative: captions in place of the null text in guidance. init_image: starts from an image.
        sampling: overrides the stage's own settings. guide: a worse network of this stage, with the same captions in
        place of the null text (autoguidance).
        """
        sampling = sampling or self.config.sampling
        device = next(unet.parameters()).device
        size = size or ImageSize.of(self.config.size)
        shape = (self.config.unet.channels, *size)
        condition: dict[str, Tensor] = {}
        if self.config.unet.lowres:
            assert lowres is not None, "a super-resolution stage needs lowres"
            chosen = sampling.augmentation_level
            sample_level = self._augmentation_config.sample_level if chosen is None else chosen
            level = torch.full((), sample_level, dtype=torch.float64, device="cpu")
            noise = image_noise(seeds, shape, stage=f"{self.name}/augmentation", step=0, device=device)  # (B, C, H, W)
            condition = self.lowres_condition(lowres.to(noise), level, noise)
        denoise = self._denoiser(unet, text, negative, condition, sampling, guide)

        def step_noise(step: int) -> Tensor:
            return image_noise(seeds, shape, stage=self.name, step=step, device=device)  # (B, C, H, W)

        def stage_callback(step: int, x: Tensor, x0: Tensor) -> None:
            if callback is not None and callback(self.name, step, x, x0) is False:
                raise StopSampling(self.name, step, x0)

        schedule, sample_fn = self.diffusion.schedule, SAMPLERS[sampling.sampler]
        times = sampling_times(self.config.schedule, sampling)  # (steps + 1,)
        if init_image is None:
            x = sample_fn(denoise, step_noise(-1), times, schedule=schedule, noise=step_noise, callback=stage_callback)
        else:
            x = sample_from_image(
                sample_fn,
                denoise,
                init_image.at(size, device),
                times,
                schedule=schedule,
                noise=step_noise,
                callback=stage_callback,
            )
        return x.clamp(-1, 1)

    def _denoiser(
        self,
        unet: Network,
        text: TextEmbeddings | None,
        negative: TextEmbeddings | None,
        condition: dict[str, Tensor],
        sampling: SamplingConfig,
        guide: Network | None,
    ) -> Denoiser:
        """The U-Net as a denoiser with guidance; captions are encoded once for all steps."""
        weight = None if text is None or sampling.guidance == 1.0 else sampling.guidance
        if text is None or weight is None:
            state = None if text is None else unet.encode_text(text)
            return Denoiser(self._network(unet, state, condition, sampling), self.diffusion, sampling)
        negative = self.null_text(text) if negative is None else negative
        conditional = None
        if guide is not None or sampling.guidance_range is not None:
            conditional = self._network(unet, unet.encode_text(text), condition, sampling)
        if guide is not None:
            assert conditional is not None
            network = _halves(conditional, self._network(guide, guide.encode_text(text), condition, sampling))
        else:
            doubled = {name: torch.cat([value, value]) for name, value in condition.items()}  # (2B, ...)
            network = self._network(unet, encode_halves(unet, text, negative), doubled, sampling)
        return Denoiser(network, self.diffusion, sampling, guidance=weight, conditional=conditional)

    def _network(
        self, unet: Network, state: TextState | None, condition: dict[str, Tensor], sampling: SamplingConfig
    ) -> NetworkCall:
        """network(x, time) with text and low-resolution image, on tiles if the settings say so."""
        tile = sampling.tile
        if tile is None:
            return partial(unet, text=state, **condition)
        maps = {name: value for name, value in condition.items() if name == "lowres"}  # cut into tiles like x
        others = {name: value for name, value in condition.items() if name != "lowres"}

        def network(x: Tensor, time: Tensor) -> Tensor:
            if tile >= max(x.shape[-2:]):
                return unet(x, time, text=state, **condition)

            def on_tile(x_tile: Tensor, **map_tiles: Tensor) -> Tensor:
                return unet(x_tile, time, text=state, **others, **map_tiles)

            return in_tiles(on_tile, tile, x, **maps)

        return network


def encode_halves(unet: Network, text: TextEmbeddings, negative: TextEmbeddings | None = None) -> TextState:
    """Text for guidance, (2B,): the captions (B,), then null text or the negative captions (B,)."""
    if negative is not None:
        return unet.encode_text(TextEmbeddings.cat([text, negative.to(device=text.embeds.device)]))
    rows = torch.arange(len(text), device=text.embeds.device).repeat(2)  # (2B,)
    return unet.encode_text(text[rows], torch.arange(len(rows), device=rows.device) < len(text))


def _halves(network: NetworkCall, guide: NetworkCall) -> NetworkCall:
    """Autoguidance (Karras et al. 2024): the output of a worse network with the same captions takes the place of that
    without captions."""

    def both(x: Tensor, time: Tensor) -> Tensor:
        (x1, x2), (time1, time2) = x.chunk(2), time.chunk(2)  # (B, C, H, W) and (B,) each
        return torch.cat([network(x1, time1), guide(x2, time2)])  # (2B, C, H, W)

    return both


class Cascade(nn.Module):
    """All stages with their U-Nets, `self.unets[name]`."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = [Stage(stage, config.below(stage.name)) for stage in config.stages]
        self.unets = nn.ModuleDict({stage.name: build_network(stage.unet) for stage in config.stages})

    @property
    def text_dim(self) -> int | None:
        """Width E of the text embeddings that the stages read; None for an unconditional cascade."""
        for stage in self.config.stages:
            if stage.unet.text_dim is not None:
                return stage.unet.text_dim
        return None

    def sample(
        self,
        text: TextEmbeddings | None,
        seeds: list[int],
        *,
        settings: Mapping[str, SamplingConfig],
        sizes: Mapping[str, ImageSize] = MappingProxyType({}),
        negative: TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        lowres: Tensor | None = None,
        start_at: str | None = None,
        stop_at: str | None = None,
        guide: Cascade | None = None,
        callback: Callback | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Run the stages from start_at to stop_at: images (B, C, H, W) of the last one, in [-1, 1].

        sizes: by stage, of one aspect ratio, where they are not its squares. lowres (B, C, h, w) in [-1, 1] of that
        aspect ratio is the input of a super-resolution stage that runs first. An init image without
        mask is the start of the first stage; with a mask, every stage keeps the known region. guide: its stages of the
        same names guide ours (autoguidance). With `device`, offloading is on: a U-Net is on that device only while its
        stage runs. Raises ValueError for arguments that do not fit.
        """
        images = lowres
        for index, stage in enumerate(self.running(start_at, stop_at, lowres)):
            reads_text = stage.config.unet.text_dim is not None
            starts_from_image = init_image is not None and (index == 0 or init_image.mask is not None)
            unet = self.unets[stage.name]
            assert isinstance(unet, Network)
            other = guide.unets[stage.name] if guide is not None and stage.name in guide.unets else None
            assert other is None or isinstance(other, Network)
            with ExitStack() as on_device:
                for network in (unet, other):
                    if device and network is not None:
                        on_device.enter_context(_on_device(network, device))
                images = stage.sample(
                    unet,
                    text if reads_text else None,
                    seeds,
                    size=sizes.get(stage.name),
                    lowres=images,
                    negative=negative if reads_text else None,
                    sampling=settings[stage.name],
                    init_image=init_image if starts_from_image else None,
                    guide=other,
                    callback=callback,
                )
        assert images is not None  # at least one stage ran
        return images

    def running(self, start_at: str | None, stop_at: str | None, lowres: Tensor | None) -> list[Stage]:
        """The stages from start_at to stop_at; None is the first and the last. Raises ValueError as `sample`."""
        names = [stage.name for stage in self.stages]
        for key, name in (("start_at", start_at), ("stop_at", stop_at)):
            if name is not None and name not in names:
                raise ValueError(f'{key} is the unknown stage "{name}"; the cascade has {", ".join(names)}')
        first, last = names.index(start_at or names[0]), names.index(stop_at or names[-1])
        if first > last:
            raise ValueError(f"start_at {start_at} comes after stop_at {stop_at}")
        enlarges = self.stages[first].config.unet.lowres
        if enlarges and lowres is None:
            raise ValueError(f"stage {names[first]} enlarges an image: give it with lowres (--lowres)")
        if lowres is not None and not enlarges:
            raise ValueError(
                f"stage {names[first]} starts from noise and takes no lowres: "
                f"set start_at (--start-at) to a later stage"
            )
        return self.stages[first : last + 1]

    def settings(self, **overrides: Any) -> dict[str, SamplingConfig]:
        """Sampling settings by stage, with overrides of single fields.

        An override is one value for all stages that have a use for it (`has_use_for`), a mapping from stage names to
        values, or None, which keeps the stage's own value. Raises ValueError for unknown stages, values out of range
        and values that contradict a stage.
        """
        names = [stage.name for stage in self.stages]
        by_stage: dict[str, dict[str, Any]] = {name: {} for name in names}
        for field, value in overrides.items():
            if not isinstance(value, Mapping):
                users = [stage.name for stage in self.stages if has_use_for(stage.config, field)]
                value = dict.fromkeys(users or names, value)  # if nothing uses it, the checks below say why
            for name, own in value.items():
                if name not in by_stage:
                    raise ValueError(f"{field} is given for unknown stage {name}; the cascade has {', '.join(names)}")
                if own is not None:
                    by_stage[name][field] = own
        settings = {}
        for stage in self.stages:
            values = stage.config.sampling.model_dump() | by_stage[stage.name]
            settings[stage.name] = validate(SamplingConfig, values, f"sampling of {stage.name}")
            check_sampling(stage.config, settings[stage.name])
        return settings


def has_use_for(stage: StageConfig, field: str) -> bool:
    """Whether a stage takes a sampling setting: one value for all stages is meant for those that do."""
    if field in ("guidance", "guidance_range"):
        return stage.unet.text_dim is not None
    if field == "augmentation_level":
        return stage.augmentation is not None
    return True


@contextmanager
def _on_device(unet: Network, device: torch.device) -> Iterator[None]:
    """Move the U-Net to `device`, and back at the end."""
    original_device = next(unet.parameters()).device
    unet.to(device)
    try:
        yield
    finally:
        unet.to(original_device)
