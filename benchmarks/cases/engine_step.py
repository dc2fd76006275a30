"""Training steps as `fastimagen train` makes them: DeepSpeed's engine on one process, ZeRO 1, average of the weights.

Micro-batches come from pinned memory, images as uint8, captions of 8 to 200 tokens padded as in training. A step is an
optimizer step: all micro-batches of its accumulation, their copies to the GPU, the update and the average. Letters: B
micro-batch, L text tokens, E text width.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastimagen import ops
from fastimagen.config import EMAConfig

from ..harness.measure import Bench
from ..harness.networks import Network, flops, make_unet
from ..harness.timing import MIN_SAMPLES, Times
from .step import cudnn_benchmark, first_step_seconds, host_synchronisations

if TYPE_CHECKING:
    from fastimagen.data.batch import Batch

NUM_BATCHES = 4  # different ones, which steps use in rotation
MAX_TOKENS = 200  # of a caption
OP = "engine step"


class Setting(NamedTuple):
    """How an engine is built."""

    optimizer: str
    accumulation: int = 1


class Engine:
    """A DeepSpeed engine around a network, and steps of it."""

    def __init__(self, network: Network, setting: Setting, device: torch.device, batch: int) -> None:
        from fastimagen.networks.parameters import muon_parameters
        from fastimagen.train.deepspeed_config import resolve_deepspeed
        from fastimagen.train.ema import EMA
        from fastimagen.train.engine import init_distributed, make_engine
        from fastimagen.train.flat_weights import FlatWeights

        init_distributed()
        ops.set_backend("auto")
        self.stage, self.device, self.accumulation = network.stage(), device, setting.accumulation
        unet = make_unet(self.stage.config.unet, device, torch.float32)
        given = {
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": setting.accumulation,
            "optimizer": {"type": setting.optimizer, "params": {"lr": 1e-4}},
            "bf16": {"enabled": True},
        }
        resolved, self.notices = resolve_deepspeed(
            given, {}, steps=1000, world_size=1, cuda=device.type == "cuda", tensorboard="", job_name=""
        )
        self.engine = make_engine(unet, resolved, muon_parameters(unet))
        self.average = EMA(FlatWeights(self.engine).shards, EMAConfig())
        self.steps = 0

    def step(self, batches: Iterator[Batch]) -> None:
        """An optimizer step, as the loop of train/trainer.py makes it."""
        for _ in range(self.accumulation):
            batch = next(batches)
            images = batch.images_for(self.device)  # (B, 3, H, W)
            text = batch.text_for(self.stage.config.unet, self.device)
            draws = self.stage.draw(0, batch.positions.tolist(), images)
            loss = self.stage.training_loss(self.engine, images, text, draws).mean()
            self.engine.backward(loss)
            self.engine.step()
        self.steps += 1
        self.average.update(self.steps)


def ragged_batches(network: Network, batch: int, *, pin: bool) -> Iterator[Batch]:
    """Micro-batches without end: random images and captions, the longest of each of another length."""
    from fastimagen.data.batch import Batch
    from fastimagen.text.embeddings import PackedEmbeddings

    generator = torch.Generator().manual_seed(0)
    width, made = network.stage().config.unet.text_dim, []
    for _ in range(NUM_BATCHES):
        shape = (batch, 3, network.side, network.side)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)  # (B, 3, H, W)
        lengths = torch.randint(8, MAX_TOKENS + 1, (batch,), generator=generator)  # (B,)
        text = None
        if width:
            tokens = torch.randn(int(lengths.sum()), width, generator=generator).bfloat16()  # (sum of lengths, E)
            text = PackedEmbeddings(tokens, lengths)
        if pin:
            images, text = images.pin_memory(), text and text.pin_memory()
        made.append(Batch(images, text, torch.arange(batch), [str(index) for index in range(batch)]))
    return cycle(made)


# ---- measuring


def run(bench: Bench, network: Network, micro_batches: tuple[int, ...]) -> None:
    """AdamW at the first micro-batch, with cuDNN's benchmark and without, at the others, with accumulation; Muon."""
    first, *others = micro_batches
    names = _names(bench, network)
    if find_spec("deepspeed") is None:
        reason = "deepspeed is not installed"
        bench.add(**names, shape=network.name, provider="ours", missing=reason)
        return
    each = flops(network.stage().config.unet, network.side, "training")
    with _engine(bench, network, Setting("AdamW"), first) as engine:
        if engine:
            with cudnn_benchmark(True):
                _measure(bench, network, engine, first, "AdamW", each)
            with cudnn_benchmark(False):
                _measure(bench, network, engine, first, "AdamW, cudnn.benchmark off", each)
            for batch in others:
                with cudnn_benchmark(True):
                    _measure(bench, network, engine, batch, "AdamW", each)
    for setting in (Setting("AdamW", 4), Setting("Muon")):
        with _engine(bench, network, setting, first) as engine, cudnn_benchmark(True):
            if engine:
                _measure(bench, network, engine, first, setting.optimizer, each)


def _names(bench: Bench, network: Network) -> dict[str, str]:
    return {"op": OP, "dtype": "bfloat16" if bench.device.type == "cuda" else "float32", "mode": "training"}


@contextmanager
def _engine(bench: Bench, network: Network, setting: Setting, batch: int) -> Iterator[Engine | None]:
    """An engine, destroyed at the end; None, and a row with the reason, if there is no time or it cannot be built."""
    names = {**_names(bench, network), "shape": _shape(network, batch, setting.accumulation)}
    if not bench.in_time():
        print(f"out of time before {names['shape']}, {setting.optimizer}", flush=True)
        yield None
        return
    engine = None
    with bench.missing_on_error(setting.optimizer, **names):
        engine = Engine(network, setting, bench.device, batch)
        for notice in engine.notices:
            print(f"  {notice}", flush=True)
    try:
        yield engine
    finally:
        if engine:
            engine.engine.destroy()
            del engine.engine, engine.average
            gc.collect()  # the engine's parts refer to each other
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _shape(network: Network, batch: int, accumulation: int) -> str:
    return f"{network.name} B{batch}" + (f" x {accumulation}" if accumulation > 1 else "")


def _measure(bench: Bench, network: Network, engine: Engine, batch: int, provider: str, each: float) -> None:
    """A row: time of a step among others, host time of a step that begins with an idle GPU, first step, memory."""
    names = {**_names(bench, network), "shape": _shape(network, batch, engine.accumulation)}
    if not bench.in_time():
        print(f"out of time before {names['shape']}, {provider}", flush=True)
        return
    cuda = bench.device.type == "cuda"
    with bench.missing_on_error(provider, **names):
        batches = ragged_batches(network, batch, pin=cuda)

        def step() -> None:
            engine.step(batches)

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        first = first_step_seconds(step, bench.device)
        for _ in range(NUM_BATCHES - 1):  # the other lengths
            step()
        times = step_times(step, cuda, bench.seconds)
        images = batch * engine.accumulation
        bench.add(
            **names,
            provider=provider,
            ms=times[:3],
            timer=times.timer,
            images=images,
            flops=images * each,
            host_ms=host_milliseconds(step, cuda),
            first_step_s=round(first, 3),
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            host_synchronisations=host_synchronisations(step) if cuda else None,
            note=f"first step {first:.1f} s",
        )


def step_times(step: Callable[[], None], cuda: bool, seconds: float) -> Times:
    """Milliseconds from the end of a step to the end of the next, without a pause between steps."""
    marks: list[Any] = []
    until = time.monotonic() + max(seconds, 1.0 if cuda else 0.0)
    while len(marks) < MIN_SAMPLES + 1 and (len(marks) < 4 or time.monotonic() < until + 10 * seconds):
        step()
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.process_time())
    if cuda:
        torch.cuda.synchronize()
        return Times.of([a.elapsed_time(b) for a, b in pairwise(marks)], "events, steps back to back")
    return Times.of([1000 * (b - a) for a, b in pairwise(marks)], "CPU seconds, steps back to back")


def host_milliseconds(step: Callable[[], None], cuda: bool) -> float:
    """Time until a step has made its last launch, the median of three that begin with an idle GPU.

    The queue of a GPU holds about 1,000 launches, and DeepSpeed waits for the norm of the gradients: where the GPU is
    slower than the host, this contains waiting. The row with micro-batch 1 shows what the host needs.
    """
    samples = []
    for _ in range(3):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        samples.append(1000 * (time.perf_counter() - began))
    return round(sorted(samples)[1], 3)
