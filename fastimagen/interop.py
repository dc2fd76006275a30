"""Foreign checkpoints: MinImagen U-Nets become ours, weight by weight."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .config import UNetConfig, validate
from .unet import UNet

# MinImagen's constructor: its argument, our field and its default. What is not here is hard-wired there.
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
_FIXED = dict(cross_heads=8, head_dim=64, time_tokens=2, groups=8, stem_kernels=(3, 7, 15), text_padding="null", max_text_length=256,
              text_pooling="mean", zero_init=False)

# (pattern, replacement), tried in order; the first that matches the whole key names our parameter.
_RULES = [
    (r"init_conv\.convs\.(\d+)\.(\w+)", r"stem.convs.\1.\2"),
    (r"to_(lowres_)?time_hiddens\.1\.(\w+)", r"\1time.hidden.1.\2"),
    (r"to_(lowres_)?time_cond\.0\.(\w+)", r"\1time.to_vector.\2"),
    (r"to_(lowres_)?time_tokens\.0\.(\w+)", r"\1time.to_tokens.\2"),
    (r"norm_cond\.(\w+)", r"norm_cond.\1"),
    (r"text_to_cond\.(\w+)", r"text.project.\1"),
    (r"null_text_embed", r"text.null_tokens"),
    (r"null_text_hidden", r"text.null_vector"),
    (r"to_text_non_attn_cond\.(\d)\.(\w+)", r"text.to_vector.\1.\2"),
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
# Inside a block, wherever it stands.
_INNER = [
    (r"block([12])\.groupnorm\.", r"norm\1."),
    (r"block([12])\.project\.", r"conv\1."),
    (r"time_mlp\.1\.", r"film."),
    (r"res_conv\.", r"shortcut."),
    (r"cross_attn\.fn\.", r"cross_attention."),
    (r"attn\.fn\.", r"attention."),
    (r"to_out\.0\.weight", r"to_out.weight"),
    (r"to_out\.1\.gamma", r"norm_out.weight"),
    (r"norm\.gamma", r"norm.weight"),
    (r"\bff\.(\d)\.(?:weight|g)$", r"feed_forward.\1.weight"),
]


def minimagen_config(unet_kwargs: dict[str, Any]) -> UNetConfig:
    """The configuration that MinImagen's constructor arguments stand for; missing ones take its defaults.

    Raises ValueError for an argument that MinImagen does not have, and for channels_out other than channels.
    """
    unknown = sorted(set(unet_kwargs) - set(_ARGUMENTS) - {"channels_out"})
    if unknown:
        raise ValueError(f"not arguments of MinImagen's Unet: {', '.join(unknown)}")
    given = {field: unet_kwargs.get(name, default) for name, (field, default) in _ARGUMENTS.items()}
    if unet_kwargs.get("channels_out") not in (None, given["channels"]):
        raise ValueError(f"channels_out {unet_kwargs['channels_out']} other than channels is not supported")
    return validate(UNetConfig, {**_FIXED, **given}, "unet")


def rename_minimagen(key: str) -> str | None:
    """Our name of a MinImagen parameter; None for its constant LayerNorm offsets (buffers that are always zero)."""
    if re.fullmatch(r".*\b(norm|to_out\.1)\.beta", key):
        return None
    for pattern, replacement in _RULES:
        if re.fullmatch(pattern, key):
            name = re.sub(pattern, replacement, key)
            name = re.sub(r"blocks\.\+(\d+)", lambda match: f"blocks.{int(match[1]) + 1}", name)
            for inner, ours in _INNER:
                name = re.sub(inner, ours, name)
            return name
    return key


def unet_from_minimagen(state_dict: dict[str, Tensor], unet_kwargs: dict[str, Any]) -> UNet:
    """MinImagen's U-Net as ours, with the same outputs.

    Where unet_kwargs and the weights disagree about the low-resolution input or the width of the text (MinImagen
    records both wrongly for super-resolution), the weights win and a warning says so. Raises ValueError that lists
    every other missing, unexpected or misshapen key.
    """
    kwargs = _trust_weights(state_dict, dict(unet_kwargs))
    config = minimagen_config(kwargs)
    with torch.device("meta"):
        unet = UNet(config)
    expected = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    weights, wrong = {}, []
    for key, value in state_dict.items():
        name = rename_minimagen(key)
        if name is None:
            if value.abs().max() != 0:
                wrong.append(f"{key}: a LayerNorm offset that is not zero")
            continue
        value = _reshape(value, expected.get(name))
        if name not in expected:
            wrong.append(f"unexpected {key}")
        elif tuple(value.shape) != expected[name]:
            wrong.append(f"{key}: shape {tuple(value.shape)}, expected {expected[name]}")
        weights[name] = value
    wrong += [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    if wrong:
        raise ValueError(f"not a MinImagen U-Net of these arguments: {'; '.join(wrong)}")
    unet.load_state_dict(weights, assign=True)
    return unet


def _reshape(value: Tensor, expected: tuple[int, ...] | None) -> Tensor:
    """MinImagen's layouts in ours: convolution weights (O, I, kH, kW) -> (O, kH, kW, I), 1x1 convolutions -> linear."""
    if expected is None:
        return value
    if value.dim() == 4 and len(expected) == 4:
        return value.permute(0, 2, 3, 1).contiguous()
    if value.dim() == 4 and value.numel() == torch.Size(expected).numel():
        return value.reshape(expected)
    return value


def _trust_weights(state_dict: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    import warnings

    facts = {"lowres_cond": "to_lowres_time_cond.0.weight" in state_dict}
    if "text_to_cond.weight" in state_dict:
        facts["text_embed_dim"] = state_dict["text_to_cond.weight"].shape[1]
    for name, fact in facts.items():
        given = kwargs.get(name, _ARGUMENTS[name][1])
        if given != fact:
            warnings.warn(f"{name} is {fact} by the weights, {given} by the arguments: the weights win", stacklevel=3)
            kwargs[name] = fact
    return kwargs
