"""The optimizer and the scheduler of ds.json: which class gets which parameters, tried on one weight."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn, optim

from ..config_file import hint
from .deepspeed_keys import MISSING, check_type, require_known

ADAM_PARAMS = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True, "foreach": None}
"""Of DeepSpeed 0.19.8's Adam, beside those of the class that it chooses."""
MUON_PARAMS = {"muon_lr": 1e-3, "adam_lr": 1e-3, "fused": None, **ADAM_PARAMS}
"""Of its Muon, beside those of its two halves."""

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Packages of the monitors."""


def check_optimizer(resolved: dict[str, Any]) -> None:
    """Raise ValueError, with one line, for an optimizer or scheduler that DeepSpeed would not take.

    resolved: what `resolve_deepspeed` returns. Parameters that the classes of PyTorch check are tried there.
    """
    tried = _check_optimizer(resolved)
    if "scheduler" in resolved:
        _check_scheduler(resolved["scheduler"], tried)


def check_packages(resolved: dict[str, Any]) -> None:
    """Raise ValueError with the command that installs what a monitor of the configuration needs."""
    for section, package in MONITORS.items():
        if resolved.get(section, {}).get("enabled") and find_spec(package) is None:
            raise ValueError(f"DeepSpeed key {section}.enabled needs {package}: pip install {package}")


def offload_device(resolved: dict[str, Any]) -> str:
    """Where the optimizer's state is: "none" is beside the weights."""
    offload = resolved.get("zero_optimization", {}).get("offload_optimizer")
    return offload.get("device", "none") if isinstance(offload, dict) else "none"


def _check_optimizer(resolved: dict[str, Any]) -> optim.Optimizer:
    """An optimizer for the trial of the scheduler: the one of the configuration, if it is PyTorch's."""
    name, params = resolved["optimizer"]["type"], resolved["optimizer"].get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"DeepSpeed key optimizer.params must be an object, got {params!r}")
    chosen, known = _class_and_params(name, resolved)
    require_known(params, known, "optimizer.params.")
    for key, value in params.items():
        if value is not None:
            check_type(f"optimizer.params.{key}", value, known[key])
    betas = params.get("betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == 2 and all(map(_is_number, betas))):
        raise ValueError(f"DeepSpeed key optimizer.params.betas must be two numbers, got {betas!r}")
    _check_zero_knows(chosen, resolved)
    return _try_optimizer(name, chosen, params)


def _class_and_params(name: str, resolved: dict[str, Any]) -> tuple[type | None, dict[str, Any]]:
    """The class that DeepSpeed makes the optimizer from (None is Muon's), and its parameters with their defaults."""
    from deepspeed import ops
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.engine import DeepSpeedEngine

    offloaded = offload_device(resolved) != "none"
    lower = name.lower()
    torch_optimizers = [key for key, value in vars(optim).items() if isinstance(value, type) and key != "Optimizer"]
    if lower not in DEEPSPEED_OPTIMIZERS and name not in torch_optimizers:
        raise ValueError(
            f'unknown DeepSpeed optimizer.type "{name}"; '
            f"{hint(name, [*DEEPSPEED_OPTIMIZERS, *torch_optimizers], 'valid types')}"
        )
    if lower == "muon":
        halves = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS}
        numbers = dict.fromkeys(halves - {"betas", "ns_method"}, 0.0)
        return None, {"betas": None, "ns_method": None, **numbers, **MUON_PARAMS}
    params = resolved["optimizer"].get("params", {})
    if lower in ("adam", "adamw"):
        as_adamw = lower == "adamw" or params.get("adam_w_mode", True)
        if params.get("torch_adam"):
            chosen: type = optim.AdamW if as_adamw else optim.Adam
        else:
            chosen = ops.adam.DeepSpeedCPUAdam if offloaded else ops.adam.FusedAdam
        return chosen, {**_parameters(chosen), **ADAM_PARAMS}
    if lower == "adagrad":
        chosen = ops.adagrad.DeepSpeedCPUAdagrad if offloaded else optim.Adagrad
    elif lower == "lion":
        chosen = ops.lion.DeepSpeedCPULion if offloaded else ops.lion.FusedLion
    elif lower == "lamb":
        chosen = ops.lamb.FusedLamb
    else:
        chosen = getattr(optim, name)
    return chosen, _parameters(chosen)


def _parameters(chosen: type) -> dict[str, Any]:
    """The parameters of a class with their defaults, without the weights."""
    signature = list(inspect.signature(chosen).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in signature}


def _check_zero_knows(chosen: type | None, resolved: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    tested = chosen is None or chosen in ZERO_SUPPORTED_OPTIMIZERS
    if not tested and not resolved.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f'DeepSpeed has not tested optimizer.type "{resolved["optimizer"]["type"]}" with ZeRO: use "AdamW" or '
            f'"Muon", or set "zero_allow_untested_optimizer": true'
        )
    if resolved["optimizer"]["type"] in ("LBFGS", "SparseAdam"):
        raise ValueError(
            f'optimizer.type "{resolved["optimizer"]["type"]}" does not fit: LBFGS evaluates the loss several times a '
            f"step, and SparseAdam takes sparse gradients only"
        )


def _try_optimizer(name: str, chosen: type | None, params: dict[str, Any]) -> optim.Optimizer:
    """The optimizer of one weight, two groups of it for Muon, if it is PyTorch's; else AdamW."""
    if name.lower() == "muon":
        return optim.AdamW([{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(2)])
    weights = [nn.Parameter(torch.zeros(2, 2))]
    if chosen is None or not chosen.__module__.startswith("torch."):
        return optim.AdamW(weights)
    own = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode", "fused")}
    own.pop("fp32_optimizer_states", None)
    try:
        return chosen(weights, **own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"DeepSpeed key optimizer.params: {error}") from None


def _check_scheduler(scheduler: dict[str, Any], optimizer: optim.Optimizer) -> None:
    from deepspeed.runtime import lr_schedules

    name, params = scheduler.get("type"), scheduler.get("params", {})
    if not isinstance(name, str) or name not in lr_schedules.VALID_LR_SCHEDULES:
        valid = hint(str(name), lr_schedules.VALID_LR_SCHEDULES, "valid types")
        raise ValueError(f'unknown DeepSpeed scheduler.type "{name}"; {valid}')
    if not isinstance(params, dict):
        raise ValueError(f"DeepSpeed key scheduler.params must be an object, got {params!r}")
    chosen = getattr(lr_schedules, name)
    known = _parameters(chosen)
    require_known(params, known, "scheduler.params.")
    for key, value in params.items():
        if value is not None and not isinstance(value, list):  # a list has a value for each group
            check_type(f"scheduler.params.{key}", value, known[key] if known[key] is not None else 0.0)
    missing = [key for key, default in known.items() if default is MISSING and key not in params]
    if missing:
        raise ValueError(f"DeepSpeed scheduler.type {name} needs scheduler.params.{missing[0]}")
    try:
        chosen(optimizer, **{"last_batch_iteration": 0, **params})  # from -1 it warns that it has not started
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"DeepSpeed key scheduler.params: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
