"""Sampling: what a step of a stage's sampler costs, and how much of that is its U-Net."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastimagen import ops
from fastimagen.cascade import Stage
from fastimagen.config import SamplingConfig
from fastimagen.networks.unet import UNet
from fastimagen.seeds import image_noise
from fastimagen.text.embeddings import TextEmbeddings

from ..harness.measure import Bench
from ..harness.networks import Network, captions, flops, images, make_unet
from ..harness.timing import Times

STEPS = 16  # of a sampling run, which also draws its noise and encodes the text
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
                for loop, label in ((stage_sample, name), (plain_loop, f"a plain loop, {backend}")):
                    steps, unets = measure(loop, network, batch, bench.device, dtype)
                    bench.add(
                        op="unet",
                        mode="guided",
                        provider=label,
                        ms=unets[:3],
                        timer=unets.timer,
                        images=batch,
                        flops=2 * batch * each,
                        **names,
                    )
                    bench.add(
                        op="sampling",
                        mode="step",
                        provider=label,
                        ms=steps[:3],
                        timer=steps.timer,
                        images=batch,
                        steps=network.stage().config.sampling.steps,
                        note=f"{100 * (steps.p50 - unets.p50) / steps.p50:.1f} % beyond the U-Net",
                        **names,
                    )


# ---- loops

Loop = Callable[..., Tensor]


def stage_sample(
    stage: Stage, unet: UNet, text: TextEmbeddings, seeds: list[int], lowres: Tensor | None, settings: SamplingConfig
) -> Tensor:
    """fastimagen's sampling."""
    return stage.sample(unet, text, seeds, lowres=lowres, sampling=settings)


@torch.inference_mode()
def plain_loop(
    stage: Stage, unet: UNet, text: TextEmbeddings, seeds: list[int], lowres: Tensor | None, settings: SamplingConfig
) -> Tensor:
    """A straightforward loop: DDIM, two U-Net calls per step, captions encoded in each, torch.quantile."""
    device, diffusion, config = text.embeds.device, stage.diffusion, stage.config
    noise = image_noise(seeds, (config.unet.channels, config.size, config.size), stage="", step=0, device=device)
    level = torch.full((len(seeds),), 0.1, device=device)
    condition = {} if lowres is None else stage.lowres_condition(lowres, level, noise)
    dropped = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    times, x = diffusion.schedule.sampling_times(settings.steps), noise
    for now, then in pairwise(times):
        model_input, time_ = (
            diffusion.network_input(x, now),
            diffusion.schedule.network_time(now).to(device).expand(len(x)),
        )
        with_caption = unet(model_input, time_, text=text, **condition).float()
        without = unet(model_input, time_, text=text, keep_text=dropped, **condition).float()
        x0 = diffusion.x0(without + settings.guidance * (with_caption - without), x, now)
        s = torch.quantile(x0.flatten(1).abs(), settings.percentile, dim=1).clamp(min=1)[:, None, None, None]
        x0 = x0.clamp(-s, s) / s
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (map(float, diffusion.schedule.alpha_sigma(t)) for t in (now, then))
        x = alpha_s * x0 + sigma_s / sigma_t * (x - alpha_t * x0)
    return x


# ---- measuring


def measure(loop: Loop, network: Network, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Times, Times]:
    """Milliseconds of a step, and of the U-Net in it, from the same runs."""
    stage = network.stage()
    unet = make_unet(stage.config.unet, device, dtype).eval()
    text, seeds = captions(batch, stage.config.unet.text_dim, device), list(range(batch))
    lowres = images(batch, stage.lowres_size, device) if stage.config.unet.lowres else None
    settings = stage.config.sampling.model_copy(update={"steps": STEPS, "guidance": 3.0})
    clock = Clock(device)
    clock.watch(unet)
    runs, unets = [], []
    for _ in range(ROUNDS + 1):
        clock.spans.clear()
        span = clock.span(lambda: loop(stage, unet, text, seeds, lowres, settings))
        runs.append(clock.milliseconds([span]) / STEPS)
        unets.append(clock.milliseconds(clock.spans) / STEPS)
    return Times.of(runs[1:], clock.timer), Times.of(unets[1:], clock.timer)  # the first one warmed up


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
