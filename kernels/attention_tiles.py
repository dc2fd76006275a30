"""Tile sizes of the attention kernels for each GPU architecture."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import architecture


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, and stages of its load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


FEW_ROWS = 1024  # the first tile of a pair serves up to this many rows per sample and key head, the second more

# (architecture, pass) -> maximum padded head width -> tile for few rows, tile for many rows. Chosen by registers,
# spills and shared memory (benchmarks/results/aot.json) and by what is fast for similar kernels; not yet by time.
TILES: dict[tuple[str, str], dict[int, tuple[Tile, Tile]]] = {
    ("sm_80", "forward"): {
        64: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    },
    ("sm_80", "backward_rows"): {
        64: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        128: (Tile(32, 32, 4, 2), Tile(128, 32, 8, 2)),
    },
    ("sm_80", "backward_keys"): {
        64: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
        128: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    ("sm_90", "forward"): {
        64: (Tile(64, 64, 4, 3), Tile(128, 128, 8, 3)),
        128: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    },
    ("sm_90", "backward_rows"): {
        64: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    },
    ("sm_90", "backward_keys"): {
        64: (Tile(64, 64, 4, 3), Tile(64, 128, 8, 3)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    ("sm_100", "forward"): {
        64: (Tile(128, 64, 4, 3), Tile(128, 64, 4, 3)),
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    },
    ("sm_100", "backward_rows"): {128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2))},
    ("sm_100", "backward_keys"): {
        64: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    ("gfx942", "forward"): {
        64: (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)),
        128: (Tile(64, 32, 4, 1), Tile(128, 32, 4, 1)),
    },
    ("gfx942", "backward_rows"): {
        64: (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        128: (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    },
    ("gfx942", "backward_keys"): {
        64: (Tile(32, 128, 4, 1), Tile(32, 128, 4, 1)),
        128: (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
    },
    # All others: no more shared memory than any GPU has.
    ("other", "forward"): {
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    },
    ("other", "backward_rows"): {
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    ("other", "backward_keys"): {
        64: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    # fp32 products do not use tensor cores; their operands are held in registers.
    ("float32", "forward"): {128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))},
    ("float32", "backward_rows"): {128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))},
    ("float32", "backward_keys"): {128: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))},
    # Small tiles: tests have few rows and keys, and need several tiles of them.
    ("interpreter", "forward"): {128: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))},
    ("interpreter", "backward_rows"): {128: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))},
    ("interpreter", "backward_keys"): {128: (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))},
}


def tile_for(name: str, q: Tensor, rows: int) -> Tile:
    """The tile of the pass `name` for q's head width and `rows` rows per sample and key head."""
    target = architecture(q.device)
    if q.dtype == torch.float32 and target != "interpreter":
        target = "float32"
    table = TILES.get((target, name)) or TILES["other", name]
    width = min(width for width in table if width >= padded(q.shape[-1]))
    return table[width][rows > FEW_ROWS]


def padded(width: int) -> int:
    """A head width padded to a power of two; tl.dot needs at least 16."""
    return max(16, triton.next_power_of_2(width))
