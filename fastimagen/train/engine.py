"""DeepSpeed as the engine: the process group, and the engine around a U-Net."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ..config import TimeoutConfig
from ..files import first_line
from .peers import Peers
from .preemption import TrainingInterrupted
from .rendezvous import failed_to_connect, set_launcher_defaults
from .watchdog import is_of_collectives

logger = logging.getLogger(__name__)


def choose_accelerator() -> None:
    """Let DeepSpeed use the CPU where there is no CUDA. Call it before DeepSpeed is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def backend() -> Literal["nccl", "gloo"]:
    """How processes communicate: NCCL between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def init_distributed(timeouts: TimeoutConfig | None = None, peers: Peers | None = None) -> torch.device:
    """Join the process group that `deepspeed`, `torchrun` or plain `python` (one process) started.

    timeouts: by default those of TimeoutConfig; a collective fails after the longest of them, in this process group
    and in all that are made later, DeepSpeed's own included. peers: the processes, if they have met. Returns this
    process's device: its GPU with NCCL, or the CPU with gloo. Raises ConnectionError, one line, if the processes cannot
    connect to each other.
    """
    timeouts = timeouts or TimeoutConfig()
    set_launcher_defaults()
    choose_accelerator()
    import deepspeed
    import deepspeed.ops

    cuda = torch.cuda.is_available()
    if not cuda:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed
        torch.set_num_threads(max(1, torch.get_num_threads() // neighbours))
        torch.compiler.set_stance("force_eager")  # DeepSpeed compiles its Muon, which a CPU would wait for in vain
        # Only inference uses this operator, but every first start on a CPU would compile it for a minute or two.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The watchdog ends a process whose collective hangs or has lost a peer. torch's own handler would do so too,
        # with a C++ traceback that names neither rank nor phase.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    _set_default_timeout(timedelta(seconds=timeouts.longest))
    try:
        connect = timedelta(seconds=timeouts.rendezvous)
        if peers:  # torchrun's agent keeps keys of processes that it restarts: the store of this attempt has none
            dist.init_process_group(
                backend(),
                store=peers.store.clone(),  # a connection of its own, so that its waits do not hold up the heartbeats
                rank=peers.rank,
                world_size=len(peers.members),
                timeout=connect,
                device_id=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
            )
        deepspeed.init_distributed(dist_backend=backend(), verbose=False, timeout=connect)
        dist.barrier()  # connects the processes: what is wrong with the network shows here
    except RuntimeError as error:
        if peers is None:
            raise
        raise failed_to_connect(peers, backend(), error) from None
    _set_timeout(timedelta(seconds=timeouts.longest))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _set_timeout(timeout: timedelta) -> None:
    """Let the process group have this time-out. torch has a public way since 2.14, and warns of the old one."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def _set_default_timeout(timeout: timedelta) -> None:
    """Let process groups have this time-out that are made without one, as DeepSpeed's are. torch has no public way."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


def make_engine(model: nn.Module, deepspeed_config: dict[str, Any], muon: set[str]) -> Any:
    """A DeepSpeedEngine around `model`, which trains the parameters that are not frozen.

    muon: names of the parameters that the optimizer Muon updates; other optimizers ignore it. Raises ValueError with
    one line for what DeepSpeed refuses.
    """
    import deepspeed

    try:
        with _tagged_for_muon(model, muon):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=trained, config=copy.deepcopy(deepspeed_config)
            )
    except Exception as error:  # DeepSpeed raises all kinds, down to AssertionError, for what it does not support
        if isinstance(error, (torch.OutOfMemoryError, TrainingInterrupted)) or is_of_collectives(error):
            raise
        logger.debug("deepspeed.initialize failed", exc_info=True)
        raise ValueError(
            f"DeepSpeed refuses this configuration: {type(error).__name__}: {first_line(error)}"
        ) from error
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
