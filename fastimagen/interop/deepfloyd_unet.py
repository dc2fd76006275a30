"""DeepFloyd IF's U-Nets in diffusers' format: config.json to IFUNetConfig and back, weights to IFUNet and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from ..config_file import hint, validate
from ..network_config import IFUNetConfig

RESNET, CROSS = "Resnet{}sampleBlock2D", "SimpleCrossAttn{}Block2D"
"""diffusers' names of a level without attention and of one with it; {} is Down or Up."""

REQUIRED = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
}
"""Keys with one value in every U-Net of IF: another one, or none where diffusers has another default, is an error."""

SIZES = {
    "addition_embed_type_num_heads",
    "attention_head_dim",
    "block_out_channels",
    "class_embed_type",
    "cross_attention_dim",
    "down_block_types",
    "encoder_hid_dim",
    "in_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "only_cross_attention",
    "out_channels",
    "resnet_out_scale_factor",
    "resnet_skip_time_act",
    "sample_size",
    "time_embedding_act_fn",
    "time_embedding_dim",
    "up_block_types",
    "norm_num_groups",
}
"""Keys that `config_of` reads."""

INERT: dict[str, Any] = {
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""Keys that no U-Net of IF sets to anything else; diffusers' values where they are missing."""


def config_of(content: Mapping[str, Any]) -> IFUNetConfig:
    """The configuration of a U-Net from diffusers' unet/config.json.

    Raises ValueError for another class, unknown keys, and values that IF's U-Nets do not have.
    """
    name = content.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise ValueError(f"_class_name is {name}, not UNet2DConditionModel: this is no U-Net of DeepFloyd IF")
    for key, value in content.items():
        if key in REQUIRED or key in SIZES or key.startswith("_"):
            continue
        if key not in INERT:
            raise ValueError(f'unknown key "{key}"; {hint(key, [*REQUIRED, *SIZES, *INERT], "known keys")}')
        if value != INERT[key]:
            raise ValueError(f"{key} is {value!r}, but U-Nets of DeepFloyd IF have {INERT[key]!r}")
    for key, value in REQUIRED.items():
        if content.get(key) != value and not (key == "norm_eps" and key not in content):
            raise ValueError(f"{key} is {content.get(key)!r}, but U-Nets of DeepFloyd IF have {value!r}")
    if missing := [key for key in ("block_out_channels", "down_block_types", "in_channels") if key not in content]:
        raise ValueError(f"{', '.join(missing)} missing")
    dims, downs = content["block_out_channels"], content["down_block_types"]
    attention = [kind == CROSS.format("Down") for kind in downs]
    levels = [CROSS if has_attention else RESNET for has_attention in attention]
    for key, kinds, expected in (
        ("down_block_types", downs, [level.format("Down") for level in levels]),
        ("up_block_types", content.get("up_block_types"), [level.format("Up") for level in reversed(levels)]),
    ):
        if list(kinds or []) != expected:
            raise ValueError(f"{key} is {kinds}, but these down_block_types go with {expected}")
    lowres, channels = content.get("class_embed_type") == "timestep", 3
    if content["in_channels"] != channels * (1 + lowres):
        raise ValueError(
            f"in_channels is {content['in_channels']} and class_embed_type {content.get('class_embed_type')!r}: a "
            f'first stage has 3 and null, a second stage has 6 and "timestep"'
        )
    # Once before all blocks, or in each of them: the same function. Both at once is another one.
    once = content.get("time_embedding_act_fn"), content.get("resnet_skip_time_act", False)
    if once not in ((None, False), ("gelu", True)):
        raise ValueError(f"time_embedding_act_fn {once[0]!r} does not go with resnet_skip_time_act {once[1]}")
    divisor = content.get("resnet_out_scale_factor", 1.0)
    if content.get("mid_block_scale_factor", 1) != divisor:
        raise ValueError(f"resnet_out_scale_factor is {divisor}, but mid_block_scale_factor is another number")
    if content.get("out_channels", 4) not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be 3, or 6 with a learned variance, got {content.get('out_channels', 4)}")
    layers = content.get("layers_per_block", 2)
    fields = {
        "kind": "if",
        "lowres": lowres,
        "text_dim": content.get("encoder_hid_dim"),
        "dims": dims,
        "num_blocks": layers,
        "attention": attention,
        "only_cross_attention": content.get("only_cross_attention", False),
        "head_dim": content.get("attention_head_dim", 8),
        "pool_heads": content.get("addition_embed_type_num_heads", 64),
        "context_dim": content.get("cross_attention_dim", 1280),
        "time_dim": content.get("time_embedding_dim"),
        "groups": content.get("norm_num_groups", 32),
        "residual_divisor": divisor,
        "learned_variance": content.get("out_channels", 4) == 2 * channels,
    }
    return validate(IFUNetConfig, fields, "config.json")


def config_for_diffusers(config: IFUNetConfig, size: int) -> dict[str, Any]:
    """diffusers' unet/config.json of a U-Net for images of `size` pixels; `config_of` reads it back."""
    levels = [CROSS if has_attention else RESNET for has_attention in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        **INERT,
        **REQUIRED,
        "addition_embed_type_num_heads": config.pool_heads,
        "attention_head_dim": config.head_dim,
        "block_out_channels": list(config.dims),
        "class_embed_type": "timestep" if config.lowres else None,
        "cross_attention_dim": config.context_dim or config.dims[-1],
        "down_block_types": [level.format("Down") for level in levels],
        "up_block_types": [level.format("Up") for level in reversed(levels)],
        "encoder_hid_dim": config.text_dim,
        "in_channels": config.channels * (2 if config.lowres else 1),
        "layers_per_block": config.num_blocks if isinstance(config.num_blocks, int) else list(config.blocks),
        "mid_block_scale_factor": config.residual_divisor,
        "norm_num_groups": config.groups,
        "only_cross_attention": config.only_cross_attention,
        "out_channels": config.out_channels,
        "resnet_out_scale_factor": config.residual_divisor,
        "resnet_skip_time_act": config.lowres,
        "sample_size": size,
        "time_embedding_act_fn": "gelu" if config.lowres else None,
        "time_embedding_dim": config.time_dim,
    }


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of IFUNet from diffusers' of the same names: convolutions (O, I, k, k) become (O, k k I)."""
    return {
        name: rearrange(weight, "o i kh kw -> o (kh kw i)") if weight.dim() == 4 else weight
        for name, weight in state.items()
    }


def weights_for_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `weights_of`. Convolutions are the matrices of modules named conv."""
    return {name: _as_convolution(name, weight) for name, weight in state.items()}


def _as_convolution(name: str, weight: Tensor) -> Tensor:
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if not layer.startswith("conv") or weight.dim() != 2:
        return weight.contiguous()
    side = 1 if layer == "conv_shortcut" else 3
    return rearrange(weight, "o (kh kw i) -> o i kh kw", kh=side, kw=side).contiguous()  # (O, I, k, k)
