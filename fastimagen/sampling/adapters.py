"""Low-rank adapters put on a model as it is loaded: their files, and the weights with them.

A file holds the adapters of one stage under PEFT's names, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, with "unet."
before them or not, as `fastimagen export --adapters` and diffusers write them. networks/lora.py has the formula.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..cascade import Cascade
from ..files import read_safetensors
from ..networks.lora import DOWN, UP, merge

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder with adapters."""
PREFIX = "unet."
"""Of names in that file: diffusers' pipelines may have adapters of their text encoder too."""
SPELLINGS = {".lora.down.weight": DOWN, ".lora.up.weight": UP}
"""What diffusers' training scripts call some layers' matrices."""
METADATA = "lora_adapter_metadata"
"""Under which diffusers stores PEFT's settings in a file."""
Weights = Mapping[str, Mapping[str, Tensor]]
"""Weights by stage and parameter name."""


def parse_adapters(arguments: Sequence[str]) -> dict[str, float]:
    """{path: scale} of `PATH` or `PATH:SCALE`; the scale is 1 if none is given. Raises ValueError that names --lora."""
    scales: dict[str, float] = {}
    for argument in arguments:
        path, scale = argument, 1.0
        before, colon, number = argument.rpartition(":")
        if colon and not Path(argument).exists():
            path = before
            try:
                scale = float(number)
            except ValueError:
                raise ValueError(f"--lora {argument}: {number!r} is not a number; give PATH or PATH:SCALE") from None
        if path in scales:
            raise ValueError(f"--lora {path} is given twice: give it once, with the sum of the scales")
        scales[path] = scale
    return scales


def with_adapters(cascade: Cascade, weights: Weights, lora: Mapping[str, float]) -> Weights:
    """The weights of a cascade with adapters: W + scale (alpha / rank) B A, in fp32, for the layers that have some.

    cascade: its networks alone are read. lora: scales by path, of a file or of a folder (see `adapter_files`). Raises
    ValueError with one line that names the file for adapters that do not fit.
    """
    found = dict(weights)
    for path, scale in lora.items():
        if not math.isfinite(scale):
            raise ValueError(f"--lora {path}: its scale is {scale}, but must be a finite number")
        for stage, file in adapter_files(Path(path), cascade):
            adapters, factor = read_adapters(file)
            name = _stage_of(file, adapters, cascade) if stage is None else stage
            if problem := _misfit(adapters, cascade.unets[name]):
                raise ValueError(f"{file} does not fit stage {name}: {problem}")
            found[name] = merge(found[name], adapters, scale * factor)
    return found


def adapter_files(path: Path, cascade: Cascade) -> list[tuple[str | None, Path]]:
    """(stage, file) of what a path names: a file, a folder with ADAPTER_FILE, or one with STAGE/ADAPTER_FILE.

    The stage is None where the path does not say it. Raises ValueError if there are no adapters, or some of a stage
    that the cascade does not have.
    """
    if path.is_file():
        return [(None, path)]
    if (path / ADAPTER_FILE).is_file():
        return [(None, path / ADAPTER_FILE)]
    files = sorted(path.glob(f"*/{ADAPTER_FILE}"))
    if not files:
        what = f"has neither {ADAPTER_FILE} nor STAGE/{ADAPTER_FILE}" if path.is_dir() else "does not exist"
        raise ValueError(f"--lora: {path} {what}; `fastimagen export --adapters` writes such folders")
    for file in files:
        if file.parent.name not in cascade.unets:
            raise ValueError(
                f"{file} is of stage {file.parent.name}, but the model has {', '.join(cascade.unets)}: rename the "
                f"folder, or give the other files one by one"
            )
    return [(file.parent.name, file) for file in files]


def read_adapters(file: Path) -> tuple[dict[str, Tensor], float]:
    """The adapters of a file, as networks/lora.py names them, and the factor alpha / rank that its metadata has.

    Raises ValueError for a file that cannot be read, names that are not those of adapters, half an adapter, an A and a
    B of different ranks, and settings of PEFT that change what adapters compute.
    """
    adapters = {}
    for key, tensor in read_safetensors(file).items():
        name = key.removeprefix(PREFIX)
        for theirs, ours in SPELLINGS.items():
            name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
        if not name.endswith((DOWN, UP)) or tensor.dim() != 2:
            raise ValueError(
                f"{file}: {key} with shape {tuple(tensor.shape)} is not the adapter of a linear layer: LAYER{DOWN} "
                f"and LAYER{UP} are read, with two dimensions"
            )
        adapters[name] = tensor
    if not adapters:
        raise ValueError(f"{file} holds no adapters")
    for name, tensor in adapters.items():
        layer = name.removesuffix(DOWN).removesuffix(UP)
        if missing := {layer + DOWN, layer + UP} - adapters.keys():
            raise ValueError(f"{file}: {name} is there, but not {missing.pop()}")
        if name.endswith(DOWN) and len(tensor) != adapters[layer + UP].shape[1]:
            ranks = f"{len(tensor)}, and {layer + UP} {adapters[layer + UP].shape[1]}"
            raise ValueError(f"{file}: {name} has rank {ranks}")
    return adapters, _factor(file)


def _factor(file: Path) -> float:
    """alpha / rank in the metadata that diffusers writes; 1 without, as then alpha is the rank."""
    with safe_open(file, framework="pt") as opened:
        stored = (opened.metadata() or {}).get(METADATA)
    if stored is None:
        return 1.0
    try:
        settings: dict[str, Any] = {key.removeprefix(PREFIX): value for key, value in json.loads(stored).items()}
        rank, alpha = settings["r"], settings["lora_alpha"]
        factor = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError):
        raise ValueError(f'{file}: its metadata "{METADATA}" does not have r and lora_alpha') from None
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"):
        if settings.get(key):
            raise ValueError(f"{file} was trained with PEFT's {key}, which is not read")
    return factor


def _stage_of(file: Path, adapters: Mapping[str, Tensor], cascade: Cascade) -> str:
    """The only stage that adapters fit. Raises ValueError if there is none, or more than one."""
    misfits = {name: _misfit(adapters, unet) for name, unet in cascade.unets.items()}
    fitting = [name for name, misfit in misfits.items() if misfit is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{file} fits the stages {', '.join(fitting)}: put it into a folder as STAGE/{ADAPTER_FILE}, and give that "
            f"folder"
        )
    reasons = "; ".join(f"{name}: {misfit}" for name, misfit in misfits.items())
    raise ValueError(f"{file} fits no stage of the model ({reasons})")


def _misfit(adapters: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Why adapters do not fit a network; None if they do."""
    linear = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    for name, down in adapters.items():
        if not name.endswith(DOWN):
            continue
        layer = name.removesuffix(DOWN)
        if layer not in linear:
            return f"it has no linear layer {layer}"
        own, theirs = (
            (linear[layer].in_features, linear[layer].out_features),
            (down.shape[1], len(adapters[layer + UP])),
        )
        if own != theirs:
            return f"{layer} has {own[0]} inputs and {own[1]} outputs, its adapter {theirs[0]} and {theirs[1]}"
    return None
