"""Two processes, one network: the layout of ZeRO's flat weights, resuming, what ZeRO 3 frees after a forward pass."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagen.config import EMAConfig
from fastimagen.train.ema import EMA
from tests.conftest import ROOT, TOY_TRANSFORMER, toy_cascade

pytestmark = pytest.mark.slow

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
MUON = {"type": "Muon", "params": {"muon_lr": 1e-2, "adam_lr": 1e-2, "torch_adam": True}}
LAYOUTS = {
    f"{optimizer['type']}, ZeRO {stage}, {dtype}": (optimizer, stage, dtype)
    for optimizer, dtype in ((ADAMW, "fp32"), (MUON, "bf16"))
    for stage in (1, 2, 3)
}
NETWORKS = ("base", "sr", "transformer")
FREE_AT_ONCE = {  # ZeRO 3 gathers parameters for one module at a time, however small they are
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}

# ---- in each of the two processes


class Net(nn.Module):
    """Sizes that no number of processes divides, and a weight larger than a process's share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 41), nn.Linear(41, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def make_engine(model: nn.Module, muon: set[str], optimizer: dict, zero: dict, dtype: str) -> Any:
    from fastimagen.train import engine
    from fastimagen.train.deepspeed_config import resolve_deepspeed

    world_size = torch.distributed.get_world_size()
    keys = {
        "train_batch_size": 4 * world_size,
        "gradient_accumulation_steps": 2,
        "optimizer": optimizer,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
    }
    # As if there were a GPU: otherwise bf16 would become fp32.
    config, _ = resolve_deepspeed(keys, {}, steps=1, world_size=world_size, cuda=True, tensorboard="", job_name="")
    return engine.make_engine(model, config, muon)


def check_layout(optimizer: dict, stage: int, dtype: str) -> str:
    """Compare FlatWeights with what DeepSpeed gathers parameter by parameter. Returns the optimizer's class."""
    from deepspeed.utils import safe_get_full_fp32_param

    from fastimagen.train.flat_weights import FlatWeights

    torch.manual_seed(0)
    engine = make_engine(Net(), {"first.weight", "second.weight"}, optimizer, {"stage": stage}, dtype)
    x = torch.randn(2, 3, dtype=next(engine.module.parameters()).dtype)
    for _ in range(2):
        engine.backward(engine(x).float().square().mean())
        engine.step()
    weights = FlatWeights(engine)
    shapes = {name: tuple(parameter.shape) for name, parameter in Net().named_parameters()}
    expected = {
        name: safe_get_full_fp32_param(parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }

    for target in (torch.float32, torch.bfloat16):
        everywhere = weights.all_gather(weights.shards, target)
        assert list(everywhere) == list(shapes)
        for name, weight in everywhere.items():
            assert tuple(weight.shape) == shapes[name] and weight.equal(expected[name].to(target)), name

    covered = 0
    for index, shard in enumerate(weights.shards):
        for name, start, length, offset in weights.fragments[index]:
            own = shard[offset : offset + length].cpu()
            assert own.equal(expected[name].flatten()[start : start + length]), name
            covered += length
    sizes: list[int] = [0, 0]
    torch.distributed.all_gather_object(sizes, covered)
    assert sum(sizes) == sum(weight.numel() for weight in expected.values())
    name = type(engine.optimizer).__name__
    engine.destroy()
    return name


def take_step(engine: Any, ema: EMA, step: int) -> None:
    """A step on random data that depends on step and rank."""
    generator = torch.Generator().manual_seed(2 * step + torch.distributed.get_rank())
    for _ in range(2):
        x = torch.randn(2, 3, generator=generator).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    ema.update(step)


CPU = {"device": "cpu"}
ADAPTERS = "adapters, "  # the network is frozen beside them
RESUMES: dict[str, tuple[dict, dict, str, dict, str]] = {  # optimizer, ZeRO and dtype that write; those that read
    f"{ADAPTERS}AdamW, fp32, ZeRO 3 -> 2": (ADAMW, {"stage": 3}, "fp32", {"stage": 2}, "fp32"),
    "Muon, bf16, ZeRO 3 -> 1": (MUON, {"stage": 3}, "bf16", {"stage": 1}, "bf16"),
    "Muon, fp32, ZeRO 2 -> 1 with offloading": (
        MUON,
        {"stage": 2},
        "fp32",
        {"stage": 1, "offload_optimizer": CPU},
        "fp32",
    ),
    "Muon, fp32, ZeRO 3 -> 2": (MUON, {"stage": 3}, "fp32", {"stage": 2}, "fp32"),
    "AdamW, fp32, ZeRO 1 -> 3 with offloading": (
        ADAMW,
        {"stage": 1},
        "fp32",
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        "fp32",
    ),
    "AdamW, ZeRO 3 with offloading -> 1, fp32 -> bf16": (
        ADAMW,
        {"stage": 3, "offload_optimizer": CPU},
        "fp32",
        {"stage": 1},
        "bf16",
    ),
}


def check_resuming(optimizer: dict, wrote: dict, dtype: str, reads: dict, reads_dtype: str, folder: Path) -> None:
    """A checkpoint has the same weights, averages and moments in any engine that reads it, and steps go on alike."""
    from fastimagen.network_config import LoraConfig
    from fastimagen.networks.lora import add_lora
    from fastimagen.train import engine_state
    from fastimagen.train.checkpoint_writer import CheckpointWriter
    from fastimagen.train.flat_weights import FlatWeights

    def start(zero: dict, dtype: str) -> tuple[Any, FlatWeights, EMA]:
        torch.manual_seed(0)
        net = Net()
        if folder.name.startswith(ADAPTERS):
            add_lora(net, LoraConfig(rank=2, targets=("first", "second", "third")))
        engine = make_engine(net, {"first.weight", "second.weight"}, optimizer, zero, dtype)
        weights = FlatWeights(engine)
        return engine, weights, EMA(weights.shards, EMAConfig())

    def everything() -> dict[str, Tensor]:
        """The whole state by quantity and parameter, put together from the fragments of both ranks."""
        own = {}
        for name, values, fragments in engine_state.take(engine, weights, ema):
            for parameter, begin, length, offset in fragments:
                part = values[offset : offset + length] if values.dim() else values
                own[name, parameter, begin] = part.float().cpu().clone()
        parts: list[dict] = [{}, {}]
        torch.distributed.all_gather_object(parts, own)
        whole: dict[str, list[Tensor]] = {}
        for (name, parameter, _), part in sorted((parts[0] | parts[1]).items()):
            whole.setdefault(f"{name} of {parameter}", []).append(part)
        return {key: torch.cat(found) if found[0].dim() else found[0] for key, found in whole.items()}

    def model() -> dict[str, Tensor]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(engine.module.parameters())):
            trained = filter(lambda item: item[1].requires_grad, engine.module.named_parameters())
            return {name: weight.detach().clone() for name, weight in trained}

    engine, weights, ema = start(wrote, dtype)
    for step in (1, 2, 3):
        take_step(engine, ema, step)
    saver = CheckpointWriter(folder, "token", keep=1, keep_every=None)
    saver.save(engine, weights, ema, {"step": 3})
    expected = everything()
    take_step(engine, ema, 4)  # must not reach the checkpoint that is being written
    after = everything()
    saver.finish()
    engine.destroy()

    engine, weights, ema = start(reads, reads_dtype)
    assert engine_state.load(folder / "step-00000003", engine, weights, ema)["step"] == 3
    restored = everything()
    assert restored.keys() == expected.keys()
    different = {key: (restored[key] - expected[key]).abs().max().item() for key in expected}
    assert not any(different.values()), different
    assert engine.global_steps == 3 and engine.micro_steps == 6
    masters = weights.all_gather(weights.shards, torch.float32)
    assert all(weight.equal(masters[name].to(weight.dtype)) for name, weight in model().items())
    if dtype == reads_dtype:
        take_step(engine, ema, 4)
        tolerance = 1e-6 if dtype == "fp32" else 0.02  # bf16 gradients are added in another order
        differing = {key: (after[key] - value).abs().max().item() for key, value in everything().items()}
        assert max(differing.values()) <= tolerance, differing
    engine.destroy()


def check_full_disk(full: int, folder: Path) -> None:
    """The disk is full for rank `full` alone: no rank hangs, later saves succeed, only the last one must."""
    from fastimagen.train import checkpoint
    from fastimagen.train.checkpoint_writer import CheckpointWriter
    from fastimagen.train.flat_weights import FlatWeights

    engine = make_engine(Net(), set(), ADAMW, {"stage": 1}, "fp32")
    weights = FlatWeights(engine)
    ema = EMA(weights.shards, EMAConfig())
    saver = CheckpointWriter(folder, "token", keep=5, keep_every=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rank, began, lines = torch.distributed.get_rank(), time.monotonic(), []
    for step, room in ((1, limits[0]), (2, 20), (3, limits[0]), (4, 200)):  # bytes; 20 are too few for the reason
        saver._join()
        lines += [line for line in [saver.failure()] if line]
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        saver.save(engine, weights, ema, {"step": step})
    if rank == 0:
        assert len(lines) == 1 and f" (rank {full}, {socket.gethostname()}); training continues" in lines[0], lines
    with pytest.raises(OSError, match=rf"checkpoint of step 4 .*File too large.* \(rank {full}, .*resume from the"):
        saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert time.monotonic() - began < 30
    saver.save(engine, weights, ema, {"step": 5})
    saver.finish()
    assert [path.name for path in sorted(folder.iterdir())] == [f"step-0000000{step}" for step in (1, 3, 5)]
    assert not any(checkpoint.damage(path) for path in folder.iterdir())
    assert saver.failures == (2 if rank == 0 else 0)
    engine.destroy()


def check_stop_in_validation() -> None:
    """Three batches for two ranks, one of which is to stop during its first: none begins another."""
    from fastimagen.train.agreement import first_of_ranks
    from fastimagen.train.validation import Stopped, validation_loss

    rank, loaded, reasons = torch.distributed.get_rank(), [], []

    class Data(list):
        def in_chunks(self, count: int, size: int, buckets: Any) -> list[tuple[range, int]]:
            return [(range(start, start + size), 0) for start in range(0, count, size)]

        def fixed_batch(self, config: Any, indices: range, **_: Any) -> Any:
            loaded.append(indices)
            reasons.extend(["SIGTERM"] * rank)
            return SimpleNamespace(images_for=lambda device: None, text_for=lambda unet, device: None)

    def check() -> None:
        if reason := first_of_ranks(reasons[0] if reasons else None):
            raise Stopped(reason)

    config = SimpleNamespace(size=8, crop=None, unet=None)
    stage = SimpleNamespace(config=config, draw=lambda *_: None, training_loss=lambda *_, **__: torch.ones(32))
    settings = SimpleNamespace(validation_samples="all", seed=0)
    train = SimpleNamespace(fastimagen=SimpleNamespace(train=settings, data=SimpleNamespace(buckets=None)))
    split: Any = Data(range(96))
    with pytest.raises(Stopped, match="SIGTERM"):
        validation_loss(stage, stage, nn.Linear(1, 1), split, train, check)  # type: ignore[arg-type]
    assert loaded == [range(32 * rank, 32 * rank + 32)]


def check_unshared(folder: Path) -> None:
    """Ranks with run directories of their own are refused, on each of them in one line."""
    from fastimagen.train import agreement

    agreement.VISIBLE_AFTER = 0.2
    own = folder / f"host-{torch.distributed.get_rank()}"
    own.mkdir()
    with pytest.raises(ValueError, match=r"host-1 is not shared: rank 1 on .* does not see what rank 0 on .* wrote"):
        agreement.agree_on_run_directory(own)
    assert list(own.iterdir()) == []


NEVER_PARTITIONED = ["text.pool.query"]
"""The query of attention pooling is a vector, far below the size from which DeepSpeed partitions parameters."""


def not_freed(name: str) -> list[str]:
    """Names of the parameters whose gathered memory is still alive after a forward pass with gradients."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from fastimagen.network_config import PixelTransformerConfig
    from fastimagen.networks.build import build_network
    from fastimagen.text.embeddings import TextEmbeddings

    if name == "transformer":
        config = PixelTransformerConfig(**TOY_TRANSFORMER, lowres=True)
    else:
        config = toy_cascade().stage(name).unet
    engine = make_engine(build_network(config), set(), ADAMW, FREE_AT_ONCE, "fp32")
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    gathered: dict[str, StorageWeakRef] = {}

    def remember(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            assert parameter.numel(), f"{names[id(parameter)]} is not gathered"
            gathered[names[id(parameter)]] = StorageWeakRef(parameter.untyped_storage())

    for module in engine.module.modules():
        module.register_forward_pre_hook(remember)  # called after DeepSpeed's
    text = TextEmbeddings(torch.randn(2, 5, 64), torch.arange(5) < torch.tensor([[5], [3]]))
    lowres = {"lowres": torch.randn(2, 3, 8, 8), "lowres_time": torch.tensor([3.0, 4.0])} if config.lowres else {}
    out = engine(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0]), text=text, **lowres)
    assert out.requires_grad and gathered.keys() == set(names.values())
    until = time.monotonic() + 5  # gloo's thread may still hold the memory of the last gather for a moment
    while (alive := [name for name, storage in gathered.items() if not storage.expired()]) != NEVER_PARTITIONED:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    del out
    engine.destroy()
    return alive


def in_each_process() -> None:
    """Print the results as JSON on the last line."""
    from fastimagen.train.engine import init_distributed

    init_distributed()
    for name, case in RESUMES.items():
        check_resuming(*case, Path(sys.argv[1]) / name)
    for rank in range(2):
        check_full_disk(rank, Path(sys.argv[1]) / f"full-{rank}-{'x' * 150}")  # no room for a report with the path
    check_stop_in_validation()
    check_unshared(Path(sys.argv[1]))
    results = {
        "layouts": {name: check_layout(*layout) for name, layout in LAYOUTS.items()},
        "not freed": {name: not_freed(name) for name in NETWORKS},
    }
    print(json.dumps(results), flush=True)


# ---- the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found, which must be the same. They also check that checkpoints of bf16 runs resume."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from tests.train.test_two_ranks import in_each_process; in_each_process()"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    found = [json.loads(next(line for line in reversed(output.splitlines()) if line[:1] == "{")) for output in outputs]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_flat_layout_is_that_of_deepspeed(name: str, results: dict[str, Any]) -> None:
    expected = "DeepSpeedZeroOptimizer"
    if "ZeRO 3" in name:
        expected = "DeepSpeedZeroOptimizer_Stage3"
    elif "ZeRO 1, bf16" in name:  # gradients of several micro-batches in fp32
        expected = "BF16_Optimizer"
    assert results["layouts"][name] == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_zero_3_frees_every_weight_after_its_use(network: str, results: dict[str, Any]) -> None:
    """All modules that read a parameter through a view must save the parameter itself for the backward pass."""
    assert results["not freed"][network] == NEVER_PARTITIONED
