"""The DeepSpeed configuration of a stage: what is decided here, and a notice for each decision."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from .deepspeed_auto import resolve_autos
from .deepspeed_keys import check_as_a_whole, check_keys, check_values
from .deepspeed_optimizer import check_optimizer, check_packages, offload_device
from .deepspeed_refused import refuse

REDUCE_BUCKET_SIZE = 50_000_000
"""Gradients that processes reduce at once: 100 MB in bf16. Sending them takes milliseconds, far longer than a
collective's latency, and a backward pass of the large U-Nets has dozens of buckets to overlap with. DeepSpeed's 500
million allocate 1 GB in bf16, twice with overlap_comm, and leave these U-Nets 1 to 5 buckets. A larger weight is
reduced alone."""

AUTO_MICRO_BATCH_SIZE = 8
"""Of a file that leaves all sizes to "auto": Hugging Face's default."""


def resolve_deepspeed(
    base: dict[str, Any],
    override: dict[str, Any],
    *,
    steps: int,
    world_size: int,
    cuda: bool,
    tensorboard: str,
    job_name: str,
) -> tuple[dict[str, Any], list[str]]:
    """The configuration that DeepSpeed gets, and one line for everything that was decided here.

    `override` (the stage's keys) is merged over `base`; every "auto" is resolved or refused; no ZeRO stage means 1.
    Without CUDA the run is fp32. What only speed and precision depend on is set where neither `base` nor `override`
    sets it. Raises ValueError, in one line that names the key, for what DeepSpeed would refuse or ignore.
    """
    resolved = _merge(copy.deepcopy(base), override)
    notices = refuse(resolved)
    check_keys(resolved)
    if not isinstance(resolved.get("optimizer", {}).get("type"), str):
        raise ValueError('the DeepSpeed key "optimizer" needs a type, e.g. {"type": "AdamW", "params": {"lr": 1e-4}}')
    resolve_autos(resolved, steps=steps, cuda=cuda, notices=notices)
    _resolve_batch(resolved, world_size, notices)
    check_values(resolved)
    _resolve_zero_stage(resolved, notices)
    _resolve_precision(resolved, cuda, notices)
    _resolve_clipping(resolved, notices)
    _resolve_adam(resolved, cuda, notices)
    _resolve_accumulation_dtype(resolved, notices)
    _resolve_reduce_scatter(resolved, notices)
    if cuda:
        _resolve_communication(resolved, world_size, notices)
    else:
        _refuse_without_cuda(resolved)
    board = resolved.get("tensorboard", {})
    if board.get("enabled"):
        board.setdefault("output_path", tensorboard)
        board.setdefault("job_name", job_name)
    resolved.setdefault("steps_per_print", 10**9)  # the trainer prints its own line
    check_as_a_whole(resolved)
    check_optimizer(resolved)
    check_packages(resolved)
    return resolved, notices


def _resolve_zero_stage(resolved: dict[str, Any], notices: list[str]) -> None:
    zero = resolved.setdefault("zero_optimization", {})
    if "stage" not in zero:
        zero["stage"] = 1
        notices.append("zero_optimization.stage: 1 (not given)")


def _resolve_precision(resolved: dict[str, Any], cuda: bool, notices: list[str]) -> None:
    on = [name for name in ("bf16", "fp16", "torch_autocast") if resolved.get(name, {}).get("enabled")]
    if len(on) > 1:
        raise ValueError(
            f"DeepSpeed keys {' and '.join(f'{name}.enabled' for name in on)} are both true: switch one off"
        )
    for name in on:
        if not cuda:
            resolved[name]["enabled"] = False
            notices.append(f"{name}.enabled: false (no CUDA: the run is fp32)")


def can_compile_fused_adam() -> bool:
    """Whether DeepSpeed can compile its FusedAdam for CUDA here (nvcc of torch's CUDA version), or has it compiled."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import (
        CUDAMismatchException,
        MissingCUDAException,
        assert_no_cuda_mismatch,
    )

    if installed_ops.get("fused_adam"):
        return True
    if torch.version.cuda is None:
        return False
    try:
        return assert_no_cuda_mismatch("fused_adam")
    except (CUDAMismatchException, MissingCUDAException):
        return False


def _resolve_adam(resolved: dict[str, Any], cuda: bool, notices: list[str]) -> None:
    """torch's Adam where DeepSpeed's FusedAdam cannot run: without CUDA, or where it cannot be compiled.

    DeepSpeed's Muon passes "fused" on to no Adam: torch then takes its multi-tensor implementation, for the vectors
    that Muon leaves to Adam.
    """
    name = resolved["optimizer"]["type"].lower()
    if name not in ("adam", "adamw", "muon"):
        return
    params = resolved["optimizer"].setdefault("params", {})
    if params.get("torch_adam"):
        return
    if cuda and ("torch_adam" in params or offload_device(resolved) != "none" or can_compile_fused_adam()):
        return
    reason = "no nvcc of torch's CUDA version to compile DeepSpeed's FusedAdam" if cuda else "no CUDA"
    params["torch_adam"] = True
    notices.append(f"optimizer.params.torch_adam: true ({reason})")
    if name == "muon":
        return
    if cuda and "foreach" not in params and "fused" not in params:
        params["fused"] = True
        notices.append("optimizer.params.fused: true (one kernel updates all weights)")
    if "weight_decay" not in params:
        params["weight_decay"] = 0.0
        notices.append("optimizer.params.weight_decay: 0.0 (DeepSpeed's default; that of torch is 0.01)")


def _resolve_accumulation_dtype(resolved: dict[str, Any], notices: list[str]) -> None:
    """bf16 gradients of several micro-batches are added in fp32: a bf16 sum loses what is below 1/256 of it."""
    accumulation_steps = resolved["gradient_accumulation_steps"]
    if not resolved.get("bf16", {}).get("enabled") or accumulation_steps == 1:
        return
    data_types = resolved.setdefault("data_types", {})
    if "grad_accum_dtype" not in data_types:
        data_types["grad_accum_dtype"] = "fp32"
        notices.append(f"data_types.grad_accum_dtype: fp32 (adds {accumulation_steps} bf16 gradients per step)")


def _accumulates_bf16_in_fp32(resolved: dict[str, Any]) -> bool:
    dtype = resolved.get("data_types", {}).get("grad_accum_dtype")
    return bool(resolved.get("bf16", {}).get("enabled")) and dtype in ("fp32", "float32", "float", "torch.float32")


def _resolve_reduce_scatter(resolved: dict[str, Any], notices: list[str]) -> None:
    """DeepSpeed refuses Muon with ZeRO 3 as long as reduce_scatter has its default."""
    zero = resolved["zero_optimization"]
    if zero["stage"] != 3 or resolved["optimizer"]["type"].lower() != "muon":
        return
    if zero.get("reduce_scatter"):
        raise ValueError("zero_optimization.reduce_scatter true does not work with Muon and ZeRO 3: remove it")
    if "reduce_scatter" not in zero:
        zero["reduce_scatter"] = False
        notices.append("zero_optimization.reduce_scatter: false (Muon with ZeRO 3 requires it)")


def _resolve_communication(resolved: dict[str, Any], world_size: int, notices: list[str]) -> None:
    """How processes reduce gradients. DeepSpeed's own defaults already gather and reduce in contiguous buffers."""
    zero = resolved["zero_optimization"]
    if zero["stage"] == 1 and _accumulates_bf16_in_fp32(resolved) and offload_device(resolved) == "none":
        return  # DeepSpeed's BF16_Optimizer reduces the sum once per step, and reads none of these keys
    if "reduce_bucket_size" not in zero:
        zero["reduce_bucket_size"] = REDUCE_BUCKET_SIZE
        notices.append(f"zero_optimization.reduce_bucket_size: {REDUCE_BUCKET_SIZE} (DeepSpeed's: 500000000)")
    if zero["stage"] in (1, 2) and world_size > 1 and zero.get("overlap_comm") is None:
        zero["overlap_comm"] = True
        notices.append("zero_optimization.overlap_comm: true (reduces gradients during the backward pass)")


def _refuse_without_cuda(resolved: dict[str, Any]) -> None:
    """What DeepSpeed has for GPUs only."""
    zero, name = resolved["zero_optimization"], resolved["optimizer"]["type"]
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key):
            raise ValueError(f"zero_optimization.{key} needs CUDA: remove it")
    if name.lower() == "lamb" or (name.lower() == "lion" and offload_device(resolved) == "none"):
        raise ValueError(f'optimizer.type "{name}" needs CUDA: use "AdamW" or "Muon"')


def _resolve_clipping(resolved: dict[str, Any], notices: list[str]) -> None:
    """DeepSpeed clips to a norm of 1 where nothing is said, and clips what Muon has already made orthogonal."""
    muon = resolved["optimizer"]["type"].lower() == "muon"
    if muon and resolved.get("gradient_clipping"):
        raise ValueError(
            "gradient_clipping with Muon would shrink its orthogonal updates, whatever the gradients: leave it out"
        )
    if "gradient_clipping" not in resolved:
        resolved["gradient_clipping"] = 0.0 if muon else 1.0
        notices.append(f"gradient_clipping: {resolved['gradient_clipping']} ({'Muon' if muon else 'not given'})")


def total_batch_size(base: dict[str, Any], override: dict[str, Any], world_size: int) -> int:
    """The images of an optimizer step on all processes, as `resolve_deepspeed` resolves it."""
    resolved = _merge(copy.deepcopy(base), override)
    _resolve_batch(resolved, world_size, [])
    return resolved["train_batch_size"]


def _resolve_batch(resolved: dict[str, Any], world_size: int, notices: list[str]) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes."""
    total, micro, accumulation = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    given = {key: resolved.get(key) for key in (total, micro, accumulation)}
    known = {key: value for key, value in given.items() if value not in (None, "auto")}
    for key, value in known.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} must be a positive whole number, got {value!r}")
    if total not in known and micro not in known:
        if "auto" not in (given[total], given[micro]):
            raise ValueError(f"give {total} or {micro}")
        known[micro] = AUTO_MICRO_BATCH_SIZE
    if micro not in known or total not in known:
        known.setdefault(accumulation, 1)
    factors = [f"{key} {known[key]}" for key in (micro, accumulation) if key in known] + [f"{world_size} processes"]
    product = math.prod(known.get(key, 1) for key in (micro, accumulation)) * world_size
    known.setdefault(total, product)
    if known[total] % product or (len(factors) == 3 and known[total] != product):
        relation = "" if len(factors) == 3 else "a multiple of "
        raise ValueError(
            f"{total} {known[total]} is not {relation}{' x '.join(factors)} = {product}: change one of these numbers"
        )
    for key in (micro, accumulation):
        known.setdefault(key, known[total] // product)
    notices += [
        f"{key}: {known[key]}" + (" (was auto)" if given[key] == "auto" else " (not given)")
        for key in known
        if known[key] != given[key]
    ]
    resolved.update(known)


def json_like(value: Any) -> str:
    """A value as it would stand in the JSON file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    for key, value in override.items():
        sections = isinstance(value, dict) and isinstance(base.get(key, {}), dict)
        base[key] = _merge(base.get(key, {}), value) if sections else copy.deepcopy(value)
    return base
