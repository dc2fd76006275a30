"""DeepSpeed as the engine: processes, the resolved DeepSpeed configuration, fp32 weights by name."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ZERO_0_REFUSED = (
    "zero_optimization.stage 0 is refused: without ZeRO DeepSpeed does not skip a non-finite step in fp32, reports no "
    "gradient norm and accumulates bf16 gradients in bf16; use stage 1, which costs nothing on one process"
)


def init_distributed() -> torch.device:
    """Join the process group that `deepspeed`, `torchrun` or plain `python` (one process) started.

    Returns this process's device: its GPU with NCCL, or the CPU with gloo.
    """
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] != "1" and os.environ["MASTER_PORT"] == "0":
        raise ValueError("MASTER_PORT 0 means any free port, which several processes cannot guess alike: name one")
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if not cuda:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed
        torch.set_num_threads(max(1, torch.get_num_threads() // neighbours))
        torch.compiler.set_stance("force_eager")  # DeepSpeed compiles its Muon, which a CPU would wait for in vain
        # Only inference uses this operator, but every first start on a CPU would compile it for a minute or two.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


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

    `override` (the stage's keys) is merged over `base`; every "auto" is resolved or refused; without CUDA the run is
    fp32 with torch's Adam; no ZeRO stage means 1. Raises ValueError naming the key.
    """
    resolved = _merge(copy.deepcopy(base), override)
    notices = []
    _check_sections(resolved)
    zero = resolved.setdefault("zero_optimization", {})
    if zero.get("stage") == 0:
        raise ValueError(ZERO_0_REFUSED)
    if "stage" not in zero:
        zero["stage"] = 1
        notices.append("zero_optimization.stage: 1 (not given)")
    if not cuda:
        notices += _without_cuda(resolved)
    _resolve_clipping(resolved, notices)
    _resolve_autos(resolved, steps, cuda, notices)
    _resolve_batch(resolved, world_size, notices)
    board = resolved.get("tensorboard", {})
    if board.get("enabled"):
        board.setdefault("output_path", tensorboard)
        board.setdefault("job_name", job_name)
    resolved.setdefault("steps_per_print", 10**9)  # the trainer prints its own line
    return resolved, notices


def _check_sections(resolved: dict[str, Any]) -> None:
    for name in ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "tensorboard"):
        if not isinstance(resolved.get(name, {}), dict):
            raise ValueError(f"DeepSpeed key {name} must be an object, got {json.dumps(resolved[name])}")
    if not isinstance(resolved.get("optimizer", {}).get("type"), str):
        raise ValueError('the DeepSpeed key "optimizer" needs a type, e.g. {"type": "AdamW", "params": {"lr": 1e-4}}')


def _without_cuda(resolved: dict[str, Any]) -> list[str]:
    notices = []
    for precision in ("bf16", "fp16"):
        if resolved.get(precision, {}).get("enabled"):
            resolved[precision]["enabled"] = False
            notices.append(f"{precision}.enabled: false (no CUDA: the run is fp32)")
    if resolved["optimizer"]["type"].lower() in ("adam", "adamw", "muon"):
        params = resolved["optimizer"].setdefault("params", {})
        if not params.get("torch_adam"):
            params["torch_adam"] = True
            notices.append("optimizer.params.torch_adam: true (no CUDA)")
    return notices


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


def _resolve_autos(resolved: dict[str, Any], steps: int, cuda: bool, notices: list[str]) -> None:
    """Replace the "auto" values that have one right answer; refuse the others, which DeepSpeed would take as text."""
    answers = {"bf16.enabled": cuda, "scheduler.params.total_num_steps": steps}
    for path, owner, key in list(_autos(resolved, "")):
        if path in answers:
            owner[key] = answers[path]
            notices.append(f"{path}: {json_like(answers[path])} (was auto)")
        elif path not in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            raise ValueError(f'DeepSpeed key {path} is "auto", which only other trainers resolve: give a value')


def _autos(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto" or (isinstance(value, list) and "auto" in value):
            yield f"{prefix}{key}", tree, key


def _resolve_batch(resolved: dict[str, Any], world_size: int, notices: list[str]) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes."""
    total, micro, accumulation = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    given = {key: resolved.get(key) for key in (total, micro, accumulation)}
    known = {key: value for key, value in given.items() if value not in (None, "auto")}
    for key, value in known.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} must be a positive whole number, got {value!r}")
    if total not in known and micro not in known:
        raise ValueError(f"give {total} or {micro}")
    if total not in known:
        known.setdefault(accumulation, 1)
        known[total] = known[micro] * known[accumulation] * world_size
    elif micro not in known:
        known.setdefault(accumulation, 1)
        known[micro] = known[total] // (known[accumulation] * world_size)
    elif accumulation not in known:
        known[accumulation] = known[total] // (known[micro] * world_size)
    if known[micro] < 1 or known[micro] * known[accumulation] * world_size != known[total]:
        raise ValueError(
            f"{total} {known[total]} is not {micro} {known[micro]} x {accumulation} "
            f"{known[accumulation]} x {world_size} processes"
        )
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


def make_engine(model: nn.Module, deepspeed_config: dict[str, Any], muon: set[str]) -> Any:
    """A DeepSpeedEngine around `model`.

    muon: names of the parameters that the optimizer Muon updates; other optimizers ignore it. Raises ValueError with
    one line for keys that DeepSpeed refuses.
    """
    import deepspeed
    from pydantic import ValidationError

    try:
        with _tagged_for_muon(model, muon):
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(deepspeed_config)
            )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"DeepSpeed key {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return engine


@contextmanager
def _tagged_for_muon(model: nn.Module, muon: set[str]) -> Iterator[None]:
    """While the engine is built, `muon` decides which parameters carry DeepSpeed's tag `use_muon`.

    DeepSpeed 0.19.8 tags in `set_optimizer_flags`, by whether "embed" is part of a name, and has no other way to
    choose."""
    import deepspeed

    def set_optimizer_flags(config: Any, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.use_muon = name in muon  # type: ignore[attr-defined]  # read by DeepSpeed
            parameter.muon_num_heads = parameter.muon_head_dim = None  # type: ignore[attr-defined]

    original = deepspeed.set_optimizer_flags
    deepspeed.set_optimizer_flags = set_optimizer_flags
    try:
        yield
    finally:
        deepspeed.set_optimizer_flags = original
    for name, parameter in model.named_parameters():
        assert getattr(parameter, "use_muon", name in muon) == (name in muon), f"DeepSpeed retagged {name} for Muon"


def fp32_shards(engine: Any) -> list[Tensor]:
    """The flat fp32 master weights that this process owns, whatever the ZeRO stage."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if shards := getattr(engine.optimizer, name, None):
            return list(shards)
    raise AssertionError(f"no fp32 master weights in {type(engine.optimizer).__name__}")


def gather_fp32(engine: Any) -> dict[str, Tensor]:
    """All fp32 master weights by parameter name, full shapes, on the CPU. Every process must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(param).detach().to("cpu", copy=True)
        for name, param in engine.module.named_parameters()
    }


def scatter_fp32(engine: Any, weights: dict[str, Tensor]) -> None:
    """Write full fp32 weights by name into the shards that the processes own. Every process must call it."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, param in engine.module.named_parameters():
        safe_set_full_fp32_param(param, weights[name].to(param.device))
