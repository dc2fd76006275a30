"""`fastimagen sample`, `demo` and `evaluate`: what runs a model directory."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cascade import Callback
from ..diffusion.inpainting import InitImage
from ..files import first_line, require_empty
from ..images import open_rgb, to_tensor
from ..sampling.distributed import sample_distributed
from ..sampling.pipeline import ImagenPipeline
from ..sampling.request import SamplingRequest
from ..sampling.settings import sampling_settings
from ..text.embeddings import TextEmbeddings


def sample(options: argparse.Namespace) -> None:
    """Sample images into a new folder."""
    require_empty(options.out)
    request = recorded_request(options) if options.settings else request_from(options)
    pipe = load_pipeline(options)
    callback = progress(pipe, request) if sys.stderr.isatty() else None
    output = sample_distributed(pipe, request, batch_size=options.batch_size, callback=callback)
    if output is not None:
        print(output.save(options.out))


def demo(options: argparse.Namespace) -> None:
    """Serve the web page."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web page needs Gradio: pip install --editable '.[demo]'")
    from ..demo import serve

    serve(load_pipeline(options), host=options.host, port=options.port)


def evaluate(options: argparse.Namespace) -> None:
    """Print how many attributes of the captions are right in the sampled images."""
    from ..evaluation.shapes import evaluate_shapes, table

    settings = settings_from(options)
    report = evaluate_shapes(
        load_pipeline(options),
        count=options.count,
        seed=options.seed,
        out=options.out,
        batch_size=options.batch_size,
        **settings,
    )
    print(table(report))


def load_pipeline(options: argparse.Namespace) -> ImagenPipeline:
    """The model that --model names, on --device. Under a launcher every process has a GPU of its own."""
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = options.device or default
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise ValueError(f"--device {device} is not available: {first_line(error)}") from None
    return ImagenPipeline.from_pretrained(
        options.model,
        device=device,
        dtype=getattr(torch, options.dtype),
        compile=options.compile,
        offload=options.offload,
    )


# ---- from flags to a request


def settings_from(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings among the flags. Raises ValueError that names the flag and the allowed values."""
    return {
        setting.name: setting.parse(getattr(options, setting.name), setting.flag)
        for setting in sampling_settings()
        if getattr(options, setting.name) is not None
    }


def request_from(options: argparse.Namespace) -> SamplingRequest:
    """The request that the flags describe."""
    captions: list[str] | None
    text = None
    if options.embeddings:
        text = TextEmbeddings.load(options.embeddings)
        captions, count = TextEmbeddings.load_captions(options.embeddings), len(text)
    else:
        captions = read_captions(options.captions)
        count = len(captions)
    first_seed = options.seed or 0
    return SamplingRequest(
        captions=captions,
        text=text,
        seeds=list(range(first_seed, first_seed + count)),
        negative=[options.negative] if options.negative and options.negative.strip() else None,
        init_image=read_init_image(options),
        lowres=None if options.lowres is None else read_image(options.lowres),
        start_at=options.start_at,
        stop_at=options.stop_at,
        settings=settings_from(options),
    )


def recorded_request(options: argparse.Namespace) -> SamplingRequest:
    """The request of the samples.json that --settings names; no other flag may change it."""
    inputs = ("seed", "negative", "image", "strength", "mask", "resamples", "lowres", "start_at", "stop_at")
    for name in (*inputs, *(setting.name for setting in sampling_settings())):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--settings already sets {flag}: give only one of the two")
    return SamplingRequest.from_record(options.settings)


def read_captions(arguments: list[str]) -> list[str]:
    """The captions among the arguments, and for every argument that ends in .txt the lines of that file."""
    captions = []
    for number, argument in enumerate(arguments, 1):
        if argument.lower().endswith(".txt"):
            captions += _caption_lines(Path(argument))
        elif argument.strip():
            captions.append(argument)
        else:
            raise ValueError(f"--captions: caption {number} is blank")
    return captions


def _caption_lines(path: Path) -> list[str]:
    """The lines of a text file, one caption each. Raises ValueError if it cannot be read or a line is blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also breaks at form feeds
    except OSError as error:
        raise ValueError(f"cannot read captions {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"captions {path} are not UTF-8: {error}") from None
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} contains no captions")
    blank = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise ValueError(f"{path}: blank line {', '.join(blank[:5])}; each line is the caption of one image")
    return lines


def read_init_image(options: argparse.Namespace) -> InitImage | None:
    """The image to start from, and its mask."""
    if options.image is None:
        if any(getattr(options, name) is not None for name in ("mask", "strength", "resamples")):
            raise ValueError("--mask, --strength and --resamples need --image")
        return None
    image, mask = read_image(options.image), None
    if options.mask is not None:
        mask = read_image(options.mask).mean(dim=1, keepdim=True) > 0  # (1, 1, H, W)
        if mask.shape[2:] != image.shape[2:]:
            raise ValueError(
                f"--mask and --image must have the same size: {options.mask} is {_size(mask)}, "
                f"{options.image} is {_size(image)}"
            )
    chosen = {"strength": options.strength, "num_resamples": options.resamples}
    return InitImage(image, mask, **{name: value for name, value in chosen.items() if value is not None})


def read_image(path: Path) -> Tensor:
    """An image file as (1, 3, H, W) in [-1, 1]. Raises ValueError that names the file."""
    try:
        return to_tensor(open_rgb(path.read_bytes()))[None]  # (1, 3, H, W)
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _size(image: Tensor) -> str:
    """Width and height of an image (B, C, H, W)."""
    return f"{image.shape[3]}x{image.shape[2]}"


def progress(pipe: ImagenPipeline, request: SamplingRequest) -> Callback:
    """A callback that shows stage and step on one line of the terminal."""
    settings = pipe.cascade.settings(**request.settings)
    last = pipe.cascade.running(request.start_at, request.stop_at, request.lowres)[-1].name

    def show(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        steps = settings[stage].steps
        end = "\n" if stage == last and step + 1 == steps else ""
        print(f"\r{len(x)} images, {stage}: step {step + 1} of {steps}   ", end=end, file=sys.stderr, flush=True)

    return show
