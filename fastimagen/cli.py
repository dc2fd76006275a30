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
from typing import Any

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for a program that SIGPIPE ended
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
    from .commands import distill, sampling_flags, shards, supervise
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
    quickstart.add_argument("--config", default="ds.json", help="file in that folder (default: %(default)s)")
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

    sampling_flags.add_commands(command)

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
