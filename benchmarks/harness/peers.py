"""MinImagen, imagen-pytorch and diffusers as installed from the package index, to be measured beside our own.

    pip install --no-deps minimagen==0.0.9 einops-exts resize-right
    pip install --no-deps imagen-pytorch beartype
    pip install diffusers

Captions come embedded, so what they import for T5, image files and augmentation is never called: small stand-ins take
its place while they are imported. Their own code is untouched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from .measure import ProviderUnavailable

NEEDS = {
    "minimagen": ("einops", "einops_exts", "resize_right", "tqdm"),
    "imagen_pytorch": ("einops", "beartype", "tqdm"),
    "diffusers": ("huggingface_hub", "filelock"),
}


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def standing_in(*names: str) -> Iterator[None]:
    """Inside, importing these modules (a.b with their parents) gives stand-ins."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: StandIn(name) for name in names})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _installed(name: str) -> None:
    for needed in (name, *NEEDS[name]):
        if find_spec(needed) is None:
            raise ProviderUnavailable(
                f"{needed} is not installed" + (f", which {name} needs" if needed != name else "")
            )


@cache
def import_minimagen() -> tuple[ModuleType, ModuleType]:
    """Its modules Imagen and Unet, the former without its bar of progress."""
    _installed("minimagen")
    importlib.import_module("PIL.Image")  # it uses this and leaves the import to torchvision
    with standing_in("transformers", "torchvision", "torchvision.transforms"):
        imagen, unet = (importlib.import_module(f"minimagen.{name}") for name in ("Imagen", "Unet"))
    imagen.tqdm = lambda steps, **_: steps
    return imagen, unet


def minimagen(unets: list[dict[str, Any]], sizes: list[int], *, timesteps: int = 1000) -> nn.Module:
    """MinImagen's Imagen of U-Nets with these arguments. Raises ProviderUnavailable."""
    imagen, unet = import_minimagen()
    built = [unet.Unet(**{**kwargs, "lowres_cond": index > 0}) for index, kwargs in enumerate(unets)]
    return imagen.Imagen(
        built,
        text_encoder_name="",
        text_embed_dim=unets[0]["text_embed_dim"],
        image_sizes=sizes,
        timesteps=timesteps,
        cond_drop_prob=0.15,
    )


@cache
def _imagen_pytorch() -> ModuleType:
    """Its module of networks and diffusion alone: the package imports a trainer with many dependencies."""
    _installed("imagen_pytorch")
    package = module_from_spec(find_spec("imagen_pytorch"))  # not executed
    with standing_in("transformers", "torchvision", "torchvision.transforms", "kornia", "kornia.augmentation"):
        sys.modules["transformers"].T5Config = _T5Config
        sys.modules["transformers"].logging = SimpleNamespace(set_verbosity_error=lambda: None)
        sys.modules["imagen_pytorch"] = package
        return importlib.import_module("imagen_pytorch.imagen_pytorch")


def imagen_pytorch(name: str, text_dim: int, size: int) -> nn.Module:
    """imagen-pytorch's Imagen around its U-Net of this name; a super-resolution network ("SR...") gets a small one
    before it. Raises ProviderUnavailable."""
    module = _imagen_pytorch()
    lowres = name.startswith("SR")
    unets, sizes = [getattr(module, name)(text_embed_dim=text_dim, lowres_cond=lowres)], [size]
    if lowres:
        unets.insert(
            0, module.Unet(dim=8, dim_mults=(1, 2), text_embed_dim=text_dim, layer_attns=False, layer_cross_attns=False)
        )
        sizes.insert(0, size // 4)
    return module.Imagen(unets, image_sizes=sizes, text_embed_dim=text_dim)


def diffusers(arguments: dict[str, Any], text_dim: int, size: int) -> nn.Module:
    """diffusers' UNet2DConditionModel of RGB images with these arguments. Raises ProviderUnavailable."""
    _installed("diffusers")
    unet = importlib.import_module("diffusers").UNet2DConditionModel
    return unet(sample_size=size, in_channels=3, out_channels=3, cross_attention_dim=text_dim, **arguments)


class _T5Config:
    """Asked for the width of a T5 at import, over the network, as a default that nobody uses here."""

    d_model = 768

    @classmethod
    def from_pretrained(cls, name: str) -> _T5Config:
        return cls()
