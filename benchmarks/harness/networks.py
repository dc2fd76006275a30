"""The networks that are measured whole, what they are fed with, and what they must compute.

Letters: B batch, C channels, S side, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastimagen.cascade import Stage
from fastimagen.config import CascadeConfig
from fastimagen.interop.minimagen_unet import minimagen_config
from fastimagen.network_config import NetworkConfig, UNetConfig
from fastimagen.networks.build import build_network
from fastimagen.presets import (
    PRESETS,
    minimagen,
    minimagen_base_test,
    minimagen_stage,
    minimagen_super_test,
    minimagen_test,
    paper,
)
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train.flops import unet_flops

TOKENS = 64  # captions are padded to so many, and have 8 to 64

BASE = dict(
    dim=512,
    dim_mults=(1, 2, 3, 4),
    num_resnet_blocks=3,
    layer_attns=(False, True, True, True),
    layer_cross_attns=(False, True, True, True),
    memory_efficient=False,
)
SUPER = dict(
    dim=128,
    dim_mults=(1, 2, 4, 8),
    num_resnet_blocks=(2, 4, 8, 8),
    layer_attns=(False, False, False, True),
    layer_cross_attns=(False, False, False, True),
    memory_efficient=True,
)
BASE_TEST = dict(
    dim=8, dim_mults=(1, 2), num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False, memory_efficient=False
)
SUPER_TEST = dict(
    dim=8, dim_mults=(1, 2), num_resnet_blocks=(1, 2), layer_attns=False, layer_cross_attns=False, memory_efficient=True
)
DIFFUSERS_BASE = dict(
    block_out_channels=(448, 896, 1344, 1792),  # Stable Diffusion's 320, 640, 1280, 1280 (0.86 B parameters), wider
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    attention_head_dim=(7, 14, 21, 28),  # the number of heads, in spite of its name: 64 channels each
)
DIFFUSERS_TOY = dict(
    block_out_channels=(32, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
)
TINY = dict(dim=8, dim_mults=(1,), num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False)
"""MinImagen's own arguments of its four networks, and of a small one where only a second network counts."""


@dataclass(frozen=True)
class Network:
    """One stage of a cascade, and what to compare it with. `side` is what it trains on.

    peer: MinImagen's arguments of the same network. Networks of about the same size: class_name, imagen-pytorch's
    preset; diffusers, arguments of its UNet2DConditionModel.
    """

    name: str
    cascade: Callable[[], CascadeConfig]
    stage_name: str
    side: int
    batch: int  # of a GPU; halved until it fits
    peer: dict[str, Any] | None = None
    class_name: str | None = None
    diffusers: dict[str, Any] | None = None

    def stage(self, padding: str | None = None) -> Stage:
        """The stage; `padding` overrides the text_padding of its U-Net."""
        cascade = self.cascade()
        config = next(stage for stage in cascade.stages if stage.name == self.stage_name)
        if padding:
            unet = UNetConfig(**{**config.unet.model_dump(), "text_padding": padding})
            config = config.model_copy(update={"unet": unet})
        return Stage(config, cascade.below(self.stage_name))


def _default() -> CascadeConfig:
    """MinImagen's U-Net without arguments: 45 M parameters, self-attention over all 4,096 pixels of an image."""
    return CascadeConfig(stages=(minimagen_stage("default64", 64, minimagen_config({})),))


def _toy() -> CascadeConfig:
    return CascadeConfig(
        stages=(
            minimagen_stage("base", 16, minimagen_base_test(32), timesteps=25),
            minimagen_stage("sr", 32, minimagen_super_test(32), timesteps=25),
        )
    )


BASE64 = Network("MinImagen Base 64", minimagen, "base64", 64, 32, BASE, "BaseUnet64", DIFFUSERS_BASE)
SUPER256 = Network("MinImagen Super 64->256", minimagen, "sr256", 256, 16, SUPER, "SRUnet256")
PAPER = (
    Network("paper base64", partial(paper, 4096), "base64", 64, 32),
    Network("paper sr256", partial(paper, 4096), "sr256", 256, 16),
    Network("paper sr1024, crops of 256", partial(paper, 4096), "sr1024", 256, 16),
)
TRANSFORMERS = (
    Network("JiT-B 256", PRESETS["jit-b"], "base256", 256, 32),
    Network("JiT-L 256", PRESETS["jit-l"], "base256", 256, 32),
)
TEST_BASE = Network("MinImagen BaseTest 64", minimagen_test, "base64", 64, 2, BASE_TEST)
TEST_SUPER = Network("MinImagen SuperTest 64->128", minimagen_test, "sr128", 128, 2, SUPER_TEST)
DEFAULT = Network("MinImagen default 45 M 64", _default, "default64", 64, 1, {})
TOY = Network("toy 16", _toy, "base", 16, 2, BASE_TEST, diffusers=DIFFUSERS_TOY)
TOY_SUPER = Network("toy 16->32", _toy, "sr", 32, 2, SUPER_TEST)


def captions(batch: int, text_dim: int, device: torch.device) -> TextEmbeddings:
    """Random embedded captions (B, L, D) of 8 to 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, TOKENS, text_dim, generator=generator)
    lengths = torch.linspace(8, TOKENS, batch).long()
    return TextEmbeddings(embeds, torch.arange(TOKENS) < lengths[:, None]).to(device=device)


def images(batch: int, side: int, device: torch.device) -> Tensor:
    """Random images (B, 3, S, S) in [-1, 1]."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1


def make_unet(config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With random weights everywhere: GPUs multiply zeros faster, and some layers begin as zeros."""
    torch.manual_seed(0)
    with device:
        unet = build_network(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return unet.to(dtype)


def flops(config: NetworkConfig, side: int, mode: str) -> float:
    """Floating-point operations for one image; "training" is forward and backward, with activation checkpointing."""
    found = unet_flops(config, side, TOKENS)
    return float(found.forward if mode == "forward" else found.training + found.recomputed)
