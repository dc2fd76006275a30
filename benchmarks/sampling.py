"""Sampling: what a step of a stage's sampler costs, and how much of that is its U-Net."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastimagen import ops
from fastimagen.unet import UNet

from .measure import Bench
from .networks import Network, captions, flops, images, make_unet
from .timing import Times

STEPS = 16  # of one walk, which also pays for its noise and for the text
ROUNDS = 5


def run(bench: Bench, networks: Iterable[Network], backends: tuple[str, ...], *, batch: int = 16) -> None:
    """For every network and backend a row for the U-Net with guidance, and one for a whole step of the sampler."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for network in networks:
        each = flops(network.stage().config.unet, network.stage().config.size, "forward")
        for backend in backends:
            if not bench.in_time():
                print(f"out of time before sampling {network.name}, {backend}", flush=True)
                return
            name, names = f"ours, {backend}", {"shape": f"{network.name} B{batch}", "dtype": str(dtype)[6:]}
            with bench.missing_on_error(name, op="sampling", mode="step", **names):
                ops.set_backend(backend)
                steps, unets = measure(network, batch, bench.device, dtype)
                bench.add(op="unet", mode="guided", provider=name, ms=unets[:3], timer=unets.timer, images=batch,
                          flops=2 * batch * each, **names)
                bench.add(op="sampling", mode="step", provider=name, ms=steps[:3], timer=steps.timer, images=batch,
                          note=f"{100 * (steps.p50 - unets.p50) / steps.p50:.1f} % beyond the U-Net", **names)


def measure(network: Network, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Times, Times]:
    """Milliseconds of a step, and of the U-Net in it, from the same walks."""
    stage = network.stage()
    unet = make_unet(stage.config.unet, device, dtype).eval()
    text, seeds = captions(batch, stage.config.unet.text_dim, device), list(range(batch))
    lowres = images(batch, stage.lowres_size, device) if stage.config.unet.lowres else None
    settings = stage.config.sampling.model_copy(update={"steps": STEPS, "guidance": 3.0})
    clock = Clock(device)
    clock.watch(unet)
    walks, unets = [], []
    for _ in range(ROUNDS + 1):
        clock.spans.clear()
        walk = clock.span(lambda: stage.sample(unet, text, seeds, lowres=lowres, sampling=settings))
        walks.append(clock.milliseconds([walk]) / STEPS)
        unets.append(clock.milliseconds(clock.spans) / STEPS)
    return Times.of(walks[1:], clock.timer), Times.of(unets[1:], clock.timer)  # the first one warmed up


class Clock:
    """Spans of CPU seconds, or between CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.timer = "events" if self.cuda else "CPU seconds"
        self.spans: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def now(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, call: Callable[[], object]) -> tuple[Any, Any]:
        begun = self.now()
        call()
        return begun, self.now()

    def watch(self, unet: UNet) -> None:
        """Note a span for every call of the U-Net."""
        def begin(*_: object) -> None:
            self._begun = self.now()

        unet.register_forward_pre_hook(begin)
        unet.register_forward_hook(lambda *_: self.spans.append((self._begun, self.now())))

    def milliseconds(self, spans: list[tuple[Any, Any]]) -> float:
        if not self.cuda:
            return 1000 * sum(end - begun for begun, end in spans)
        torch.cuda.synchronize()
        return sum(begun.elapsed_time(end) for begun, end in spans)
