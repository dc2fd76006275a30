"""fastimagen: train Imagen, the cascaded text-to-image diffusion model, and sample from trained models."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and their modules. A module is imported when its name is first used: `import fastimagen` stays light.
_MODULES = {
    "ImagenPipeline": "sampling.pipeline",
    "SamplingRequest": "sampling.request",
    "UNet": "networks.unet",
    "UNetConfig": "network_config",
    "Cascade": "cascade",
    "CascadeConfig": "config",
    "TextEmbeddings": "text.embeddings",
    "T5Encoder": "text.t5",
    "Trainer": "train.trainer",
    "EMA": "train.ema",
}
__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
