"""The commands that sample: their flags. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

CAPTIONS_HELP = "captions, or text files with one caption per line"


def add_commands(command: Callable[[str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]) -> None:
    """sample, encode, demo and evaluate. command(name, run, help): adds one to the parser."""
    _sample_flags(command("sample", _sample, "sample images for captions"))

    encode = command("encode", _encode, "embed captions into a file for `sample --embeddings`")
    encode.add_argument("--captions", nargs="+", required=True, metavar="CAPTION|FILE", help=CAPTIONS_HELP)
    encode.add_argument("--out", type=Path, required=True, help="new .safetensors file")
    _model_flags(encode)

    demo = command("demo", _demo, "serve a web page that samples images for captions")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    demo.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    demo.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for a password (default: ask for nothing)")
    _model_flags(demo)
    _lora_flag(demo)

    evaluate = command("evaluate", _evaluate, "read the attributes in the captions back from sampled images")
    evaluate.add_argument("--data", choices=["shapes"], default="shapes", help="test captions; default: %(default)s")
    evaluate.add_argument("--count", type=int, default=200, help="captions of each test split (default: %(default)s)")
    evaluate.add_argument("--out", type=Path, help="new folder for report.json and a grid of images per split")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    _model_flags(evaluate, batches=True)
    _sampling_flags(evaluate)


def _sample_flags(sample: argparse.ArgumentParser) -> None:
    """Flags without a default here are None if not given, so that --settings can refuse them."""
    source = sample.add_mutually_exclusive_group()
    source.add_argument("--captions", nargs="+", metavar="CAPTION|FILE", help=CAPTIONS_HELP)
    source.add_argument("--embeddings", type=Path, help="precomputed text embeddings (.safetensors)")
    source.add_argument("--settings", type=Path, help="samples.json, also from the web page: reproduce its images")
    sample.add_argument("--out", type=Path, help="new folder (default: samples, or samples-2, ... if that is taken)")
    sample.add_argument(
        "--filetype",
        choices=["png", "jpg", "webp"],
        help="of the images (default: that of the images in the file of --settings, or png)",
    )
    sample.add_argument("--count", type=int, help="images of each caption; without captions, of the model (default: 1)")
    sample.add_argument("--seed", type=int, help="seed of the first image; the next ones count up (default: 0)")
    sample.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the images, in pixels (default: the model's)")
    sample.add_argument("--negative", metavar="CAPTION", help="negative caption: guidance steers away from it")
    sample.add_argument(
        "--image",
        type=Path,
        help="init image, cropped to the aspect ratio of --size; with --mask, the image to inpaint",
    )
    sample.add_argument(
        "--strength",
        type=float,
        help="with --image: share of the steps that run, in (0, 1]; a small one stays close to the image, at 1 nothing "
        "of it is left (default: layout and main colours stay; with --mask 1)",
    )
    sample.add_argument("--mask", type=Path, help="inpainting mask of the size of --image, white where to inpaint")
    sample.add_argument("--resamples", type=int, help="with --mask: RePaint's resampling count (default: 5)")
    sample.add_argument("--lowres", type=Path, help="low-resolution image to upscale, with --start-at")
    sample.add_argument("--start-at", metavar="STAGE", help="first stage to run")
    sample.add_argument("--stop-at", metavar="STAGE", help="last stage to run")
    _model_flags(sample, batches=True)
    _sampling_flags(sample)


def _sampling_flags(sub: argparse.ArgumentParser) -> None:
    """One flag for each field of SamplingConfig, as text: the command parses it and words the errors."""
    from ..sampling.settings import sampling_settings

    group = sub.add_argument_group(
        "sampling settings",
        "One value for all stages, or one for each stage as in --steps base=20,sr=8. By default the model's own.",
    )
    for setting in sampling_settings():
        kinds = {int: "INT", float: "NUMBER", tuple: "LOW:HIGH"}
        metavar = "NAME" if setting.choices else kinds.get(setting.kind, "VALUE")
        choices = f" Choices: {', '.join(setting.choices)}." if setting.choices else ""
        group.add_argument(setting.flag, metavar=metavar, help=f"{setting.help}{choices}".replace("%", "%%"))


def _model_flags(sub: argparse.ArgumentParser, *, batches: bool = False) -> None:
    from ..config import CompileMode
    from ..sampling.settings import Offload

    sub.add_argument("--model", required=True, help="model directory, or OWNER/NAME on the Hugging Face hub")
    sub.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    sub.add_argument("--device", help="cuda or cpu (default: cuda if there is a GPU)")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    sub.add_argument(
        "--compile",
        choices=get_args(CompileMode),
        help="mode of torch.compile for the U-Nets; reduce-overhead adds CUDA graphs (default: not compiled)",
    )
    sub.add_argument(
        "--offload",
        choices=get_args(Offload),
        default="auto",
        help="keep a stage on the GPU only while it runs; auto: if the weights fill the GPU (default: %(default)s)",
    )
    if batches:
        _lora_flag(sub)
        sub.add_argument("--guide", metavar="MODEL", help="smaller or earlier model that guides (autoguidance)")
        sub.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")


def _lora_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--lora",
        nargs="+",
        metavar="PATH[:SCALE]",
        help="adapters (LoRA) to add to the weights, in memory: files or folders, each with a factor (default: 1)",
    )


def _sample(options: argparse.Namespace) -> None:
    from .sample import sample

    sample(options)


def _encode(options: argparse.Namespace) -> None:
    from .sample import encode

    encode(options)


def _demo(options: argparse.Namespace) -> None:
    from .sample import demo

    demo(options)


def _evaluate(options: argparse.Namespace) -> None:
    from .sample import evaluate

    evaluate(options)
