"""`fastimagen shards`: its flags, and what each kind runs. Imports without torch, because `--help` needs the flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.packing.writer import PackOptions


def add_flags(shards: argparse.ArgumentParser) -> None:
    """The kinds of sources, each with its flags."""
    kinds = shards.add_subparsers(required=True, metavar="KIND")

    def kind(name: str, help: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=f"Pack {help} into WebDataset shards.")
        sub.add_argument("--out", type=Path, required=True, help="new folder; rerun the command to resume")
        return sub

    folder = kind("folder", "a folder of images with captions (.txt, .caption, .json, Hugging Face's metadata files)")
    folder.add_argument("source", type=Path, help="folder; its subfolders count too")
    _packing_flags(folder)
    folder.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out this share of the images: writes OUT/train and OUT/val",
    )
    folder.add_argument(
        "--caption-per-line", action="store_true", help="each line of a .txt or .caption file is a caption of its own"
    )
    processes = len(os.sched_getaffinity(0))
    folder.add_argument(
        "--processes", type=int, default=processes, help="that read images (default: %(default)s, one for each CPU)"
    )
    folder.set_defaults(run_command=_folder)

    table = kind("table", "the images that a table lists, as URLs, files or in itself")
    table.add_argument("source", type=Path, help=".csv, .tsv, .jsonl, .parquet, or a Hugging Face data set on disk")
    _packing_flags(table)
    table.add_argument("--image-column", metavar="NAME", help="with URLs, paths or images (default: by its name)")
    table.add_argument("--threads", type=int, default=32, help="downloads at a time (default: %(default)s)")
    table.add_argument(
        "--connections-per-host", type=int, default=4, help="of them, from one host (default: %(default)s)"
    )
    table.set_defaults(run_command=_table)

    shapes = kind("shapes", "the built-in captioned shapes")
    shapes.add_argument("--count", type=int, default=20000, help="training images (default: %(default)s)")
    shapes.add_argument("--size", type=int, default=64, help="height and width in pixels (default: %(default)s)")
    shapes.add_argument("--seed", type=int, default=0, help="seed of the images (default: %(default)s)")
    shapes.set_defaults(run_command=_shapes)


def _packing_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--shard-size", type=int, default=1000, help="samples per tar (default: %(default)s)")
    sub.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="make images smaller whose longer side exceeds this"
    )
    sub.add_argument("--caption-column", metavar="NAME", help="column or JSON key with captions (default: by its name)")
    sub.add_argument(
        "--no-captions", action="store_true", help="pack images alone, for cascades that are not conditioned on text"
    )


def _options(options: argparse.Namespace, processes: int = 1) -> PackOptions:
    from ..data.packing.writer import PackOptions

    return PackOptions(
        shard_size=options.shard_size,
        max_side=options.max_side,
        captions=not options.no_captions,
        processes=processes,
    )


def _folder(options: argparse.Namespace) -> None:
    from ..data.packing.folder import CaptionOptions, pack_folder
    from ..data.packing.rows import is_table

    if is_table(options.source):
        raise ValueError(f"{options.source} is a table: pack it with fastimagen shards table")
    captions = CaptionOptions(column=options.caption_column, per_line=options.caption_per_line)
    packing = _options(options, options.processes)
    print(pack_folder(options.source, options.out, packing, validation=options.validation, captions=captions))


def _table(options: argparse.Namespace) -> None:
    from ..data.packing.download import DownloadOptions
    from ..data.packing.table import pack_table

    report = pack_table(
        options.source,
        options.out,
        _options(options),
        download=DownloadOptions(threads=options.threads, per_host=options.connections_per_host),
        image_column=options.image_column,
        caption_column=options.caption_column,
    )
    print(report)


def _shapes(options: argparse.Namespace) -> None:
    from ..data.shapes import write_shards

    write_shards(options.out, options.count, options.size, options.seed)
    print(f"{options.out}: {options.count} training images of {options.size}x{options.size}, and the test splits")
