"""The `fastimagen` command. Heavy imports happen inside the command that needs them: --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on stderr and exit status 1; one that argparse finds, usage and 2."""
    options = parser().parse_args(arguments)
    try:
        options.run_command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(
            "error: the GPU's memory does not suffice; a smaller --batch-size, --dtype bfloat16, --offload always "
            "and, for large pictures, --tile need less",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="fastimagen", description="Train Imagen cascades and sample from them.")
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run_command=run)
        return sub

    shards = commands.add_parser("shards", help="pack pictures and captions into WebDataset shards")
    kinds = shards.add_subparsers(required=True, metavar="KIND")
    folder = kinds.add_parser("folder", help="images with .txt captions beside them, or a JSONL manifest")
    folder.add_argument("source", type=Path, help='folder, or a .jsonl of {"image": path, "caption": text}')
    folder.add_argument("--out", type=Path, required=True)
    folder.add_argument("--shard-size", type=int, default=1000, help="samples per tar")
    folder.set_defaults(run_command=_shards_folder)
    shapes = kinds.add_parser("shapes", help="the built-in captioned shapes")
    shapes.add_argument("--out", type=Path, required=True)
    shapes.add_argument("--count", type=int, default=20000, help="training pictures")
    shapes.add_argument("--size", type=int, default=64, help="height and width in pixels")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.set_defaults(run_command=_shards_shapes)

    embed = command("embed", _embed, "fill the cache of text embeddings, once; resumable")
    embed.add_argument("--config", required=True, help="ds.json")
    embed.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")

    export = command("export", _export, "turn a run directory into a model directory")
    export.add_argument("--run", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)

    sample = command("sample", _sample, "draw pictures for captions")
    sample.add_argument("--model", type=Path, required=True)
    source = sample.add_mutually_exclusive_group(required=True)
    source.add_argument("--captions", nargs="+", help="captions, or one .txt file with a caption per line")
    source.add_argument("--embeddings", type=Path, help="precomputed text embeddings (.safetensors): no text encoder")
    source.add_argument("--settings", type=Path, help="samples.json, or what the demo hands out: those pictures again")
    sample.add_argument("--out", type=Path, default=Path("samples"))
    sample.add_argument("--steps", type=int)
    sample.add_argument("--sampler", help="ddpm, ddim, dpmpp_2m or heun")
    sample.add_argument("--guidance", type=float)
    sample.add_argument("--tile", type=int, help="draw stages larger than this in overlapping tiles, to save memory")
    sample.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    sample.add_argument("--negative", help="a caption to lead away from")
    sample.add_argument("--image", type=Path, help="a picture to start from, or with --mask to draw into")
    sample.add_argument("--strength", type=float, default=1.0, help="with --image: share of the steps, in (0, 1]")
    sample.add_argument("--mask", type=Path, help="a picture as large as --image, white where to draw")
    sample.add_argument("--resamples", type=int, default=5, help="with --mask: how often to walk every stretch")
    sample.add_argument("--lowres", type=Path, help="a picture to enlarge, with --start-at")
    sample.add_argument("--start-at", help="the first stage to run")
    sample.add_argument("--stop-at", help="the last stage to run")
    _device_options(sample)

    demo = command("demo", _demo, "serve a web page that draws pictures for captions")
    demo.add_argument("--model", type=Path, required=True)
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on; by default this machine alone")
    demo.add_argument("--port", type=int, default=7860)
    _model_options(demo)

    evaluate = command("evaluate", _evaluate, "read the captions' attributes back out of sampled pictures")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--data", choices=["shapes"], default="shapes")
    evaluate.add_argument("--count", type=int, default=200, help="captions of each test split")
    evaluate.add_argument("--out", type=Path, help="also write report.json and the pictures here")
    evaluate.add_argument("--steps", type=int)
    evaluate.add_argument("--sampler", help="ddpm, ddim, dpmpp_2m or heun")
    evaluate.add_argument("--guidance", type=float)
    evaluate.add_argument("--seed", type=int, default=0)
    _device_options(evaluate)

    minimagen = command(
        "import-minimagen", _import_minimagen, "turn a MinImagen training directory into a model directory"
    )
    minimagen.add_argument("source", type=Path)
    minimagen.add_argument("--out", type=Path, required=True)

    command("info", _info, "print versions, devices and active kernels, for a bug report")
    return top


def _device_options(sub: argparse.ArgumentParser) -> None:
    _model_options(sub)
    sub.add_argument("--batch-size", type=int, default=32)


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cuda or cpu; by default cuda where there is one")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    sub.add_argument(
        "--compile",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="torch.compile for the U-Nets; reduce-overhead adds CUDA graphs",
    )
    sub.add_argument(
        "--offload",
        choices=["auto", "always", "never"],
        default="auto",
        help="keep a stage on the GPU only while it runs",
    )


def _shards_folder(options: argparse.Namespace) -> None:
    from .data.folder import pack_folder, pack_manifest

    pack = pack_manifest if options.source.suffix == ".jsonl" else pack_folder
    print(pack(options.source, options.out, shard_size=options.shard_size))


def _shards_shapes(options: argparse.Namespace) -> None:
    from .data.shapes import write_shards

    write_shards(options.out, options.count, options.size, options.seed)
    print(f"{options.out}: {options.count} training pictures of {options.size}x{options.size}, and the test splits")


def _embed(options: argparse.Namespace) -> None:
    from .config_file import load_config
    from .data.source import embed_all, prepare_shapes

    config = load_config(options.config, options.overrides).fastimagen
    prepare_shapes(config, say=print)
    embed_all(config, say=print)


def _export(options: argparse.Namespace) -> None:
    from .train.export import export

    print(export(options.run, options.out))


def _load(options: argparse.Namespace):
    import torch

    from .sampling.pipeline import ImagenPipeline

    device = options.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {device} is not to be had here: {str(error).partition(chr(10))[0]}") from None
    return ImagenPipeline.from_pretrained(
        options.model,
        device=device,
        dtype=getattr(torch, options.dtype),
        compile=options.compile,
        offload=options.offload,
    )


def _sample(options: argparse.Namespace) -> None:
    from .files import require_empty
    from .sampling.distributed import draw_shared

    require_empty(options.out)
    chosen = _recorded(options) if options.settings else _chosen(options)
    pipe = _load(options)
    output = draw_shared(
        pipe,
        **chosen,
        batch_size=options.batch_size,
        callback=_progress(pipe, chosen["steps"]) if sys.stderr.isatty() else None,
    )
    if output is not None:
        print(output.save(options.out))


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments by the command line's options."""
    captions, text = _captions(options)
    count = len(captions) if captions else len(text)
    return {
        "captions": captions,
        "text": text,
        "seeds": list(range(options.seed, options.seed + count)),
        "steps": options.steps,
        "sampler": options.sampler,
        "guidance": options.guidance,
        "tile": options.tile,
        "init_image": _init_image(options),
        "negative": None if options.negative is None else [options.negative],
        "lowres": None if options.lowres is None else _picture(options.lowres),
        "start_at": options.start_at,
        "stop_at": options.stop_at,
    }


SETTLED = ("seed", "steps", "sampler", "guidance", "tile", "negative", "image", "mask", "lowres", "start_at", "stop_at")


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments that made the pictures of a samples.json. Raises ValueError if it lacks some of them."""
    import json

    path = options.settings
    if more := [name for name in SETTLED if getattr(options, name) != {"seed": 0}.get(name)]:
        raise ValueError(f"--settings settles --{more[0].replace('_', '-')} already: leave one of them out")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        captions, seeds = ([sample[key] for sample in record["samples"]] for key in ("caption", "seed"))
        by_stage = {
            key: {name: stage[key] for name, stage in record["stages"].items()}
            for key in ("steps", "sampler", "guidance", "threshold", "percentile", "tile")
        }
        init_image, negative, start_at, stop_at = (
            record[key] for key in ("init_image", "negative", "start_at", "stop_at")
        )
    except OSError as error:
        raise ValueError(f"cannot read settings {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds no settings of pictures, as samples.json does") from None
    if init_image is not None or start_at is not None or negative == "embeddings":
        raise ValueError(f"{path}: its pictures came from a picture or embeddings, which it does not hold")
    return {"captions": captions, "seeds": seeds, "negative": negative, "stop_at": stop_at, **by_stage}


def _progress(pipe, steps: int | Mapping[str, int] | None):
    """A callback that says on one line of the terminal which step of which stage is done."""
    settings = pipe.cascade.settings(steps=steps)
    last = pipe.cascade.stages[-1].name

    def show(stage: str, step: int, x: object, x0: object) -> None:
        done = step + 1 == settings[stage].steps
        end = "\n" if done and stage == last else ""
        print(
            f"\r{len(x)} pictures, {stage}: step {step + 1} of {settings[stage].steps}   ",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    return show


def _init_image(options: argparse.Namespace):
    """The picture to start from, and its mask."""
    from .diffusion.inpainting import InitImage

    if options.image is None:
        if options.mask is not None or options.strength != 1.0:
            raise ValueError("--mask and --strength go with --image")
        return None
    image, mask = _picture(options.image), None
    if options.mask is not None:
        mask = _picture(options.mask).mean(dim=1, keepdim=True) > 0  # (1, 1, H, W)
        if mask.shape[2:] != image.shape[2:]:
            sizes = (
                f"{name} {width}x{height}"
                for name, (height, width) in ((options.mask, mask.shape[2:]), (options.image, image.shape[2:]))
            )
            raise ValueError(f"mask and picture must be of one size: {', '.join(sizes)}")
    return InitImage(image, mask, strength=options.strength, num_resamples=options.resamples)


def _picture(path: Path):
    """A picture file as (1, 3, H, W) in [-1, 1]. Raises ValueError naming the file."""
    from .images import open_rgb, to_tensor

    try:
        return to_tensor(open_rgb(path.read_bytes()))[None]
    except OSError as error:
        raise ValueError(f"cannot read picture {path}: {error.strerror or error}") from None


def _captions(options: argparse.Namespace):
    """(captions, embeddings) as the user gave them. A line of a file is a caption; blank ones are an error."""
    if options.embeddings:
        from .text.embeddings import TextEmbeddings

        return TextEmbeddings.load_captions(options.embeddings), TextEmbeddings.load(options.embeddings)
    if len(options.captions) > 1 or not options.captions[0].endswith(".txt"):
        captions, where = options.captions, "--captions"
    else:
        where = options.captions[0]
        captions = _lines(Path(where))
    if not captions:
        raise ValueError(f"{where} holds no captions")
    blank = [str(number) for number, caption in enumerate(captions, 1) if not caption.strip()]
    if blank:
        raise ValueError(f"{where}: caption {', '.join(blank[:5])} is blank; line i is image i, so take it out")
    return captions, None


def _lines(path: Path) -> list[str]:
    """The lines of a text file. Raises ValueError naming it when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also break at form feeds and such
    except OSError as error:
        raise ValueError(f"cannot read captions {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"captions {path} are not UTF-8: {error}") from None
    return lines if lines[-1] else lines[:-1]


def _demo(options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install fastimagen[demo]")
    from .demo import serve

    serve(_load(options), host=options.host, port=options.port)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation.shapes import evaluate_shapes, table

    report = evaluate_shapes(
        _load(options),
        count=options.count,
        seed=options.seed,
        out=options.out,
        batch_size=options.batch_size,
        steps=options.steps,
        sampler=options.sampler,
        guidance=options.guidance,
    )
    print(table(report))


def _import_minimagen(options: argparse.Namespace) -> None:
    from .interop.minimagen import import_minimagen

    print(import_minimagen(options.source, options.out))


def _info(options: argparse.Namespace) -> None:
    from .info import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
