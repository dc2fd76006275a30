"""Which backend computes the fused ops: plain PyTorch, the Triton kernels, or xFormers (attention only)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..extras import install_command

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "torch", "xformers")
_requested = "auto"
_meta_is_gpu = False


def set_backend(name: str) -> None:
    """Choose the backend of the fused ops in this process.

    "auto" uses the Triton kernels for CUDA tensors, and plain PyTorch for calls that they do not support, which is
    logged once. "triton" always uses them; on CPU tensors they run in Triton's interpreter, which needs
    TRITON_INTERPRET=1 in the environment from the start. "torch" uses plain PyTorch. "xformers" computes attention
    with xFormers and everything else as "auto". Raises ValueError for another name, and with the reason for a backend
    that cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f'no backend "{name}"; there are {", ".join(BACKENDS)}')
    if name == "triton" and (reason := no_triton()):
        raise ValueError(f'backend "triton" cannot run: {reason}')
    if name == "xformers" and (reason := no_xformers()):
        raise ValueError(f'backend "xformers" cannot run: {reason}')
    global _requested
    _requested = name


def backend() -> str:
    """The backend that was chosen last; "auto" at the start."""
    return _requested


@contextmanager
def meta_is_gpu() -> Iterator[None]:
    """Inside, the ops treat meta tensors as those of a GPU that runs the kernels: to see what it would allocate."""
    global _meta_is_gpu, _requested
    before = _meta_is_gpu, _requested
    _meta_is_gpu, _requested = True, "auto"
    try:
        yield
    finally:
        _meta_is_gpu, _requested = before


def use_triton(op: str, tensor: Tensor, unsupported: str | None = None, slower: str | None = None) -> bool:
    """Whether the Triton kernels compute this call of `op` on `tensor`'s device.

    `unsupported`: why they cannot take these arguments. `slower`: why "auto" should not use them. Raises ValueError
    if the backend is "triton" and they cannot run.
    """
    if _requested == "torch":
        return False
    if _requested == "triton":
        reason = unsupported or (None if tensor.is_cuda or interpreting() else no_triton_on_cpu())
        if reason:
            raise ValueError(f'{op} with backend "triton": {reason}')
        return True
    if stands_for_gpu(tensor):
        return not (unsupported or slower)
    if not tensor.is_cuda:
        return False
    reason = no_triton() or unsupported or slower
    if reason:
        announce_once(f"{op} runs in plain PyTorch: {reason}")
    return reason is None


def in_kernels(tensor: Tensor) -> bool:
    """Whether a registered operator runs the kernels for `tensor`: on a GPU, or in Triton's interpreter."""
    return tensor.is_cuda or stands_for_gpu(tensor) or (_requested == "triton" and interpreting())


def stands_for_gpu(tensor: Tensor) -> bool:
    """Whether this is a meta tensor inside of `meta_is_gpu`: nothing can be launched for it."""
    return _meta_is_gpu and tensor.is_meta


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes with this tensor; None outside of autocast, and for float64."""
    device = tensor.device.type  # of "meta" autocast knows nothing
    if device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def traced() -> bool:
    """Whether something looks at operators: torch.compile, or a dispatch mode (fake tensors, make_fx, FLOP counters).

    Then a fused op calls its registered operator, and otherwise a torch.autograd.Function with the same formulas: on
    the CPU an operator costs more than all else of the call.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call `function` while tracing and treat the result as a constant.

    The same as torch.compiler.assume_constant_result, which would import the compiler with this module.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile reads it
    return function


@_constant_in_graphs
def announce_once(message: str) -> None:
    """Log a fallback, the first time only."""
    _announce(message)


@cache
def _announce(message: str) -> None:
    logger.warning(message)


@_constant_in_graphs
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant_in_graphs
def no_triton() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _no_triton()


@cache
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return f"triton is not installed ({install_command('kernels')})"
    if find_spec("fastimagen_kernels") is None:
        return "the kernels of fastimagen are not installed"
    if not torch.cuda.is_available() and not interpreting():
        return no_triton_on_cpu()
    return None


def no_triton_on_cpu() -> str:
    """Why the kernels cannot take CPU tensors in this process."""
    return "there is no GPU; TRITON_INTERPRET=1 in the environment runs the kernels in Triton's interpreter, slowly"


@_constant_in_graphs
def no_xformers() -> str | None:
    """Why xFormers cannot compute attention in this process, or None."""
    return _no_xformers()


@cache
def _no_xformers() -> str | None:
    if find_spec("xformers") is None:
        return f"xformers is not installed ({install_command('xformers')})"
    if not torch.cuda.is_available():
        return "xformers needs a GPU"
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch or CUDA version
        first_line = str(error).partition("\n")[0]
        return f"xformers cannot be imported: {first_line}"
    return None
