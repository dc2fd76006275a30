"""Fragments: intervals of flattened parameters, and the files that contain their values.

Each rank writes safetensors files. A tensor in them is named QUANTITY/PARAMETER/START and contains the values of one
quantity for the weights START, START + 1, ... of a parameter. Quantities are `weights` (fp32), their averages (`ema`,
`ema_0.05` and `ema_0.10`) and the entries of the optimizer's state (`exp_avg`, `momentum_buffer`, ...). An entry that
is one number for the whole parameter (`step`) is a tensor of shape (). The names say nothing of ranks or ZeRO stages,
so that any number of ranks at any stage reads the intervals that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import first_line


class Fragment(NamedTuple):
    """Weights `start` to `start + length` of a flattened parameter; in a flat tensor they begin at `offset`."""

    parameter: str
    start: int
    length: int
    offset: int


class Request(NamedTuple):
    """Weights of a parameter to read: `values` (n,) gets those from `start` on; () gets a number per parameter."""

    quantity: str
    parameter: str
    start: int
    values: Tensor


def named_fragments(quantity: str, values: Tensor, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
    """The tensors to write for one quantity: views of the flat `values`, or copies of it if it has shape ()."""
    return {
        f"{quantity}/{name}/{start}": values[offset : offset + length] if values.dim() else values.clone()
        for name, start, length, offset in fragments
    }


def requests(quantity: str, values: Tensor, fragments: Iterable[Fragment]) -> list[Request]:
    """The requests that fill the fragments of the flat `values`."""
    return [
        Request(quantity, name, start, values[offset : offset + length]) for name, start, length, offset in fragments
    ]


def quantities(files: Iterable[Path]) -> dict[str, dict[str, bool]]:
    """{parameter: {quantity: whether it is one number for the whole parameter}} in the files."""
    found: dict[str, dict[str, bool]] = {}
    for path in files:
        for quantity, parameter, _, values in _stored(path):
            found.setdefault(parameter, {})[quantity] = not values.get_shape()
    return found


@torch.no_grad()
def read(files: Iterable[Path], wanted: list[Request]) -> None:
    """Fill the requests, whatever their device and dtype, in one pass over the files.

    Raises ValueError if a file is not one of a checkpoint, or if the files together do not contain a whole request.
    """
    by_name: dict[tuple[str, str], list[Request]] = {}
    for request in wanted:
        by_name.setdefault((request.quantity, request.parameter), []).append(request)
    missing = {id(request): request.values.numel() for request in wanted}
    for path in files:
        for quantity, parameter, start, stored in _stored(path):
            for request in by_name.get((quantity, parameter), ()):
                missing[id(request)] -= _copy(stored, start, request)
    for request in wanted:
        if missing[id(request)] > 0:
            raise ValueError(
                f"the checkpoint lacks {missing[id(request)]} values of {request.quantity} of {request.parameter}"
            )


def read_parameters(files: Iterable[Path], quantity: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Whole parameters by name in fp32, on the CPU. Raises ValueError as `read` does."""
    flat = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    read(files, [Request(quantity, name, 0, values) for name, values in flat.items()])
    return {name: flat[name].view(shapes[name]) for name in shapes}


def _stored(path: Path) -> Iterator[tuple[str, str, int, Any]]:
    """(quantity, parameter, start, slice) of every tensor in a file. Raises ValueError that names the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                quantity, parameter, start = key.split("/")
                yield quantity, parameter, int(start), file.get_slice(key)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None


def _copy(stored: Any, start: int, request: Request) -> int:
    """Copy what a stored tensor has of a request; returns the number of values."""
    shape = stored.get_shape()
    if not shape:
        request.values.copy_(stored[...])
        return 1
    first = max(start, request.start)
    last = min(start + shape[0], request.start + len(request.values))
    if first >= last:
        return 0
    request.values[first - request.start : last - request.start] = stored[first - start : last - start]
    return last - first
