"""Whole training steps: noising, forward, backward, clipping, AdamW, average of the weights.

On a GPU ours keeps bf16 weights with fp32 masters, as DeepSpeed does. The step functions of all providers take nothing
and return nothing.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastimagen import ops
from fastimagen.diffusion.draws import Draws

from ..harness import peers
from ..harness.measure import Bench, ProviderUnavailable, compiled
from ..harness.networks import TINY, Network, captions, flops, images, make_unet
from ..harness.timing import Work

Step = Callable[[], object]


class Update:
    """What follows the backward pass. Weights in bf16 have masters in fp32, which are what is clipped and averaged."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, capturable: bool = False) -> None:
        self.weights = [parameter for parameter in parameters if parameter.requires_grad]
        self.copied = self.weights[0].dtype != torch.float32
        self.masters = [w.detach().float().requires_grad_() for w in self.weights] if self.copied else self.weights
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True, capturable=capturable)

    @torch.no_grad()
    def __call__(self) -> None:
        if self.copied:
            for master, weight in zip(self.masters, self.weights):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [master.detach() for master in self.masters], 1e-4)
        if self.copied:
            torch._foreach_copy_(self.weights, self.masters)
        self.optimizer.zero_grad()


# ---- providers


def ours(
    network: Network,
    batch: int,
    device: torch.device,
    *,
    backend: str = "auto",
    compile: bool = False,
    graph: bool = False,
    padding: str | None = None,
) -> Step:
    """fastimagen's step. graph: loss, backward pass and update are one CUDA graph, which a step replays."""
    if graph and device.type != "cuda":
        raise ProviderUnavailable("CUDA graphs need a GPU")
    ops.set_backend(backend)
    stage = network.stage(padding)
    unet = make_unet(stage.config.unet, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    update = Update(unet.parameters(), capturable=graph)
    if compile:
        unet.compile(dynamic=False)
    batch_images, text = images(batch, network.side, device), captions(batch, stage.config.unet.text_dim, device)

    def draw() -> Draws:
        return stage.draw(0, range(batch), batch_images)

    def learn(draws: Draws) -> None:
        stage.training_loss(unet, batch_images, text, draws).mean().backward()
        update()

    run = in_graph(learn, draw()) if graph else learn

    def step() -> None:
        ops.set_backend(backend)
        run(draw())

    return step


def in_graph(learn: Callable[[Draws], None], draws: Draws) -> Callable[[Draws], None]:
    """`learn` as a CUDA graph: its tensors are those of `draws`, into which each call copies its own."""
    others = torch.cuda.Stream()
    others.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(others):
        for _ in range(3):  # compiles kernels, chooses cuDNN's algorithms, makes the optimizer's state
            learn(draws)
    torch.cuda.current_stream().wait_stream(others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        learn(draws)

    def replay(new: Draws) -> None:
        for own, value in zip(vars(draws).values(), vars(new).values(), strict=True):
            if own is not None:
                own.copy_(value)
        graph.replay()

    return replay


def minimagen(network: Network, batch: int, device: torch.device, *, improved: bool = False) -> Step:
    """MinImagen's; as shipped: fp32, Adam, no clipping (its call has no effect), no average."""
    if network.peer is None:
        raise ProviderUnavailable("MinImagen has no such network")
    config = network.stage().config.unet
    kwargs = [
        {**arguments, "text_embed_dim": config.text_dim}
        for arguments in ([TINY, network.peer] if config.lowres else [network.peer])
    ]
    sizes = [network.stage().lowres_size, network.side] if config.lowres else [network.side]
    timesteps = network.stage().config.schedule.timesteps
    torch.manual_seed(0)
    with device:
        imagen = peers.minimagen(kwargs, sizes, timesteps=timesteps)
    return _foreign(imagen, len(sizes), network, batch, device, improved)


def imagen_pytorch(network: Network, batch: int, device: torch.device, *, improved: bool = False) -> Step:
    """imagen-pytorch's preset of that name, which is another network of about the same size: fp32, Adam."""
    if network.class_name is None:
        raise ProviderUnavailable("imagen-pytorch has no such network")
    config = network.stage().config.unet
    torch.manual_seed(0)
    with device:
        imagen = peers.imagen_pytorch(network.class_name, config.text_dim, network.side)
    return _foreign(imagen, 2 if config.lowres else 1, network, batch, device, improved)


def _foreign(
    imagen: nn.Module, number: int, network: Network, batch: int, device: torch.device, improved: bool
) -> Step:
    """A step of either peer on its U-Net `number`. Improved: autocast to bf16, channels_last, torch.compile, and our
    update."""
    imagen = imagen.to(device)
    unet = imagen.unets[number - 1]
    if improved:
        unet.to(memory_format=torch.channels_last)
        unet.forward = compiled(unet.forward)
        update = Update(unet.parameters())
    else:
        adam = torch.optim.Adam(unet.parameters(), lr=1e-4)
    batch_images = images(batch, network.side, device) / 2 + 0.5  # theirs are in [0, 1]
    text = captions(batch, network.stage().config.unet.text_dim, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=improved):
            loss = imagen(batch_images, text_embeds=text.embeds, text_masks=text.mask, unet_number=number)
        loss.backward()
        if improved:
            update()
        else:
            adam.step()
            adam.zero_grad()

    return step


def diffusers(network: Network, batch: int, device: torch.device, *, improved: bool = False) -> Step:
    """The U-Net of diffusers, of about the same size, in a loop as its examples write it: fp32, AdamW, no average."""
    if network.diffusers is None:
        raise ProviderUnavailable("diffusers has no such network")
    text_dim = network.stage().config.unet.text_dim
    torch.manual_seed(0)
    with device:
        unet = peers.diffusers(network.diffusers, text_dim, network.side)
    forward = compiled(unet) if improved else unet
    if improved:
        unet.to(memory_format=torch.channels_last)
    update: Any = Update(unet.parameters()) if improved else torch.optim.AdamW(unet.parameters(), lr=1e-4)
    x, text = images(batch, network.side, device), captions(batch, text_dim, device)
    generator = torch.Generator(device).manual_seed(0)
    alpha_bar = torch.linspace(1 - 1e-4, 1 - 2e-2, 1000, device=device).cumprod(0)  # (1000,), of DDPM's linear betas

    def step() -> None:
        times = torch.randint(0, 1000, (batch,), generator=generator, device=device)  # (B,)
        noise = torch.randn(x.shape, generator=generator, device=device)  # (B, 3, S, S)
        level = alpha_bar[times][:, None, None, None]  # (B, 1, 1, 1)
        noisy = level.sqrt() * x + (1 - level).sqrt() * noise  # (B, 3, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=improved):
            output = forward(noisy, times, text.embeds, encoder_attention_mask=text.mask).sample  # (B, 3, S, S)
        nn.functional.mse_loss(output.float(), noise).backward()
        if improved:
            update()
        else:
            update.step()
            update.zero_grad()

    return step


EAGER = {
    "ours, triton": partial(ours, backend="triton"),
    "ours, torch": partial(ours, backend="torch"),
    "ours, triton, CUDA graph": partial(ours, backend="triton", graph=True),
    "MinImagen": minimagen,
    "imagen-pytorch": imagen_pytorch,
    "diffusers": diffusers,
}
COMPILED = {
    "ours, triton, compiled": partial(ours, backend="triton", compile=True),
    "ours, torch, compiled": partial(ours, backend="torch", compile=True),
    "MinImagen, bf16 channels_last compiled": partial(minimagen, improved=True),
    "imagen-pytorch, bf16 channels_last compiled": partial(imagen_pytorch, improved=True),
    "diffusers, bf16 channels_last compiled": partial(diffusers, improved=True),
}
AS_SHIPPED = ("MinImagen", "imagen-pytorch", "diffusers")
"""Without cudnn.benchmark, which fastimagen train and the improved peers have on."""
OTHER_NETWORKS = ("imagen-pytorch", "diffusers")
"""Peers of which only the size is about the same: their floating-point operations are not counted."""


# ---- measuring


def run(bench: Bench, networks: Iterable[Network], providers: dict[str, Callable[..., Step]]) -> None:
    """A row for every network and provider, at the network's batch or the largest half of it that fits."""
    for network in networks:
        each = flops(network.stage().config.unet, network.side, "training")
        for name, provider in providers.items():
            names = {
                "op": "training step",
                "shape": network.name,
                "mode": "training",
                "dtype": "bfloat16"
                if bench.device.type == "cuda" and ("ours" in name or "bf16" in name)
                else "float32",
            }
            if not bench.in_time():
                print(f"out of time before {network.name}, {name}", flush=True)
                return
            with bench.missing_on_error(name, **names):
                _measure(bench, names, name, partial(provider, network), network.batch, each)


def _measure(
    bench: Bench, names: dict[str, str], name: str, provider: Callable[..., Step], batch: int, each: float
) -> None:
    try:
        step = provider(batch, bench.device)
        with cudnn_benchmark(name not in AS_SHIPPED):
            first = first_step_seconds(step, bench.device)
            times = bench.time({name: Work(lambda _: step())}, in_graph=False, seconds=2 * bench.seconds)[name]
            facts = _facts(bench, name, step)
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    else:
        bench.add(
            **names,
            provider=name,
            ms=times[:3],
            timer=times.timer,
            images=batch,
            flops=None if name.startswith(OTHER_NETWORKS) else batch * each,
            first_step_s=round(first, 3),
            **facts,
        )
        return
    torch.cuda.empty_cache()  # outside of the handler, which holds the failed step's tensors
    _measure(bench, names, name, provider, batch // 2, each)


def _facts(bench: Bench, name: str, step: Step) -> dict[str, Any]:
    """What else a step tells: memory with weights and optimizer, host synchronisations, time by kind of op."""
    facts: dict[str, Any] = {}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        facts = {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "host_synchronisations": host_synchronisations(step),
        }
    if "compiled" not in name and "graph" not in name:
        facts["parts"] = breakdown(step, bench.device)
    return facts


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Inside, cuDNN times its algorithms for every shape, or does not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def first_step_seconds(step: Step, device: torch.device) -> float:
    """Wall-clock time of a step, which compiles what is not in a cache and lets cuDNN choose."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def host_synchronisations(step: Step) -> int:
    """Times that the host waits for the GPU in a step: `.item()`, copies from pageable memory and the like."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


PARTS = {  # part -> its ops in the profile, and all that they call and these do not name; the first that matches counts
    "attention": r"attention|flash|efficient|_softmax|::bmm$|::baddbmm$",
    "convolution": r"[cC]onv(olution|2d)|mkldnn_conv|thnn_conv",
    "normalisation": r"group_norm|layer_norm|::silu|::addcmul",
    "optimizer": r"_fused_adam|_foreach",
    "linear": r"::mm$|::addmm$|::linear$",
}


def breakdown(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step in each part, of the GPU's time or of the CPU's, and "rest", from one profiled step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return parts_of(profile.events(), device)


def parts_of(events: Iterable[Any], device: torch.device) -> dict[str, float]:
    """The sums of a profile's own times by part. On a GPU only ops count, to which the profiler adds their kernels."""
    sums = dict.fromkeys((*PARTS, "rest"), 0.0)
    for event in events:
        if device.type == "cuda" and event.device_type != torch.autograd.DeviceType.CPU:
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        sums[_part(event)] += spent / 1000
    return {part: round(spent, 3) for part, spent in sums.items()}


def _part(event: Any) -> str:
    while event is not None:
        for part, pattern in PARTS.items():
            if re.search(pattern, event.name):
                return part
        event = event.cpu_parent
    return "rest"
