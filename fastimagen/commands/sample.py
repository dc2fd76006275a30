"""`fastimagen sample`, `encode`, `demo` and `evaluate`: what runs a model directory."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cascade import Callback
from ..diffusion.inpainting import InitImage
from ..extras import require_extra
from ..files import read_json_object, require_empty
from ..sampling.adapters import parse_adapters
from ..sampling.distributed import exit_process, rank_and_world_size, sample_distributed
from ..sampling.image_files import read_cropped_image, read_init_image
from ..sampling.pipeline import ImagenPipeline
from ..sampling.request import SamplingRequest, recorded_filetype
from ..sampling.settings import sampling_settings
from ..text.embeddings import TextEmbeddings

logger = logging.getLogger(__name__)

DEFAULT_OUT = Path("samples")


def sample(options: argparse.Namespace) -> None:
    """Sample images into a new folder."""
    if options.out is not None:
        require_empty(options.out)
    request = recorded_request(options) if options.settings else request_from(options)
    pipe = load_pipeline(options)
    callback = progress(pipe, request) if sys.stderr.isatty() else None
    output = sample_distributed(pipe, request, batch_size=options.batch_size, callback=callback)
    if output is not None:
        recorded = recorded_filetype(options.settings) if options.settings else "png"
        folder = options.out or unused_folder(DEFAULT_OUT)
        print(output.save(folder, filetype=options.filetype or recorded))
    if rank_and_world_size()[1] > 1:
        exit_process()


def encode(options: argparse.Namespace) -> None:
    """Write the embeddings of captions, as `fastimagen sample --embeddings` reads them."""
    if options.out.exists():
        raise ValueError(f"{options.out} exists: choose another file, or remove it first")
    captions = read_captions(options.captions)
    pipe = load_pipeline(options)
    embeddings = pipe.encode(captions)
    for warning in pipe.caption_warnings(captions):
        logger.warning(warning)
    embeddings.save(options.out, captions)
    tokens, width = int(embeddings.lengths.sum()), embeddings.embeds.shape[2]
    print(f"{options.out}: {len(captions)} captions, {tokens} tokens of width {width}")


def demo(options: argparse.Namespace) -> None:
    """Serve the web page."""
    require_extra("gradio", user="the web page", extra="demo")
    from ..demo.server import serve

    serve(load_pipeline(options), host=options.host, port=options.port, auth=options.auth)


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


def unused_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... if it is not empty."""
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not candidate.exists() or (candidate.is_dir() and not any(candidate.iterdir())):
            return candidate
    raise AssertionError("count() is endless")


def load_pipeline(options: argparse.Namespace) -> ImagenPipeline:
    """The model that --model names, on --device. Under a launcher every process has a GPU of its own."""
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return ImagenPipeline.from_pretrained(
        options.model,
        revision=options.revision,
        device=options.device or default,
        dtype=options.dtype,
        compile=options.compile,
        offload=options.offload,
        guide=getattr(options, "guide", None),  # the web page and encode have no such flag
        lora=parse_adapters(getattr(options, "lora", None) or []),  # encode has no such flag
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
    captions = text = None
    if options.embeddings is not None:
        text = TextEmbeddings.load(options.embeddings)
        captions = TextEmbeddings.load_captions(options.embeddings)
    elif options.captions is not None:
        captions = read_captions(options.captions)
    return SamplingRequest.of(
        captions,
        text=text,
        count=1 if options.count is None else options.count,
        seed=options.seed,
        size=options.size,
        negative=options.negative,
        init_image=init_image_from(options),
        lowres=None if options.lowres is None else read_cropped_image(options.lowres, options.size),
        start_at=options.start_at,
        stop_at=options.stop_at,
        settings=settings_from(options),
    )


def recorded_request(options: argparse.Namespace) -> SamplingRequest:
    """The request of the samples.json that --settings names; no other flag may change it."""
    inputs = (
        "count",
        "seed",
        "size",
        "negative",
        "image",
        "strength",
        "mask",
        "resamples",
        "lowres",
        "start_at",
        "stop_at",
    )
    for name in (*inputs, *(setting.name for setting in sampling_settings())):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--settings already sets {flag}: give only one of the two")
    record = read_json_object(options.settings)
    guide = record.get("guide")
    if (guide is None) != (options.guide is None):
        advice = f"give --guide {guide}" if guide else "leave out --guide"
        raise ValueError(f"{options.settings} was sampled {'with' if guide else 'without'} a guide: {advice}")
    lora = record.get("lora") or {}  # older files have none
    if sorted(lora.values()) != sorted(parse_adapters(options.lora or []).values()):  # the files may have moved
        given = " ".join(f"{path}:{scale:g}" for path, scale in lora.items())
        raise ValueError(
            f"{options.settings} was sampled {'with' if lora else 'without'} adapters: "
            f"{f'give --lora {given}' if lora else 'leave out --lora'}"
        )
    return SamplingRequest.from_record(options.settings)


def read_captions(arguments: list[str]) -> list[str]:
    """The captions among the arguments, and the lines of every argument that is an existing file or ends in .txt."""
    captions = []
    for number, argument in enumerate(arguments, 1):
        if argument.lower().endswith(".txt") or _is_file(argument):
            captions += _caption_lines(Path(argument))
        elif argument.strip():
            captions.append(argument)
        else:
            raise ValueError(f"--captions: caption {number} is blank")
    return captions


def _is_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):  # a caption longer than any path, or with a null character
        return False


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


def init_image_from(options: argparse.Namespace) -> InitImage | None:
    """The image to start from, and its mask."""
    if options.image is None:
        if any(getattr(options, name) is not None for name in ("mask", "strength", "resamples")):
            raise ValueError("--mask, --strength and --resamples need --image")
        return None
    return read_init_image(
        options.image, options.mask, size=options.size, strength=options.strength, resamples=options.resamples
    )


def progress(pipe: ImagenPipeline, request: SamplingRequest) -> Callback:
    """A callback that shows stage and step on one line of the terminal."""
    settings = pipe.cascade.settings(**request.settings)
    last = pipe.cascade.running(request.start_at, request.stop_at, request.lowres)[-1].name

    def show(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        steps = settings[stage].steps
        end = "\n" if stage == last and step + 1 == steps else ""
        print(f"\r{len(x)} images, {stage}: step {step + 1} of {steps}   ", end=end, file=sys.stderr, flush=True)

    return show
