"""How fast training is: images per second, and the share of the GPUs' peak rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import StageConfig
from ..network_config import LoraConfig
from ..sizes import ImageSize
from .devices import Precision, device_by_cuda_name
from .flops import stage_flops


class Speed:
    """Turns steps and seconds into the numbers of a record.

    The share of the peak rate (model FLOPs utilization, PaLM, appendix B) counts the forward and backward pass of the
    U-Net once, for captions of at most 64 tokens, without what activation checkpointing computes again, on average over
    the sizes of the images. It is left out,
    and `say` gets one line, where the peak rate of the device is unknown.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        batch_size: int,
        world_size: int,
        device: torch.device,
        precision: Precision,
        say: Callable[[str], None],
        lora: LoraConfig | None = None,
        samples_by_size: Mapping[ImageSize, int] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.peak_images_per_s: float | None = None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        known = device_by_cuda_name(name)
        if known is None:
            say(f"{config.name}: no share of the peak rate (mfu) in the records: that of this {name} is unknown")
        else:
            samples = samples_by_size or {ImageSize.of(config.crop or config.size): 1}
            flops = sum(count * stage_flops(config, lora=lora, size=size).training for size, count in samples.items())
            self.peak_images_per_s = world_size * known.peak(precision) * sum(samples.values()) / flops

    def values(self, steps: int, seconds: float) -> dict[str, float]:
        """images_per_s and, where it is known, mfu, for `steps` steps in `seconds`."""
        images_per_s = steps * self.batch_size / seconds
        if self.peak_images_per_s is None:
            return {"images_per_s": images_per_s}
        return {"images_per_s": images_per_s, "mfu": images_per_s / self.peak_images_per_s}


def engine_precision(engine: Any) -> Precision:
    """What a DeepSpeed engine computes in."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since the start, of the GPU or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
