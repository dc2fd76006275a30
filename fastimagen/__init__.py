"""fastimagen: train Imagen, the cascaded text-to-image diffusion model, and sample from what was trained."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and their rooms; a room is entered when its name is first used, so `import fastimagen` stays light.
_ROOMS = {
    "ImagenPipeline": "pipeline",
    "UNet": "unet",
    "UNetConfig": "config",
    "Cascade": "cascade",
    "CascadeConfig": "config",
    "TextEmbeddings": "text",
    "T5Encoder": "text",
    "Trainer": "train.trainer",
    "EMA": "train.ema",
}
__all__ = [*_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
