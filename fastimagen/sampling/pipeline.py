"""Sampling from a model directory: captions or text embeddings in, images out.

Needs the core dependencies only; encoding captions needs transformers as well (the ``text`` extra).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..cascade import Callback, Cascade, StopSampling
from ..config import CompileMode, SamplingConfig
from ..diffusion.inpainting import InitImage
from ..files import first_line
from ..images import resize, with_channels
from ..sizes import ImageSize
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5Encoder
from .hub import locate_model, push_model
from .image_sizes import choose_sizes, size_warnings
from .load import Lora, check_guide, load_cascade, scales_of
from .model_directory import read_sizes, write_model
from .output import Output
from .request import SamplingRequest
from .settings import Offload, require_known

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights and activations."""


class ImagenPipeline:
    """A trained cascade, ready to sample.

    `pipe = ImagenPipeline.from_pretrained(path, device="cuda", dtype=torch.bfloat16)`

    text_encoder: entry of model_index.json. source: what samples.json calls the model. folder: its model directory,
    which holds the text encoder if that is included. guide: a worse model, with its source, that guides the stages of
    the same names (autoguidance). lora: the adapters that the weights of the cascade contain, by path, with their
    scales. sizes: of the images that each stage was trained on, where these are not its squares; the first one is
    sampled if none is given.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        text_encoder: dict[str, Any] | None,
        source: str = "",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        compile: CompileMode | None = None,
        offload: Offload = "auto",
        guide: tuple[Cascade, str] | None = None,
        lora: Mapping[str, float] | None = None,
        sizes: Mapping[str, Sequence[ImageSize]] | None = None,
    ) -> None:
        _require_one_of("compile", compile, (None, *get_args(CompileMode)))
        _require_one_of("offload", offload, get_args(Offload))
        self.device = _available_device(device)
        self.cascade = cascade.to(dtype=_floating_dtype(dtype)).eval().requires_grad_(False)
        self.guide: Cascade | None = None
        self.guide_source: str | None = None
        if guide is not None:
            self.guide, self.guide_source = guide
            check_guide(cascade.config, self.guide.config, self.guide_source)
            self.guide.to(dtype=_floating_dtype(dtype)).eval().requires_grad_(False)
        self.offload = offload == "always" or (offload == "auto" and self._fills_the_gpu())
        if not self.offload:
            for part in self._cascades():
                part.to(self.device)
        self.compiled = compile is not None
        if self.compiled:
            logger.info("torch.compile compiles each U-Net at its first step, which takes minutes")
            for part in self._cascades():
                for unet in part.unets.values():
                    unet.compile(mode=compile)
        self.text_encoder, self.source, self.folder = text_encoder, source, folder
        self.lora = dict(lora or {})
        self.sizes: dict[str, Sequence[ImageSize]]
        self.sizes = {stage.name: [ImageSize.of(stage.size)] for stage in self.cascade.config.stages} | dict(
            sizes or {}
        )
        self._encoder: T5Encoder | None = None

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.name} {stage.size}x{stage.size}" for stage in self.cascade.config.stages)
        return f"ImagenPipeline({self.source!r}, {stages}, device={str(self.device)!r})"

    def _cascades(self) -> list[Cascade]:
        return [self.cascade] if self.guide is None else [self.cascade, self.guide]

    def _fills_the_gpu(self) -> bool:
        """Whether the weights need more than half of the GPU's free memory."""
        if self.device.type != "cuda":
            return False
        weights = sum(p.numel() * p.element_size() for part in self._cascades() for p in part.parameters())
        free, _ = torch.cuda.mem_get_info(self.device)
        if weights <= free / 2:
            return False
        logger.warning(
            f"the weights need {weights / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free on {self.device}: "
            f'each stage is on the GPU only while it runs (offload="never" keeps all of them there)'
        )
        return True

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        compile: CompileMode | None = None,
        offload: Offload = "auto",
        guide: str | Path | None = None,
        lora: Lora | None = None,
    ) -> ImagenPipeline:
        """Load a model directory, or OWNER/NAME from the Hugging Face hub at a branch, tag or commit `revision`.

        device, dtype: by name or as torch's objects; dtype is float32, bfloat16 or float16.
        compile: mode of torch.compile for the U-Nets; "reduce-overhead" adds CUDA graphs, None does not compile.
        offload: "always" keeps the weights on the CPU and moves a stage to `device` only while it runs, "never" keeps
        all stages on `device`, "auto" offloads if the weights need more than half of the GPU's free memory.
        guide: another model, smaller or trained for less long, whose estimate with the same captions takes the place of
        that without captions in guidance (autoguidance, Karras et al. 2024).
        lora: adapters that are added to the weights in memory, not to those of the guide: a file or folder (as
        `fastimagen export --adapters` and diffusers write them), or several with a scale each, {path: scale}.
        Raises ValueError with one line if the folder is not a model directory or is damaged, if the hub has no such
        model, if adapters do not fit the model, or if the device is not available; ImportError for a model from the hub
        without huggingface_hub.
        """
        folder, source = locate_model(path, revision)
        scales = scales_of(lora)
        cascade, index = load_cascade(folder, scales)
        guiding = None
        if guide is not None:
            guide_folder, guide_source = locate_model(guide, None)
            guiding = load_cascade(guide_folder)[0], guide_source
        return cls(
            cascade,
            text_encoder=index.get("text_encoder"),
            source=source,
            folder=folder,
            device=device,
            dtype=dtype,
            compile=compile,
            offload=offload,
            guide=guiding,
            lora=scales,
            sizes=read_sizes(index),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ImagenPipeline:
        """Move the model to another device or dtype, by name or as torch's objects, and return it.

        With offloading the weights stay on the CPU, and stages run on `device`. Raises ValueError if it is not
        available.
        """
        if dtype is not None:
            for part in self._cascades():
                part.to(dtype=_floating_dtype(dtype))
        if device is not None:
            self.device = _available_device(device)
            self._encoder = None  # loaded again on the new device
            if not self.offload:
                for part in self._cascades():
                    part.to(self.device)
        return self

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embed captions with the model's own text encoder, which is loaded at the first call."""
        return self._load_encoder().encode(captions)

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """What the text encoder truncates or cannot represent of captions, a line each."""
        return self._load_encoder().caption_warnings(captions)

    @property
    def encoder_folder(self) -> Path | None:
        """The text encoder inside the model directory; None if it is named by the hub's name, or if there is none."""
        if self.text_encoder is None or not self.text_encoder.get("included"):
            return None
        return (self.folder or Path()) / self.text_encoder["name"]

    def _load_encoder(self) -> T5Encoder:
        if self._encoder is not None:
            return self._encoder
        if self.text_encoder is None:
            raise ValueError(
                "this model names no text encoder: give embeddings, with text=TextEmbeddings.load(FILE) or --embeddings"
            )
        name = self.text_encoder["name"]
        if (included := self.encoder_folder) is not None:
            name = str(included)
            if not included.is_dir():
                raise ValueError(f"{self.source} is damaged: its text encoder {included} is missing")
        try:
            self._encoder = T5Encoder(
                name,
                revision=self.text_encoder.get("revision"),
                max_length=self.text_encoder["max_length"],
                encoding=self.text_encoder.get("encoding", "words"),
                device=self.device,
            )
        except SafetensorError as error:
            raise ValueError(f"cannot read the weights of text encoder {name}: {error}") from None
        return self._encoder

    def __call__(
        self,
        captions: str | Sequence[str] | None = None,
        *,
        text: TextEmbeddings | None = None,
        count: int = 1,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        size: str | None = None,
        negative: str | Sequence[str] | TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        lowres: Tensor | None = None,
        start_at: str | None = None,
        stop_at: str | None = None,
        batch_size: int = 32,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Output:
        """Sample `count` images of each caption or row of `text`: `pipe("a red circle", count=4, guidance={"sr": 1})`.

        seed: of the first image, by default 0; the next ones count up. seeds: one for each image instead. An image
        depends on its caption and seed, not on its batch. A cascade without text samples `count` images.
        settings: fields of SamplingConfig (steps, sampler, guidance, ...), each with one value for all stages or a
        mapping by stage name; what is not given keeps the model's value. The other arguments: see SamplingRequest.
        """
        require_known(settings, ("captions", *(self.__call__.__kwdefaults__ or ())))
        request = SamplingRequest.of(
            captions,
            text=text,
            count=count,
            seed=seed,
            seeds=seeds,
            size=size,
            negative=negative,
            init_image=init_image,
            lowres=lowres,
            start_at=start_at,
            stop_at=stop_at,
            settings=settings,
        )
        return self.sample(request, batch_size=batch_size, callback=callback)

    def sample(self, request: SamplingRequest, *, batch_size: int = 32, callback: Callback | None = None) -> Output:
        """Sample what is requested, `batch_size` images at a time.

        callback(stage, step, x, x0) is called after every step; x0 (B, C, H, W) is the current estimate of the stage's
        images. If it returns False, sampling stops: the output has the images of finished batches, the current
        estimates of the batch at work, in the final size, and a warning. Raises ValueError if the request does not fit
        the model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        settings = self._settings(request)
        sizes = choose_sizes(self.cascade, self.sizes, request)
        self._encode_empty(request, settings)
        encoded, warnings = self._encode_request(request)  # last: loading the text encoder may take minutes
        encoded, converted = self._with_channels(encoded)
        warnings += converted
        for warning in size_warnings(self.cascade, self.sizes, request):
            logger.warning(warning)
            warnings.append(warning)
        images: list[Tensor] = []
        for batch in encoded.batches(batch_size):
            lowres = _for_each_image(batch.lowres, len(batch))  # (b, C, h, w)
            try:
                sampled = self.cascade.sample(
                    None if batch.text is None else batch.text.to(device=self.device),
                    list(batch.seeds),
                    settings=settings,
                    sizes=sizes,
                    negative=_for_each_image(batch.negative, len(batch)),
                    init_image=_for_each_image(batch.init_image, len(batch)),
                    lowres=None if lowres is None else lowres.to(self.device),
                    start_at=batch.start_at,
                    stop_at=batch.stop_at,
                    guide=self.guide,
                    callback=callback,
                    device=self.device if self.offload else None,
                )
            except StopSampling as stop:
                last = list(sizes.values())[-1]
                images.append(resize(stop.x0.float().clamp(-1, 1), last).cpu())  # (b, C, H, W)
                total, request = len(request), request[: sum(map(len, images))]
                warnings.append(f"{stop}: {len(request)} of {total} images, the last {len(batch)} are unfinished")
                break
            images.append(sampled.cpu())  # (b, C, H, W)
        return Output(torch.cat(images), request.labels, list(request.seeds), self.record(request), warnings)

    def record(self, request: SamplingRequest) -> dict[str, Any]:
        """The content of samples.json for a request."""
        settings = self._settings(request)
        running = self.cascade.running(request.start_at, request.stop_at, request.lowres)
        stages = {stage.name: settings[stage.name] for stage in running}
        size = str(choose_sizes(self.cascade, self.sizes, request)[running[-1].name])
        return request.record(model=self.source, guide=self.guide_source, lora=self.lora, stages=stages, size=size)

    def _settings(self, request: SamplingRequest) -> dict[str, SamplingConfig]:
        """Sampling settings of every stage. Raises ValueError if the request does not fit the model."""
        if self.cascade.text_dim is not None and request.captions is None and request.text is None:
            raise ValueError("this model is conditioned on text: give captions or text embeddings")
        settings = self.cascade.settings(**request.settings)
        running = self.cascade.running(request.start_at, request.stop_at, request.lowres)
        if request.negative is not None and all(settings[stage.name].guidance == 1.0 for stage in running):
            raise ValueError("negative captions need classifier-free guidance, but guidance is 1: raise it")
        if request.negative is not None and self.guide is not None:
            raise ValueError("negative captions and a guide both take the place of the empty caption: give one of them")
        return settings

    def _encode_request(self, request: SamplingRequest) -> tuple[SamplingRequest, list[str]]:
        """The request with embeddings in place of captions, and the text encoder's warnings about them."""
        captions: list[str] = []
        if request.negative is not None and not isinstance(request.negative, TextEmbeddings):
            captions += request.negative
            request = replace(request, negative=self.encode(request.negative))
        if self.cascade.text_dim is not None and request.text is None:
            captions += request.labels
            request = replace(request, text=self.encode(request.labels))
        warnings = self.caption_warnings(captions) if captions else []
        return self._padded(request) if self.compiled else request, warnings

    def _encode_empty(self, request: SamplingRequest, settings: dict[str, SamplingConfig]) -> None:
        """The empty caption, for the stages with guidance that were trained with it in place of dropped captions."""
        for stage in self.cascade.running(request.start_at, request.stop_at, request.lowres):
            needs_it = settings[stage.name].guidance != 1.0 and not stage.config.unet.has_null_text
            if needs_it and request.negative is None and stage.empty_text is None:
                stage.empty_text = self.encode([""])

    def _padded(self, request: SamplingRequest) -> SamplingRequest:
        """The request with padded text, because torch.compile makes a graph for every number of tokens."""
        running = self.cascade.running(request.start_at, request.stop_at, request.lowres)
        limits = [stage.config.unet.max_text_length for stage in running if stage.config.unet.text_dim is not None]
        text, negative = request.text, request.negative
        if limits and text is not None:
            text = text.padded(min(limits))
        if limits and isinstance(negative, TextEmbeddings):
            negative = negative.padded(min(limits))
        return replace(request, text=text, negative=negative)

    def _with_channels(self, request: SamplingRequest) -> tuple[SamplingRequest, list[str]]:
        """The request with init and low-resolution images in the model's channels, and a line for each conversion."""
        channels, warnings = self.cascade.config.channels, []
        conversion = "converted to grey" if channels == 1 else "given equal red, green and blue"
        if request.init_image is not None and request.init_image.image.shape[1] != channels:
            image = with_channels(request.init_image.image, channels)
            request = replace(request, init_image=replace(request.init_image, image=image))
            warnings.append(f"the init image was {conversion}, as the model draws")
        if request.lowres is not None and request.lowres.shape[1] != channels:
            request = replace(request, lowres=with_channels(request.lowres, channels))
            warnings.append(f"the low-resolution image was {conversion}, as the model draws")
        for warning in warnings:
            logger.warning(warning)
        return request, warnings

    def save_pretrained(
        self, path: str | Path, *, card: str | None = None, dtype: torch.dtype | str | None = None
    ) -> Path:
        """Write a model directory.

        card: text of README.md; None copies that of the directory this model is from. dtype: of the stored weights;
        None is the pipeline's own. Raises ValueError if the folder is not empty.
        """
        old_card, grid = (None if self.folder is None else self.folder / name for name in ("README.md", "samples.png"))
        if card is None:
            card = old_card.read_text(encoding="utf-8") if old_card is not None and old_card.is_file() else ""
        weights = {stage.name: self.cascade.unets[stage.name].state_dict() for stage in self.cascade.config.stages}
        return write_model(
            Path(path),
            self.cascade.config,
            weights,
            text_encoder=self.text_encoder,
            encoder_folder=self.encoder_folder,
            card=card,
            grid=grid if grid is not None and grid.is_file() else None,
            dtype=None if dtype is None else _floating_dtype(dtype),
            sizes=self.sizes,
        )

    def push_to_hub(self, name: str, *, private: bool = False, revision: str | None = None) -> str:
        """Upload the model as OWNER/NAME to the Hugging Face hub, as `save_pretrained` writes it; returns its address.

        The repository is created if it does not exist; revision: branch, by default the main one. Raises ValueError if
        the hub refuses, ImportError without huggingface_hub.
        """
        with tempfile.TemporaryDirectory(prefix="fastimagen-push-") as folder:
            return push_model(self.save_pretrained(Path(folder) / "model"), name, private=private, revision=revision)


def _for_each_image(rows: Any, count: int) -> Any:
    """`count` rows from as many, or from one row for all images."""
    return rows if rows is None or len(rows) == count else rows[[0] * count]


def _available_device(device: torch.device | str) -> torch.device:
    """The device. Raises ValueError if nothing can be allocated there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise ValueError(f'device {device} is not available, use "cpu": {first_line(error)}') from None


def _floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    names = [str(allowed).removeprefix("torch.") for allowed in DTYPES]
    _require_one_of("dtype", str(dtype).removeprefix("torch."), tuple(names))
    return DTYPES[names.index(str(dtype).removeprefix("torch."))]


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
