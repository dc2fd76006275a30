"""MinImagen's U-Nets: constructor arguments to UNetConfig, weights to UNet."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..config_file import validate
from ..network_config import UNetConfig
from ..networks.unet import UNet
from ..presets import MINIMAGEN

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # wrong keys that an error lists; all keys of a large U-Net would fill the screen

# Argument of MinImagen's constructor: (field of UNetConfig, MinImagen's default).
_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "dim": ("dim", 128),
    "dim_mults": ("dim_mults", (1, 2, 4)),
    "channels": ("channels", 3),
    "cond_dim": ("cond_dim", None),
    "text_embed_dim": ("text_dim", 512),
    "num_resnet_blocks": ("num_blocks", 1),
    "layer_attns": ("self_attention", True),
    "layer_cross_attns": ("cross_attention", True),
    "attn_heads": ("heads", 8),
    "lowres_cond": ("lowres", False),
    "memory_efficient": ("downsample_first", False),
    "attend_at_middle": ("middle_attention", False),
}

# (pattern, replacement): the first pattern that matches a whole MinImagen key gives the name in UNet. "+N" counts the
# residual blocks after the first, which are block N + 1 of the level.
_RULES = [
    (r"init_conv\.convs\.(\d+)\.(\w+)", r"stem.convs.\1.\2"),
    (r"to_(lowres_)?time_hiddens\.1\.(\w+)", r"\1time_embedding.hidden.1.\2"),
    (r"to_(lowres_)?time_cond\.0\.(\w+)", r"\1time_embedding.to_vector.\2"),
    (r"to_(lowres_)?time_tokens\.0\.(\w+)", r"\1time_embedding.to_tokens.\2"),
    (r"norm_cond\.(\w+)", r"norm_cond.\1"),
    (r"text_to_cond\.(\w+)", r"text.project.\1"),
    (r"null_text_embed", r"text.null_tokens"),
    (r"null_text_hidden", r"text.null_vector"),
    (r"to_text_non_attn_cond\.(\d)\.(\w+)", r"text.pooled_embedding.\1.\2"),
    (r"downs\.(\d+)\.0\.(weight|bias)", r"downs.\1.before.\2"),
    (r"downs\.(\d+)\.1\.(.+)", r"downs.\1.blocks.0.\2"),
    (r"downs\.(\d+)\.2\.(\d+)\.(.+)", r"downs.\1.blocks.+\2.\3"),
    (r"downs\.(\d+)\.3\.(.+)", r"downs.\1.transformer.\2"),
    (r"downs\.(\d+)\.4\.fns\.0\.(\w+)", r"downs.\1.after.conv3.\2"),
    (r"downs\.(\d+)\.4\.fns\.1\.(\w+)", r"downs.\1.after.conv1.\2"),
    (r"downs\.(\d+)\.4\.(weight|bias)", r"downs.\1.after.\2"),
    (r"mid_block([12])\.(.+)", r"middle\1.\2"),
    (r"mid_attn\.fn\.fn\.(.+)", r"middle_attention.\1"),
    (r"ups\.(\d+)\.0\.(.+)", r"ups.\1.blocks.0.\2"),
    (r"ups\.(\d+)\.1\.(\d+)\.(.+)", r"ups.\1.blocks.+\2.\3"),
    (r"ups\.(\d+)\.2\.(.+)", r"ups.\1.transformer.\2"),
    (r"ups\.(\d+)\.3\.1\.(\w+)", r"ups.\1.after.conv.\2"),
    (r"final_res_block\.(.+)", r"final_block.\1"),
    (r"final_conv\.(\w+)", r"final_conv.\1"),
]

# (pattern, replacement) for the names inside a residual or transformer block; all are applied.
_INNER = [
    (r"block([12])\.groupnorm\.", r"norm\1."),
    (r"block([12])\.project\.", r"conv\1."),
    (r"time_mlp\.1\.", r"embedding_to_film."),
    (r"res_conv\.", r"shortcut."),
    (r"cross_attn\.fn\.", r"cross_attention."),
    (r"attn\.fn\.", r"attention."),
    (r"to_out\.0\.weight", r"to_out.weight"),
    (r"to_out\.1\.gamma", r"norm_out.weight"),
    (r"norm\.gamma", r"norm.weight"),
    (r"\bff\.(\d)\.(?:weight|g)$", r"feed_forward.\1.weight"),
]


def minimagen_config(unet_kwargs: dict[str, Any]) -> UNetConfig:
    """The configuration for the constructor arguments of MinImagen's Unet; missing arguments take its defaults.

    Raises ValueError for arguments that MinImagen does not have, and for two that it accepts but cannot run: a
    channels_out other than channels, and a first entry of dim_mults other than 1 without memory_efficient.
    """
    unknown = sorted(set(unet_kwargs) - set(_ARGUMENTS) - {"channels_out"})
    if unknown:
        raise ValueError(f"not arguments of MinImagen's Unet: {', '.join(unknown)}")
    fields = {field: unet_kwargs.get(argument, default) for argument, (field, default) in _ARGUMENTS.items()}
    channels, channels_out = fields["channels"], unet_kwargs.get("channels_out")
    if channels_out not in (None, channels):
        raise ValueError(f"channels_out must equal channels ({channels}), got {channels_out}")
    if list(fields["dim_mults"])[:1] != [1] and not fields["downsample_first"]:
        raise ValueError(
            f"dim_mults must begin with 1 unless memory_efficient is set, got {fields['dim_mults']}: "
            f"MinImagen cannot run other U-Nets"
        )
    return validate(UNetConfig, {**MINIMAGEN, **fields}, "unet")


def rename_minimagen(key: str) -> str | None:
    """The name in UNet of a MinImagen parameter; None for LayerNorm offsets, which are constant zeros in MinImagen.

    An unknown key is returned unchanged.
    """
    if re.fullmatch(r".*\b(norm|to_out\.1)\.beta", key):
        return None
    for pattern, replacement in _RULES:
        if re.fullmatch(pattern, key):
            name = re.sub(pattern, replacement, key)
            name = re.sub(r"blocks\.\+(\d+)", lambda match: f"blocks.{int(match[1]) + 1}", name)
            for inner_pattern, inner_replacement in _INNER:
                name = re.sub(inner_pattern, inner_replacement, name)
            return name
    return key


def unet_from_minimagen(state_dict: dict[str, Tensor], unet_kwargs: dict[str, Any], *, label: str = "U-Net") -> UNet:
    """A UNet in fp32 with the weights, and so the outputs, of a MinImagen U-Net.

    For super-resolution MinImagen saves wrong values of lowres_cond and text_embed_dim. Where unet_kwargs and the
    weights disagree about these or about the channels, the value from the weights is used and a warning that begins
    with `label` is logged. Raises ValueError that lists all other missing, unexpected and misshapen keys.
    """
    config = minimagen_config(_corrected_arguments(state_dict, unet_kwargs, label))
    with torch.device("meta"):
        unet = UNet(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    weights: dict[str, Tensor] = {}
    wrong: list[str] = []
    for key, value in state_dict.items():
        name = rename_minimagen(key)
        if name is None:
            if value.any():
                wrong.append(f"{key}: a LayerNorm offset that is not zero")
        elif name not in shapes:
            wrong.append(f"unexpected {key}")
        else:
            weights[name] = _in_unet_layout(value, shapes[name])
            if weights[name].shape != shapes[name]:
                wrong.append(f"{key}: shape {tuple(value.shape)} does not fit {name} {shapes[name]}")
    wrong += [f"no weight for {name} {shapes[name]}" for name in shapes.keys() - weights.keys()]
    if wrong:
        more = f"; and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        listed = "; ".join(sorted(wrong)[:MAX_LISTED])
        raise ValueError(f"the weights are not those of a MinImagen U-Net with these arguments: {listed}{more}")
    unet.load_state_dict(weights, assign=True)
    return unet


def _in_unet_layout(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight in fp32 and in UNet's layout, if it has one of MinImagen's; otherwise with its own shape."""
    value = value.float()
    if value.dim() == 4 and len(shape) == 2:  # a convolution
        return rearrange(value, "o i kh kw -> o (kh kw i)")  # (O, kH kW I)
    if value.dim() == 4 and value.numel() == math.prod(shape):  # gains of a norm (1, C, 1, 1)
        return value.reshape(shape)  # (C,)
    return value


def _corrected_arguments(state_dict: dict[str, Tensor], unet_kwargs: dict[str, Any], label: str) -> dict[str, Any]:
    """unet_kwargs with the values that the shapes of the weights determine."""
    lowres = "to_lowres_time_cond.0.weight" in state_dict
    from_weights: dict[str, Any] = {"lowres_cond": lowres}
    if "text_to_cond.weight" in state_dict:
        from_weights["text_embed_dim"] = state_dict["text_to_cond.weight"].shape[1]
    if "init_conv.convs.0.weight" in state_dict and "final_conv.weight" in state_dict:
        channels_in = state_dict["init_conv.convs.0.weight"].shape[1]
        from_weights["channels"] = channels_in // 2 if lowres else channels_in
        from_weights["channels_out"] = state_dict["final_conv.weight"].shape[0]
    arguments = {argument: default for argument, (_, default) in _ARGUMENTS.items()} | unet_kwargs
    if arguments.get("channels_out") is None:  # MinImagen then takes channels
        arguments["channels_out"] = from_weights.get("channels_out")
    for argument, value in from_weights.items():
        if arguments[argument] != value:
            message = "%s: %s is %s in the weights but %s in the arguments: using the weights"
            logger.warning(message, label, argument, value, arguments[argument])
    return unet_kwargs | from_weights
