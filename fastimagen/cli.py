"""The `fastimagen` command: its flags. Heavy imports happen inside the command that needs them, so --help is quick."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import select
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for a program that SIGPIPE ended
CAPTIONS_HELP = "captions, or text files with one caption per line"
OUT_OF_MEMORY = "CUDA out of memory: reduce --batch-size, or use --dtype bfloat16, --offload always or --tile"


def main(arguments: list[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on stderr and exit status 1; one found by argparse, usage and 2."""
    # Idle OpenMP threads sleep instead of spinning: on shared cores, spinning threads made a step six times slower.
    # OpenMP reads this once, when torch is imported: some commands need torch for their flags.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _replace_unprintable()
    options = parser().parse_args(arguments)
    from .logs import configure_logging

    configure_logging()
    try:
        status = options.run_command(options)
        sys.stdout.flush()
        return status or 0
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_BROKEN_PIPE
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _reader_is_gone() -> bool:
    """Whether the reader of standard output has closed the pipe, as `head` does; later output is then discarded."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python would print a traceback when it flushes at the end
    return True


def _replace_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as escapes: images must not be lost to a caption's accent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Names the nearest flag for one that does not exist, before it misses required ones."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        known = list(self._option_string_actions)
        passes_on = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        for argument in takewhile(lambda argument: argument != "--", [] if passes_on else given):
            flag = argument.partition("=")[0]
            if argument.startswith("--") and " " not in flag and not any(name.startswith(flag) for name in known):
                from .config_file import OTHER_NAMES

                other = f"--{OTHER_NAMES.get(flag[2:].replace('-', '_'))}"
                near = [other] if other in known else difflib.get_close_matches(flag, known, n=1)
                self.error(f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else "-h lists all flags"))
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    from . import __version__
    from .commands import distill, shards, supervise
    from .commands.train import add_flags, train

    top = Parser(prog="fastimagen", description="Train Imagen cascades and sample from them.")
    top.add_argument("--version", action="version", version=f"fastimagen {__version__}")
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run_command=run)
        return sub

    quickstart = command("quickstart", _quickstart, "train a small cascade on captioned shapes and sample from it")
    quickstart.add_argument(
        "--dir", type=Path, default=Path(), help="folder to work in (default: the current one); rerun to resume"
    )

    starting = command("starting-files", _starting_files, "copy ds.json, and the configurations and scripts of launch/")
    starting.add_argument("--out", type=Path, default=Path(), help="folder (default: the current one)")

    init = command("init", _init, "write a starting configuration that fits your images and this machine")
    init.add_argument("source", help="folder of images with captions, a table of both (.jsonl, .csv, ...), or shards")
    init.add_argument("--out", type=Path, default=Path("mine.json"), help="new file (default: %(default)s)")
    init.add_argument("--size", type=int, help="height and width of the final images: 32, 64, ... 1024 (default: fits)")

    shards.add_flags(commands.add_parser("shards", help="pack images and captions into WebDataset shards"))

    embed = command(
        "embed", _embed, "fill the cache of text embeddings, on all processes of a launcher; rerun to resume"
    )
    what = embed.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="read the cache in full and compare its checksums instead")
    what.add_argument("--dry-run", action="store_true", help="print the size and an estimate of the time instead")
    _config_flags(embed)

    index = command(
        "index", _index, "write the manifests of the shards, on all processes of a launcher; rerun to resume"
    )
    index.add_argument(
        "--check", action="store_true", help="read the shards in full and compare them with their manifests instead"
    )
    _config_flags(index)

    add_flags(command("train", train, "train the stages of a cascade; rerun to resume"))

    distill.add_flags(
        command(
            "distill",
            distill.distill,
            "train a few-step student of a trained model; rerun to resume",
        )
    )

    supervise.add_flags(
        command("supervise", supervise.supervise, "run a launcher of training; restart it if processes are lost")
    )

    plot = command("plot", _plot, "draw the curves of a run")
    plot.add_argument("run", type=Path, help="run directory, as training writes it")
    plot.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png in the run directory")

    export = command("export", _export, "convert a run directory into a model directory")
    export.add_argument("--run", type=Path, required=True, help="run directory, as training writes it")
    export.add_argument("--out", type=Path, required=True, help="new model directory")
    export.add_argument(
        "--step",
        default="newest",
        metavar="N|best|newest",
        help="the checkpoint: of a step, with the smallest validation loss, or the newest (default); base=500,sr=best "
        "chooses by stage",
    )
    export.add_argument(
        "--ema",
        metavar="LENGTH",
        help="average of this length, as a share of the training (0.05), in place of that of train.ema.decay; "
        "base=0.05,sr=0.1 chooses by stage",
    )
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: %(default)s)"
    )
    export.add_argument(
        "--adapters",
        action="store_true",
        help="only what train.stages.NAME.lora has trained: OUT/STAGE/pytorch_lora_weights.safetensors, which "
        "diffusers loads for DeepFloyd IF",
    )

    push = command("push", _push, "share a model directory on the Hugging Face hub")
    push.add_argument("--model", type=Path, required=True, help="model directory")
    push.add_argument("--to", required=True, metavar="OWNER/NAME", help="name on the hub; created if it does not exist")
    push.add_argument("--private", action="store_true", help="only for those who are allowed to see it")
    push.add_argument("--revision", help="branch to upload to (default: the main one)")

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

    evaluate = command("evaluate", _evaluate, "read the attributes in the captions back from sampled images")
    evaluate.add_argument("--data", choices=["shapes"], default="shapes", help="test captions; default: %(default)s")
    evaluate.add_argument("--count", type=int, default=200, help="captions of each test split (default: %(default)s)")
    evaluate.add_argument("--out", type=Path, help="new folder for report.json and a grid of images per split")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    _model_flags(evaluate, batches=True)
    _sampling_flags(evaluate)

    minimagen = command(
        "import-minimagen", _import_minimagen, "convert a MinImagen training directory into a model directory"
    )
    minimagen.add_argument("source", type=Path, help="training directory of MinImagen, or its folder parameters")
    minimagen.add_argument(
        "--out", type=Path, required=True, help="new model directory; or a new .json, a configuration without weights"
    )

    diffusers = command("import-diffusers", _import_diffusers, "convert DeepFloyd IF from diffusers' format")
    diffusers.add_argument("source", type=Path, nargs="+", help="folder of an IFPipeline or IFSuperResolutionPipeline")
    diffusers.add_argument("--out", type=Path, required=True, help="new model directory")
    diffusers.add_argument(
        "--text-encoder", metavar="NAME", help="T5 to refer to, a name on the hub or a folder, instead of copying one"
    )
    to_diffusers = command("export-diffusers", _export_diffusers, "convert DeepFloyd IF into diffusers' format")
    to_diffusers.add_argument("model", type=Path, help="model directory with stages of DeepFloyd IF")
    to_diffusers.add_argument("--out", type=Path, required=True, help="new folder, with a folder for each stage")

    info = command(
        "info", _info, "print versions, devices and active kernels for a bug report; with --data what a run will see"
    )
    info.add_argument(
        "--data",
        metavar="CONFIG|SHARDS",
        help="ds.json, or a folder of shards: print counts, sizes, aspect ratios and caption lengths instead, and draw "
        "the first training images as the network gets them, with their captions",
    )
    info.add_argument(
        "--out", type=Path, metavar="PNG", default=Path("data.png"), help="the images (default: data-STAGE.png)"
    )
    return top


def _config_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help="ds.json")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the file"
    )


def _sample_flags(sample: argparse.ArgumentParser) -> None:
    """Flags without a default here are None if not given, so that --settings can refuse them."""
    source = sample.add_mutually_exclusive_group()
    source.add_argument("--captions", nargs="+", metavar="CAPTION|FILE", help=CAPTIONS_HELP)
    source.add_argument("--embeddings", type=Path, help="precomputed text embeddings (.safetensors)")
    source.add_argument("--settings", type=Path, help="samples.json, also from the web page: reproduce its images")
    sample.add_argument("--out", type=Path, help="new folder (default: samples, or samples-2, ... if that is taken)")
    sample.add_argument(
        "--filetype", choices=["png", "jpg", "webp"], default="png", help="of the images (default: %(default)s)"
    )
    sample.add_argument("--count", type=int, help="images of each caption; without captions, of the model (default: 1)")
    sample.add_argument("--seed", type=int, help="seed of the first image; the next ones count up (default: 0)")
    sample.add_argument("--negative", metavar="CAPTION", help="negative caption: guidance steers away from it")
    sample.add_argument(
        "--image", type=Path, help="init image, cropped to its central square; with --mask, the image to inpaint"
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
    from .sampling.settings import sampling_settings

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
    from .config import CompileMode
    from .sampling.settings import Offload

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
        sub.add_argument("--guide", metavar="MODEL", help="smaller or earlier model that guides (autoguidance)")
        sub.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")


def _quickstart(options: argparse.Namespace) -> int:
    from .commands.quickstart import quickstart

    return quickstart(options)


def _init(options: argparse.Namespace) -> None:
    from .commands.init import init

    init(options)


def _starting_files(options: argparse.Namespace) -> None:
    from .starting_files import copy_all

    for path in copy_all(options.out):
        print(options.out / path)


def _embed(options: argparse.Namespace) -> None:
    from .commands.embed import embed

    embed(options)


def _index(options: argparse.Namespace) -> None:
    from .commands.index import index

    index(options)


def _plot(options: argparse.Namespace) -> None:
    from .commands.plot import plot

    plot(options)


def _export(options: argparse.Namespace) -> None:
    from .train.export import export, export_adapters

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if options.adapters:
        if options.dtype != "float32":
            raise ValueError("--adapters are written in float32: leave out --dtype")
        print(export_adapters(options.run, options.out, step=options.step, ema=options.ema, say=say))
        return
    print(export(options.run, options.out, step=options.step, ema=options.ema, dtype=options.dtype, say=say))


def _push(options: argparse.Namespace) -> None:
    from .sampling.hub import push_model

    print(push_model(options.model, options.to, private=options.private, revision=options.revision))


def _sample(options: argparse.Namespace) -> None:
    from .commands.sample import sample

    sample(options)


def _encode(options: argparse.Namespace) -> None:
    from .commands.sample import encode

    encode(options)


def _demo(options: argparse.Namespace) -> None:
    from .commands.sample import demo

    demo(options)


def _evaluate(options: argparse.Namespace) -> None:
    from .commands.sample import evaluate

    evaluate(options)


def _import_minimagen(options: argparse.Namespace) -> None:
    if options.out.suffix == ".json":
        from .interop.minimagen_settings import import_parameters

        print(import_parameters(options.source, options.out))
        return
    from .interop.minimagen import import_minimagen

    print(import_minimagen(options.source, options.out))


def _import_diffusers(options: argparse.Namespace) -> None:
    from .interop.deepfloyd import import_diffusers

    print(import_diffusers(options.source, options.out, text_encoder=options.text_encoder))


def _export_diffusers(options: argparse.Namespace) -> None:
    from .interop.deepfloyd import export_diffusers

    print("\n".join(export_diffusers(options.model, options.out)))


def _info(options: argparse.Namespace) -> None:
    if options.data is not None:
        from .commands.info_data import info_data

        info_data(options.data, options.out)
        return
    from .info import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
