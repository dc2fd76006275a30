"""The state of a DeepSpeed engine, apart from ranks and ZeRO stages: taken out for a checkpoint and put back.

Values per weight (fp32 weights, their averages, the optimizer's moments) are fragments of the parameters. Counters and
the fp16 loss scale are a small JSON object, the same on all ranks.

Hyperparameters (learning rate, betas, weight decay) are not part of the state: those of the configuration act, and the
learning rate is a function of the step (learning_rate.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .ema import EMA
from .flat_weights import FlatWeights
from .fragments import Fragment, Request, quantities, read, requests

WEIGHTS, AVERAGE = "weights", "ema"
SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Quantity(NamedTuple):
    """A value for each weight of a shard, flat, or one for all, of shape (); the fragments that this rank owns."""

    name: str
    values: Tensor
    fragments: list[Fragment]


def take(engine: Any, weights: FlatWeights, ema: EMA) -> list[Quantity]:
    """All values of this rank that a checkpoint contains, in the engine's own memory. No communication.

    Raises ValueError for an optimizer that keeps tensors of an unknown layout.
    """
    taken = []
    for index, shard in enumerate(weights.shards):
        owned = weights.fragments[index]
        taken.append(Quantity(WEIGHTS, shard.detach(), owned))
        taken += [Quantity(name, average[index], owned) for name, average in _averages(ema).items()]
        for name, value in _optimizer_state(engine, index, shard).items():
            if value is None:
                continue
            values = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if not values.dim():
                values = values.double()
            layout = _whole_parameters(engine, name, index)
            if layout:  # other ranks have the rest
                starts = {part.parameter: part.offset for part in layout}
                fragments = [part._replace(offset=starts[part.parameter] + part.start) for part in owned]
            else:
                fragments = owned
            size = sum(part.length for part in layout) if layout else len(shard)
            if values.dim() and values.shape != (size,):
                raise ValueError(
                    f"optimizer.type {engine.optimizer_name()}: checkpoints cannot contain its state {name} of shape "
                    f"{tuple(values.shape)}; choose AdamW, Adam, Muon, SGD, Lion or Adagrad"
                )
            taken.append(Quantity(name, values, fragments))
    return taken


def load(path: Path, engine: Any, weights: FlatWeights, ema: EMA) -> dict[str, Any]:
    """Put a checkpoint into a new engine and its average. Returns state.json. All ranks call it.

    Each rank reads the fragments that it needs, whatever the number of ranks and the ZeRO stage that wrote them. Raises
    ValueError if the checkpoint belongs to another network or is not complete.
    """
    saved = checkpoint.read_engine(path)
    shapes = {name: tuple(shape) for name, shape in saved["parameters"].items()}
    if shapes != weights.shapes:
        differing = sorted(name for name, _ in shapes.items() ^ weights.shapes.items())
        raise ValueError(f"{path} belongs to another network: parameter {differing[0]} differs")
    _put(checkpoint.fragment_files(path), engine, weights, ema)
    _set_counters(engine, saved)
    return checkpoint.read_state(path)


def _put(files: list[Path], engine: Any, weights: FlatWeights, ema: EMA) -> None:
    stored = quantities(files)
    wanted: list[Request] = []
    numbers: list[tuple[dict[str, Any], str, Tensor]] = []
    averages = _averages(ema)
    for index, shard in enumerate(weights.shards):
        owned = weights.fragments[index]
        wanted += requests(WEIGHTS, shard.detach(), owned)
        for name, average in averages.items():
            wanted += requests(name, average[index], owned)
        if not owned:  # only padding
            continue
        state = _optimizer_state(engine, index, shard)
        for name, is_number in stored.get(owned[0].parameter, {}).items():
            if name == WEIGHTS or name in averages:
                continue
            if is_number:
                number = torch.zeros((), dtype=torch.float64)
                numbers.append((state, name, number))
                wanted.append(Request(name, owned[0].parameter, 0, number))
                continue
            fragments = _whole_parameters(engine, name, index) or owned
            if name not in state:  # most optimizers make their state in the first step
                size = sum(part.length for part in fragments) if fragments is not owned else len(shard)
                state[name] = torch.zeros(size, dtype=torch.float32, device=shard.device)
            wanted += requests(name, state[name], fragments)
    read(files, wanted)
    make_number = _number_type(engine)
    for state, name, number in numbers:
        state[name] = make_number(number.item())
    _update_model(engine.optimizer)


def _averages(ema: EMA) -> dict[str, list[Tensor]]:
    """All averages by quantity."""
    return {AVERAGE: ema.average, **ema.powers}


def counters(engine: Any) -> dict[str, Any]:
    """Steps and loss scale, as JSON."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": {name: getattr(scaler, name) for name in SCALE_FIELDS} if _is_dynamic(scaler) else None,
    }


def _set_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Put `counters` back. A dynamic loss scale that only one of the two runs has starts anew."""
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if saved["loss_scale"] and _is_dynamic(scaler):
        for name, value in saved["loss_scale"].items():
            setattr(scaler, name, value)


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", False))


def _optimizer_state(engine: Any, index: int, shard: Tensor) -> dict[str, Any]:
    """The optimizer's own state of a shard, to read and to change."""
    optimizer = engine.optimizer
    inner = optimizer.optimizer
    on_device = getattr(optimizer, "subgroup_to_device", {}).get(index, "cpu") != "cpu"
    if on_device and not (getattr(optimizer, "use_muon", False) and optimizer.sub_groups_using_muon[index]):
        inner = optimizer.backup_optimizer  # offload_optimizer.ratio < 1 at ZeRO 3
    state: dict[str, Any] = inner.state.setdefault(shard, {})
    return state


def _whole_parameters(engine: Any, name: str, index: int) -> list[Fragment]:
    """The layout of Muon's momentum at ZeRO 1 and 2 without offloading: all parameters that begin, lie or end in the
    rank's partition, in full. Empty for everything else, which has the layout of the weights."""
    optimizer = engine.optimizer
    if name != "momentum_buffer" or not hasattr(optimizer, "params_in_partition") or optimizer.cpu_offload:
        return []
    if "muon" not in type(optimizer.optimizer).__name__.lower():
        return []
    names = {id(parameter): key for key, parameter in engine.module.named_parameters()}
    layout, offset = [], 0
    for parameter in optimizer.params_in_partition[index]:
        layout.append(Fragment(names[id(parameter)], 0, parameter.numel(), offset))
        offset += parameter.numel()
    return layout


def _number_type(engine: Any) -> Callable[[float], Any]:
    """How the optimizer counts steps: torch's with a tensor, DeepSpeed's with an int."""
    inner = engine.optimizer.optimizer
    inner = getattr(inner, "aux_optimizer", None) or inner  # what Muon leaves to Adam
    if not type(inner).__module__.startswith("torch.optim"):
        return int
    on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
    device = engine.device if on_device else torch.device("cpu")
    return lambda value: torch.tensor(value, dtype=torch.float32, device=device)


@torch.no_grad()
def _update_model(optimizer: Any) -> None:
    """Make the model's weights those of the fp32 weights, as DeepSpeed does after a step. All ranks call it."""
    if not hasattr(optimizer, "fp16_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # ZeRO 3: frees the parameters that stay gathered
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()  # gathers them again
