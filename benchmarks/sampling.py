"""Sampling: what a step costs beyond its U-Net, for a stage of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastimagen import ops

from .measure import Bench
from .networks import Network, captions, flops, images, make_unet
from .timing import Work

STEPS = (2, 6)  # two lengths: their difference is steps alone, without what is done once


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
                works = _works(network, batch, bench.device, dtype)
                times = bench.time(works, in_graph=False)
                unet, (fewer, more) = times["unet"], (times[f"{steps} steps"] for steps in STEPS)
                bench.add(op="unet", mode="guided", provider=name, ms=unet[:3], timer=unet.timer, images=batch,
                          flops=2 * batch * each, **names)
                step = [(b - a) / (STEPS[1] - STEPS[0]) for a, b in zip(fewer[:3], more[:3])]
                bench.add(op="sampling", mode="step", provider=name, ms=step, timer=more.timer, images=batch,
                          note=f"{100 * (step[1] - unet.p50) / step[1]:.1f} % beyond the U-Net", **names)


@torch.inference_mode()
def _works(network: Network, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """The guided U-Net on its own, and the stage's sampler with few and with more steps."""
    stage = network.stage()
    unet = make_unet(stage.config.unet, device, dtype).eval()
    text, seeds = captions(batch, stage.config.unet.text_dim, device), list(range(batch))
    lowres = images(batch, stage.lowres_size, device) if stage.config.unet.lowres else None
    x = images(2 * batch, stage.config.size, device)
    time = torch.full((2 * batch,), 500.0, device=device)
    condition = {"lowres": x, "lowres_time": time} if stage.config.unet.lowres else {}
    rows = torch.arange(batch, device=device).repeat(2)
    state = unet.encode_text(text[rows], torch.arange(2 * batch, device=device) < batch)

    def sample(steps: int) -> None:
        settings = stage.config.sampling.model_copy(update={"steps": steps, "guidance": 3.0})
        stage.sample(unet, text, seeds, lowres=lowres, sampling=settings)

    works = {f"{steps} steps": Work(lambda _, steps=steps: sample(steps)) for steps in STEPS}
    works["unet"] = Work(torch.inference_mode()(lambda _: unet(x, time, text=state, **condition)))
    return works
