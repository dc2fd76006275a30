"""Who computes the fused ops: plain PyTorch, our Triton kernels, or xFormers (attention alone)."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "torch", "xformers")
_requested = "auto"


def set_backend(name: str) -> None:
    """Choose who computes the fused ops, in this process from now on.

    "auto" takes the Triton kernels for CUDA tensors, and plain PyTorch for what they cannot do, saying so once;
    "triton" takes them always: on CPU tensors in Triton's interpreter, which TRITON_INTERPRET=1 must have chosen
    before the start; "torch" never does; "xformers" computes attention with xFormers and the rest as "auto".
    Raises ValueError for another name and for what cannot run here, with the reason.
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
    """What `set_backend` was told last; "auto" from the start."""
    return _requested


def use_triton(op: str, tensor: Tensor, unsupported: str | None = None, slower: str | None = None) -> bool:
    """Whether the Triton kernels compute this call of `op` on `tensor`'s device.

    `unsupported` says why they cannot take these arguments, `slower` why "auto" should not. Raises ValueError where
    "triton" was asked for and cannot.
    """
    if _requested == "torch":
        return False
    if _requested == "triton":
        reason = unsupported or (None if tensor.is_cuda or interpreting() else no_triton_on_cpu())
        if reason:
            raise ValueError(f'{op} with backend "triton": {reason}')
        return True
    if not tensor.is_cuda:
        return False
    reason = no_triton() or unsupported or slower
    if reason:
        announce_once(f"{op} runs in plain PyTorch: {reason}")
    return reason is None


def in_kernels(tensor: Tensor) -> bool:
    """Whether an operator that was called runs the kernels on `tensor`: on a GPU, or in the interpreter."""
    return tensor.is_cuda or (_requested == "triton" and interpreting())


def _constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call `function` while it traces, and keep the answer.

    As torch.compiler.assume_constant_result, which would import the compiler with this module.
    """
    function._dynamo_marked_constant = True
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
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant_in_graphs
def no_triton() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _no_triton()


@cache
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install fastimagen[kernels])"
    if find_spec("fastimagen_kernels") is None:
        return "the kernels of fastimagen are not installed"
    if not torch.cuda.is_available() and not interpreting():
        return no_triton_on_cpu()
    return None


def no_triton_on_cpu() -> str:
    return "there is no GPU; TRITON_INTERPRET=1 in the environment runs the kernels in Triton's interpreter, slowly"


@_constant_in_graphs
def no_xformers() -> str | None:
    """Why xFormers cannot compute attention in this process, or None."""
    return _no_xformers()


@cache
def _no_xformers() -> str | None:
    if find_spec("xformers") is None:
        return "xformers is not installed (pip install fastimagen[xformers])"
    if not torch.cuda.is_available():
        return "xformers needs a GPU"
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch, or another CUDA
        first_line = str(error).partition("\n")[0]
        return f"xformers cannot be imported: {first_line}"
    return None
