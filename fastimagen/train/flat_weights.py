"""fp32 weights of a DeepSpeed engine: flat shards, one set on each process, and full parameters by name.

ZeRO 1 and 2 flatten the parameters of an optimizer group one after another and give each process one of P equal parts.
ZeRO 3 splits every parameter into P equal parts, the last one padded; a shard holds one part of each parameter. Either
way all processes have shards of the same sizes, and a gather is one collective per shard. There are as many shards as
optimizer groups (AdamW 1, Muon 2), and with ZeRO 3 more for groups of over a billion weights per process.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..networks.convolution import is_partitioned
from .fragments import Fragment

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it


class Location(NamedTuple):
    """Where a parameter is: in shard number `shard`, beginning at `start`.

    part: ZeRO 3's number of weights on each process, and `start` counts within one process's shard; None for ZeRO 1
    and 2, where `start` counts within the shards of all processes joined.
    """

    shard: int
    start: int
    part: int | None


class FlatWeights:
    """The layout of an engine's fp32 weights. All processes make one together.

    shards: the master weights of this process, flat. fragments: what each shard has of the parameters, without
    DeepSpeed's padding. The methods take `values` of the same shapes: the master weights or their average. P is the
    number of processes, n the size of a shard. Frozen parameters are in no shard.
    """

    def __init__(self, engine: Any) -> None:
        self.device: torch.device = engine.device
        self.shards = _shards(engine.optimizer)
        named = dict(engine.module.named_parameters())
        parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self.frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        self.locations = _partitioned(engine, parameters) or _flattened(engine, parameters, self.shards)
        assert self.locations.keys() == self.shapes.keys(), "a parameter is not in DeepSpeed's optimizer"
        self.fragments = [self._own_fragments(index) for index in range(len(self.shards))]

    @torch.no_grad()
    def all_gather(self, values: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """All parameters by name in `dtype`, on the device of every process; they may share memory with `values`, and
        the frozen ones with the engine's module."""
        parameters: dict[str, Tensor] = {}
        for index, value in enumerate(values):
            own = value.to(self.device, dtype)  # (n,)
            whole = own[None]  # (1, n)
            if dist.get_world_size() > 1:
                whole = own.new_empty(dist.get_world_size(), len(own))  # (P, n)
                all_gather(whole.flatten(), own)
            parameters |= self._parameters(index, whole)
        return {name: parameters[name] for name in self.shapes} | self._gather_frozen(dtype)

    def _gather_frozen(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The frozen parameters, which ZeRO 3 partitions like the others."""
        if not any(map(is_partitioned, self.frozen.values())):
            return {name: parameter.detach().to(dtype) for name, parameter in self.frozen.items()}
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.frozen.values())):
            return {name: parameter.detach().to(dtype, copy=True) for name, parameter in self.frozen.items()}

    def _own_fragments(self, index: int) -> list[Fragment]:
        """The fragments of shard number `index`."""
        rank, size = dist.get_rank(), len(self.shards[index])
        found = []
        for name, (shard, start, part) in self.locations.items():
            if shard != index:
                continue
            length = math.prod(self.shapes[name])
            if part is None:  # of all processes' shards, joined, this one has [rank * size, (rank + 1) * size)
                first, last = max(0, rank * size - start), min(length, (rank + 1) * size - start)
                offset = start + first - rank * size
            else:
                first, last = rank * part, min(length, (rank + 1) * part)
                offset = start
            if first < last:
                found.append(Fragment(name, first, last - first, offset))
        return found

    def _parameters(self, index: int, whole: Tensor) -> dict[str, Tensor]:
        """The parameters of one shard, from those of all processes (P, n)."""
        parameters = {}
        for name, (shard, start, part) in self.locations.items():
            if shard == index:
                size = math.prod(self.shapes[name])
                if part is None:
                    weights = whole.flatten()[start : start + size]  # a view
                else:
                    weights = whole[:, start : start + part].flatten()[:size]  # a copy if P > 1
                parameters[name] = weights.view(self.shapes[name])
        return parameters


def _shards(optimizer: Any) -> list[Tensor]:
    """The flat fp32 master weights of this process, under the name that the ZeRO stage has for them."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if shards := getattr(optimizer, name, None):
            return list(shards)
    raise AssertionError(f"no fp32 master weights in {type(optimizer).__name__}")


def _partitioned(engine: Any, parameters: dict[str, Tensor]) -> dict[str, Location]:
    """ZeRO 3; empty for other stages. `fp16_groups` are the parameters of each shard, whatever their dtype."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    locations = {}
    for shard, group in enumerate(getattr(engine.optimizer, "fp16_groups", [])):
        start = 0
        for parameter in group:
            locations[names[id(parameter)]] = Location(shard, start, parameter.partition_numel())
            start += parameter.partition_numel()
    return locations


def _flattened(engine: Any, parameters: dict[str, Any], shards: list[Tensor]) -> dict[str, Location]:
    """ZeRO 1 and 2. Each process knows the fragments in its own shard (DeepSpeed's `_hp_mapping`); all put them
    together."""
    own = {}
    for name, parameter in parameters.items():
        if (fragment := parameter._hp_mapping) is not None:
            shard = fragment.param_group_index
            start = dist.get_rank() * len(shards[shard]) + fragment.hp_fragment_address.start
            own[name] = Location(shard, start - fragment.lp_fragment_address.start, None)
    found: list[dict[str, Location]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, own)
    locations: dict[str, Location] = {}
    for part in found:
        assert all(locations.get(name, location) == location for name, location in part.items())
        locations |= part
    return locations
