"""Finds the fastest tiles of the attention kernels on this GPU, and writes them into kernels/attention_tiles.py.

    python -m benchmarks.studies.tune [--seconds 0.05] [--dry-run]

The kernels use the table in the repository; nothing tunes at run time. Keys of the table are the architecture, the
pass, the head width and whether rows are few or many; batches and the lengths of captions never are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from itertools import product

import torch
from triton.errors import TritonError

from ..harness.checkout import ROOT
from ..harness.timing import Work, first_line, time_cuda

SOURCE = ROOT / "kernels/attention_tiles.py"
WIDTHS = (64, 128)
SHAPES = {False: (16, 64), True: (8, 1024)}  # many rows? -> samples and tokens, of 8 heads that share a key head
Grid = Iterable[tuple[int, int, int, int]]
GRID: Grid = tuple(product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))  # rows, keys, warps, stages
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def fastest(grid: Grid, milliseconds: Callable[[tuple[int, ...]], float]) -> tuple[tuple[int, ...], float]:
    """The tile with the shortest time, and the time. Tiles that cannot be launched are named and left out."""
    times: dict[tuple[int, ...], float] = {}
    for tile in grid:
        try:
            times[tile] = milliseconds(tile)
        except (TritonError, RuntimeError) as error:  # too much shared memory, and whatever else a GPU refuses
            print(f"  {tile}: {first_line(error)}", flush=True)
    best = min(times, key=times.__getitem__)
    return best, times[best]


def tune(seconds: float) -> dict[str, dict[int, Pair]]:
    """Pass -> head width -> tiles for few and for many rows, of this GPU in bf16."""
    from fastimagen_kernels.attention_tiles import TILES, Tile

    found: dict[str, dict[int, Pair]] = {}
    target = this_gpu()
    for name, width in product(("forward", "backward_rows", "backward_keys"), WIDTHS):
        tiles = []
        for many, (batch, tokens) in SHAPES.items():
            work = attention_work(name, width, batch, tokens)
            before = TILES.get((target, name))

            def milliseconds(tile: tuple[int, ...], name=name, work=work) -> float:
                TILES[target, name] = {128: (Tile(*tile), Tile(*tile))}
                return time_cuda(work, seconds=seconds).p50

            best, time = fastest(GRID, milliseconds)
            if before is None:
                del TILES[target, name]
            else:
                TILES[target, name] = before
            print(f"{name} D={width} {'many' if many else 'few'} rows: {best} {time:.4f} ms", flush=True)
            tiles.append(best)
        found.setdefault(name, {})[width] = (tiles[0], tiles[1])
    return found


def this_gpu() -> str:
    """The architecture of the current GPU, as the table names it."""
    from fastimagen_kernels.device import architecture

    return architecture(torch.device("cuda", torch.cuda.current_device()))


def attention_work(name: str, width: int, batch: int, tokens: int) -> Work:
    """A forward or backward pass with text and image keys."""
    from fastimagen_kernels.attention import attention_backward, attention_forward

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(batch, tokens, 8, width), *(normal(batch, tokens, 1, width) for _ in range(2))
    context = [normal(batch, 64, 1, width) for _ in range(2)]
    null = torch.randn(2, width, device="cuda")
    inputs = (q, k, v, *null, *context, torch.full((batch,), 40, device="cuda"))
    if name == "forward":
        return Work(lambda _: attention_forward(*inputs, width**-0.5))
    out, lse = attention_forward(*inputs, width**-0.5)
    return Work(lambda _: attention_backward(out, *inputs, out, lse, width**-0.5))


# ---- the table


def rewritten(source: str, target: str, found: dict[str, dict[int, Pair]]) -> str:
    """The source of the table with the tiles of an architecture replaced, or added before those of all others."""
    for name, table in found.items():
        entry = _entry(target, name, table)
        there = re.compile(rf'    \("{target}", "{name}"\): \{{.*?\}},\n', re.DOTALL)
        if there.search(source):
            source = there.sub(lambda _, entry=entry: entry, source, count=1)
        else:
            source = source.replace("    # All others:", entry + "    # All others:", 1)
    return source


def _entry(target: str, name: str, table: dict[int, Pair]) -> str:
    """A line of the table in the layout of ruff format."""
    head = f'    ("{target}", "{name}"): {{'
    rows = [f"{width}: ({', '.join(f'Tile{tile}' for tile in pair)})" for width, pair in sorted(table.items())]
    if len(rows) == 1:
        return f"{head}{rows[0]}}},\n"
    return head + "\n" + "".join(f"        {row},\n" for row in rows) + "    },\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.05, help="for each tile (0.05)")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU to tune for")
    source = rewritten(SOURCE.read_text(), this_gpu(), tune(options.seconds))
    if options.dry_run:
        print(source)
    else:
        SOURCE.write_text(source)
        print(f"wrote {SOURCE.relative_to(ROOT)}; run the tests, and python -m benchmarks.studies.aot")


if __name__ == "__main__":
    main()
