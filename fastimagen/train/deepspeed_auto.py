"""What "auto" in the DeepSpeed part of ds.json means. docs/training.md has the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from .deepspeed_keys import MISSING, default_of

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
HALVES = ("bf16", "fp16")
ADAM = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}
"""Of Imagen's super-resolution models (Saharia et al. 2022, appendix F)."""

MAX_WARMUP_STEPS = 10_000
"""Imagen's warm-up of 2.5 million steps; shorter runs warm up for a tenth."""


def resolve_autos(resolved: dict[str, Any], *, steps: int, cuda: bool, notices: list[str]) -> None:
    """Replace every "auto" in `resolved` except those of the batch, and add a notice for each.

    A key without an answer of its own gets DeepSpeed's default; where that is "not set", the key is removed. Raises
    ValueError with all keys that have no answer.
    """
    _resolve_precision(resolved, cuda, notices)
    answers = _answers(resolved, steps)
    unresolved = []
    for path, owner, key in list(_autos(resolved, "")):
        if path in BATCH_KEYS or path == "data_types.keep_in_fp32_modules":  # where "auto" is DeepSpeed's own value
            continue
        answer = answers.get(path, default_of(path))
        if answer is MISSING:
            unresolved.append(path)
        elif answer is None:
            del owner[key]
            notices.append(f"{path}: as if it were not given (was auto)")
        else:
            owner[key] = answer
            notices.append(f"{path}: {json.dumps(answer)} (was auto)")
            answers |= _answers(resolved, steps)  # the warm-up ends at the rate of the optimizer
    if unresolved:
        keys, verb, values = ("keys", "are", "values") if len(unresolved) > 1 else ("key", "is", "a value")
        raise ValueError(
            f'DeepSpeed {keys} {", ".join(unresolved)} {verb} "auto", for which there is no rule: give {values}'
        )


def _resolve_precision(resolved: dict[str, Any], cuda: bool, notices: list[str]) -> None:
    """ "auto" in bf16 or fp16 asks for half precision on a GPU: bf16 where the GPU has it, and otherwise fp16."""
    asked = [name for name in HALVES if _section(resolved, name).get("enabled") == "auto"]
    if not asked:
        return
    given = {name: _section(resolved, name).get("enabled") for name in HALVES}
    other_is_on = any(value is True for value in given.values())
    half = "bf16" if given["bf16"] is not False and _gpu_has_bf16() else "fp16"
    if given["fp16"] is False:
        half = "bf16"
    for name in {*asked, half} if cuda and not other_is_on else asked:
        enabled = cuda and not other_is_on and name == half
        resolved.setdefault(name, {})["enabled"] = enabled
        reason = "was auto" if name in asked else "the other was auto"
        notices.append(f"{name}.enabled: {json.dumps(enabled)} ({reason if cuda else 'no CUDA: the run is fp32'})")


def _gpu_has_bf16() -> bool:
    """Of this machine's GPU; True without one, as of every GPU since 2020."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _answers(resolved: dict[str, Any], steps: int) -> dict[str, Any]:
    """The values that are not DeepSpeed's defaults, by path; None removes a key, for whose default a rule exists."""
    optimizer = resolved.get("optimizer", {})
    name = str(optimizer.get("type")).lower()
    params = _section(optimizer, "params")
    answers: dict[str, Any] = {
        "gradient_clipping": None,
        "steps_per_print": None,
        "zero_optimization.stage": None,
        "zero_optimization.reduce_bucket_size": None,
        "optimizer.params.weight_decay": 0.0,
        "scheduler.params.total_num_steps": steps,
        "scheduler.params.warmup_num_steps": max(1, min(MAX_WARMUP_STEPS, steps // 10)),
        "scheduler.params.warmup_min_lr": 0.0,
    }
    if name in ("adam", "adamw"):
        answers |= {f"optimizer.params.{key}": value for key, value in ADAM.items()}
    if name == "muon":
        answers |= {f"optimizer.params.{key}": ADAM[key] for key in ("betas", "eps")}
    if isinstance(params.get("lr"), (int, float)):
        answers["scheduler.params.warmup_max_lr"] = params["lr"]
    return answers


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _autos(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto" or (isinstance(value, list) and "auto" in value):
            yield f"{prefix}{key}", tree, key
