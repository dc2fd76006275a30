"""The light sampler: an exported model directory, captions or text embeddings in, pictures out.

Needs the core dependencies alone; captions (rather than embeddings) need transformers, the ``text`` extra.

A model directory: model_index.json, ``<stage>/config.json`` + ``<stage>/model.safetensors`` (EMA weights), the text
encoder by name or, if it is the small built-in one, in full under ``text_encoder/``, README.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..cascade import Cascade
from ..diffusion.inpainting import InitImage
from ..text.embeddings import TextEmbeddings
from ..text.t5 import T5Encoder
from .model_directory import read_model, write_model
from .output import Output

COMPILE = (None, "default", "reduce-overhead", "max-autotune")
OFFLOAD = ("auto", "always", "never")
logger = logging.getLogger(__name__)


class ImagenPipeline:
    """A trained cascade ready to sample.

    `pipe = ImagenPipeline.from_pretrained(path, device="cuda", dtype=torch.bfloat16)`
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        text_encoder: dict[str, Any] | None,
        source: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: str | None = None,
        offload: str = "auto",
    ) -> None:
        for name, value, allowed in (("compile", compile, COMPILE), ("offload", offload, OFFLOAD)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
        self.device = torch.device(device)
        self.cascade = cascade.to(dtype=dtype).eval().requires_grad_(False)
        self.offload = offload == "always" or (offload == "auto" and self._is_too_large())
        if not self.offload:
            self.cascade.to(self.device)
        for unet in self.cascade.unets.values() if compile else ():
            unet.compile(mode=compile)
        self.text_encoder, self.source = text_encoder, source
        self._encoder: T5Encoder | None = None

    def _is_too_large(self) -> bool:
        """Whether the weights would fill more than half of the GPU's free memory."""
        if self.device.type != "cuda":
            return False
        weights = sum(p.numel() * p.element_size() for p in self.cascade.parameters())
        free, _ = torch.cuda.mem_get_info(self.device)
        if weights <= free / 2:
            return False
        logger.warning(
            f"the weights take {weights / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free on {self.device}: "
            f"every stage is there only while it runs"
        )
        return True

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: str | None = None,
        offload: str = "auto",
    ) -> ImagenPipeline:
        """Load a model directory.

        compile: a mode of torch.compile for the U-Nets: "default", "reduce-overhead" (CUDA graphs) or "max-autotune";
        None runs them as they are. offload: "always" keeps weights on the CPU and a stage on `device` only while it
        runs, "never" all of them on `device`, "auto" decides by the GPU's free memory. Raises ValueError with one line
        if the folder is no model directory or is damaged.
        """
        config, weights, index = read_model(path)
        with torch.device("meta"):
            cascade = Cascade(config)
        for stage in config.stages:
            unet = cascade.unets[stage.name]
            expected = {name: tuple(p.shape) for name, p in unet.named_parameters()}
            found = {name: tuple(w.shape) for name, w in weights[stage.name].items()}
            if found != expected:
                wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
                raise ValueError(
                    f"{Path(path) / stage.name}: weights and config.json disagree about {', '.join(wrong[:3])}"
                )
            unet.load_state_dict(weights[stage.name], assign=True)
        return cls(
            cascade,
            text_encoder=index.get("text_encoder"),
            source=str(path),
            device=device,
            dtype=dtype,
            compile=compile,
            offload=offload,
        )

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Embed captions with the model's own text encoder, loaded once."""
        if self._encoder is None:
            if self.text_encoder is None:
                raise ValueError("this model names no text encoder: give text=TextEmbeddings(...)")
            where = self.text_encoder["name"]
            if self.text_encoder.get("included"):
                where = str(Path(self.source) / where)
                if not Path(where).is_dir():
                    raise ValueError(f"{self.source} is damaged: its text encoder {where} is missing")
            try:
                self._encoder = T5Encoder(
                    where,
                    revision=self.text_encoder.get("revision"),
                    max_length=self.text_encoder["max_length"],
                    device=self.device,
                )
            except SafetensorError as error:
                raise ValueError(f"cannot read the weights of text encoder {where}: {error}") from None
        return self._encoder.encode(captions)

    def __call__(
        self,
        captions: Sequence[str] | None = None,
        *,
        text: TextEmbeddings | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 32,
        callback: Callable | None = None,
        steps: int | Mapping[str, int] | None = None,
        sampler: str | Mapping[str, str] | None = None,
        guidance: float | Mapping[str, float] | None = None,
        threshold: str | Mapping[str, str] | None = None,
        percentile: float | Mapping[str, float] | None = None,
        tile: int | Mapping[str, int] | None = None,
        negative: Sequence[str] | TextEmbeddings | None = None,
        init_image: InitImage | None = None,
        lowres: Tensor | None = None,
        start_at: str | None = None,
        stop_at: str | None = None,
    ) -> Output:
        """Draw one picture per caption (or per row of `text`).

        seeds: one per picture, by default 0, 1, 2, ...; a picture depends on its caption and seed, not on its batch.
        steps, sampler, guidance, threshold, percentile, tile: one value for all stages or a mapping by stage name; None
        is the model's own. negative: what not to draw, one per picture or one for all. given: a picture to start from
        (img2img) or to draw into (inpainting), one per picture or one for all. lowres (B or 1, C, s, s) in [-1, 1]:
        what super-resolution enlarges when it is the stage to start_at. stop_at: the last stage to run.
        Raises ValueError for what does not fit together.
        """
        if captions is not None and (isinstance(captions, str) or not captions):
            raise ValueError("captions must be a list with at least one caption")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self.cascade.text_dim is not None and captions is None and text is None:
            raise ValueError("give captions or text")
        count = len(text) if text is not None else len(captions or seeds or [])
        if not count:
            raise ValueError("nothing to draw: give captions, text or seeds")
        captions = list(captions) if captions is not None else [""] * count
        seeds = list(range(count)) if seeds is None else list(seeds)
        if not len(captions) == len(seeds) == count:
            raise ValueError(f"{len(captions)} captions, {count} texts and {len(seeds)} seeds do not fit together")
        settings = self.cascade.settings(
            steps=steps, sampler=sampler, guidance=guidance, threshold=threshold, percentile=percentile, tile=tile
        )
        running = [stage.name for stage in self.cascade.running(start_at, stop_at, lowres)]
        init_image, lowres = _for_all(init_image, count, "given picture"), _for_all(lowres, count, "lowres picture")
        if lowres is not None and not bool((lowres.abs() <= 1).all()):
            raise ValueError("lowres must lie in [-1, 1]")
        if negative is not None:
            if all(settings[name].guidance == 1.0 for name in running):
                raise ValueError("negative captions act through guidance, which is 1: raise it")
            if isinstance(negative, str):
                raise ValueError("negative must be a list of captions")
        record = {
            "model": self.source,
            "version": __version__,
            "negative": None
            if negative is None
            else list(negative)
            if not isinstance(negative, TextEmbeddings)
            else "embeddings",
            "start_at": start_at,
            "stop_at": stop_at,
            "init_image": None if init_image is None else init_image.settings(),
            "stages": {name: settings[name].model_dump() for name in running},
        }
        read = []
        if negative is not None:
            if not isinstance(negative, TextEmbeddings):
                read += negative
                negative = self.encode(negative)
            negative = _for_all(negative, count, "negative caption")
        if self.cascade.text_dim is not None and text is None:  # last: the text encoder may take minutes to load
            read += captions
            text = self.encode(captions)
        images = []
        for first in range(0, count, batch_size):
            rows = slice(first, first + batch_size)
            part = None if text is None else text[rows].to(device=self.device)
            images.append(
                self.cascade.sample(
                    part,
                    seeds[rows],
                    settings=settings,
                    negative=negative and negative[rows],
                    init_image=init_image and init_image[rows],
                    lowres=None if lowres is None else lowres[rows].to(self.device),
                    start_at=start_at,
                    stop_at=stop_at,
                    callback=callback,
                    device=self.device if self.offload else None,
                ).cpu()
            )
        return Output(torch.cat(images), captions, seeds, record, self._encoder.unread(read) if read else [])

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> Path:
        """Write a model directory; card None keeps the one it was loaded with.

        Raises ValueError if the folder holds anything.
        """
        path, old_card = Path(path), Path(self.source) / "README.md"
        if card is None:
            card = old_card.read_text(encoding="utf-8") if self.source and old_card.is_file() else ""
        weights = {stage.name: self.cascade.unets[stage.name].state_dict() for stage in self.cascade.config.stages}
        return write_model(
            path,
            self.cascade.config,
            weights,
            text_encoder=self.text_encoder,
            encoder_folder=Path(self.source) / "text_encoder",
            card=card,
        )


def _for_all(rows: Any, count: int, what: str) -> Any:
    """Rows (count, ...) from as many, or from one for all. Raises ValueError otherwise."""
    if rows is None or len(rows) == count:
        return rows
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} {what}s for {count} pictures: give one, or one for each")
    return rows[[0] * count]
