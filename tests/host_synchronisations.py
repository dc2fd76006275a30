"""A stand-in for a GPU: tensors of the meta device, and a record of what would make the host wait for a real one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT

GPU = torch.device("meta")

aten = torch.ops.aten

READERS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.multinomial.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operators of which the host reads a value from the GPU: a number, or the size of their result."""

COPIERS = {aten.copy_.default, aten.cat.default, aten.stack.default, aten.index_put_.default, aten.index_put.default}
"""Operators that copy a scalar tensor of the CPU to the GPU; others take it as an argument of their kernel."""


class Generator(torch.Generator):
    """The meta device has no generator of its own, and its random numbers have no values."""

    device = GPU


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The host synchronisations of the block: what happens, and the line of fastimagen where it happens.

    A number that is read from the GPU is 1, a copy of one of its tensors to the CPU is zeros.
    """
    found: list[str] = []
    import torch._dynamo  # PyTorch may import it in the block, and it would register the patched function

    # PyTorch knows no autocast of the meta device and raises an error.
    without_autocast = patch.object(torch, "is_autocast_enabled", lambda device=None: False)
    with without_autocast, _Operators(found), _Constants(found):
        yield found


class _Operators(TorchDispatchMode):
    """Records operators that read from the GPU, or that have operands on both sides."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there, composite operators arrive in one piece
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device == GPU]
        on_cpu = [tensor for tensor in tensors if tensor.device != GPU]
        if func is aten._to_copy.default and kwargs.get("device", tensors[0].device) != tensors[0].device:
            blocking = "" if kwargs.get("non_blocking") else "blocking "
            self.found.append(f"{blocking}{func} to {kwargs['device']} {_where()}")
            if tensors[0].device == GPU:
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype", tensors[0].dtype))
        elif on_gpu and func in READERS:
            self.found.append(f"{func} {_where()}")
            if func is aten._local_scalar_dense.default:
                return 1
        elif on_gpu and any(tensor.dim() or func in COPIERS for tensor in on_cpu):
            self.found.append(f"{func} of a CPU tensor {_where()}")
        elif on_gpu and func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.found.append(f"{func} with a mask {_where()}")
        return func(*args, **kwargs)


class _Constants(TorchFunctionMode):
    """Records values of Python and NumPy that become tensors on the GPU, which the meta device makes without a copy."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            copies = not isinstance(args[0], Tensor) and torch.device(kwargs.get("device") or "cpu") == GPU
        elif func is Tensor.new_tensor:
            copies = args[0].device == GPU
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            copies = args[0].device == GPU and any(isinstance(part, (list, np.ndarray)) for part in index)
        else:
            copies = False
        if copies:
            self.found.append(f"{func.__name__} of host values {_where()}")
        return func(*args, **kwargs)


def _where() -> str:
    """at FILE:LINE in FUNCTION, of the innermost function of fastimagen, or of a test."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != __file__ and name.startswith((f"{ROOT}/fastimagen/", f"{ROOT}/tests/")):
            return f"at {name.removeprefix(f'{ROOT}/')}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of fastimagen"
