"""Foreign checkpoints: MinImagen's U-Nets, weight by weight, and its training directories."""

from __future__ import annotations

import logging
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..cascade import Stage
from ..config import CascadeConfig, UNetConfig
from ..config_file import validate
from ..files import read_json_object, require_empty
from ..networks.unet import UNet
from ..presets import MINIMAGEN, minimagen_stage
from ..sampling.model_directory import write_model
from ..text.t5 import T5_NAMES

logger = logging.getLogger(__name__)

# ---- U-Nets

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

# (pattern, replacement), tried in order; the first that matches the whole key names our parameter.
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
# Inside a block, wherever it stands.
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
    """The configuration that MinImagen's constructor arguments stand for; missing ones take its defaults.

    Raises ValueError for an argument that MinImagen does not have, and for what it cannot run either: channels_out
    other than channels, and a first entry of dim_mults other than 1 unless memory_efficient.
    """
    unknown = sorted(set(unet_kwargs) - set(_ARGUMENTS) - {"channels_out"})
    if unknown:
        raise ValueError(f"not arguments of MinImagen's Unet: {', '.join(unknown)}")
    given = {field: unet_kwargs.get(name, default) for name, (field, default) in _ARGUMENTS.items()}
    if unet_kwargs.get("channels_out") not in (None, given["channels"]):
        raise ValueError(
            f"channels_out {unet_kwargs['channels_out']} other than channels {given['channels']} is not supported"
        )
    if list(given["dim_mults"])[:1] != [1] and not given["downsample_first"]:
        raise ValueError(
            f"dim_mults must begin with 1, got {given['dim_mults']}: MinImagen builds other U-Nets, but "
            f"they fail in their last block, so there are no such weights"
        )
    return validate(UNetConfig, {**MINIMAGEN, **given}, "unet")


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


def unet_from_minimagen(state_dict: dict[str, Tensor], unet_kwargs: dict[str, Any], *, name: str = "U-Net") -> UNet:
    """MinImagen's U-Net as a UNet in fp32, with the same outputs.

    Where unet_kwargs and the weights disagree about channels, the low-resolution input or the width of the text
    (MinImagen records the last two wrongly for super-resolution), the weights win and a line of the log, which begins
    with `name`, says so.
    Raises ValueError that lists every other missing, unexpected or misshapen key (20 of them, and counts the rest).
    """
    config = minimagen_config(_trust_weights(state_dict, unet_kwargs, name))
    with torch.device("meta"):
        unet = UNet(config)
    expected = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    weights, wrong = {}, []
    for key, value in state_dict.items():
        own_name = rename_minimagen(key)
        if own_name is None:
            if value.any():
                wrong.append(f"{key}: a LayerNorm offset that is not zero")
        elif own_name not in expected:
            wrong.append(f"unexpected {key}")
        else:
            weights[own_name] = _reshape(value, expected[own_name])
            if tuple(weights[own_name].shape) != expected[own_name]:
                wrong.append(f"{key}: shape {tuple(value.shape)} does not fit {own_name} {expected[own_name]}")
    wrong += [f"nothing for {name} {expected[name]}" for name in expected.keys() - weights.keys()]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"not a MinImagen U-Net of these arguments: {'; '.join(sorted(wrong)[:20])}{more}")
    unet.load_state_dict(weights, assign=True)
    return unet


def _reshape(value: Tensor, expected: tuple[int, ...]) -> Tensor:
    """A tensor in UNet's layout, fp32: convolutions (O, I, kH, kW) -> (O, kH kW I), gains (1, C, 1, 1) -> (C,)."""
    value = value.float()
    if value.dim() == 4 and len(expected) == 2:
        return value.permute(0, 2, 3, 1).flatten(1)  # (O, kH * kW * I)
    if value.dim() == 4 and value.numel() == math.prod(expected):
        return value.reshape(expected)
    return value


def _trust_weights(state_dict: dict[str, Tensor], unet_kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """unet_kwargs, corrected by what the shapes of the weights tell."""
    lowres = "to_lowres_time_cond.0.weight" in state_dict
    facts: dict[str, Any] = {"lowres_cond": lowres}
    if "text_to_cond.weight" in state_dict:
        facts["text_embed_dim"] = state_dict["text_to_cond.weight"].shape[1]
    if "init_conv.convs.0.weight" in state_dict and "final_conv.weight" in state_dict:
        facts["channels"] = state_dict["init_conv.convs.0.weight"].shape[1] // (2 if lowres else 1)
        facts["channels_out"] = state_dict["final_conv.weight"].shape[0]
    given = {argument: default for argument, (_, default) in _ARGUMENTS.items()} | unet_kwargs
    if given.get("channels_out") is None:
        given["channels_out"] = facts.get("channels_out")
    for argument, fact in facts.items():
        if given[argument] != fact:
            logger.warning(
                "%s: %s is %s by the weights, %s by the arguments: the weights win",
                name,
                argument,
                fact,
                given[argument],
            )
    return unet_kwargs | facts


# ---- training directories

_IMAGEN_DEFAULTS: dict[str, Any] = {  # of MinImagen's class Imagen; image_sizes and text_encoder_name have none
    "text_embed_dim": None,
    "channels": 3,
    "timesteps": 1000,
    "cond_drop_prob": 0.1,
    "loss_type": "l2",
    "lowres_sample_noise_level": 0.2,
    "auto_normalize_img": True,
    "dynamic_thresholding_percentile": 0.9,
    "only_train_unet_number": None,
}
CARD = """# {name}

A text-to-image cascade trained with MinImagen, converted from `{source}` by fastimagen {version}.

| stage | size | parameters | weights |
| --- | --- | --- | --- |
{stages}

Text encoder: {encoder}

Sampling defaults are MinImagen's: ancestral sampling over all {timesteps} timesteps, guidance 3. Images of
super-resolution differ from MinImagen's own: it adds the augmentation noise before it brings the low-resolution image
to [-1, 1], whereas its training does so afterwards, as the paper and fastimagen do.
"""


def import_minimagen(source: str | Path, out: str | Path) -> Path:
    """MinImagen training directory -> model directory for `fastimagen sample`; returns `out`.

    Reads parameters/*.json, parameters/training_parameters*.txt if there is one, and for every U-Net its best weights
    (state_dicts/) or else its latest (tmp/). What is decided on the way is logged. Raises ValueError, and writes
    nothing, for missing or contradictory files, several files of which one would have to be picked, unknown arguments,
    wrong weights, and an `out` that is not empty.
    """
    source, out = Path(source), Path(out)
    require_empty(out)
    files = _unet_files(source)
    imagen, where = _read_imagen(source / "parameters")
    sizes = imagen["image_sizes"]
    if not isinstance(sizes, list) or len(sizes) != len(files):
        raise ValueError(f"{where}: image_sizes must be a list of {len(files)} sizes, one per U-Net, got {sizes!r}")
    stages, weights, rows = [], {}, []
    for index, ((parameters, checkpoint), size) in enumerate(zip(files, sizes)):
        try:
            unet = unet_from_minimagen(_read_state_dict(checkpoint), read_json_object(parameters), name=f"unet_{index}")
        except ValueError as error:
            raise ValueError(f"unet_{index} ({parameters.name}, {checkpoint.name}): {error}") from None
        name = f"sr{size}" if unet.config.lowres else f"base{size}"
        stages.append(
            minimagen_stage(
                name,
                size,
                unet.config,
                timesteps=imagen["timesteps"],
                caption_dropout=imagen["cond_drop_prob"],
                loss=imagen["loss_type"],
                percentile=imagen["dynamic_thresholding_percentile"],
                sample_level=imagen["lowres_sample_noise_level"],
            )
        )
        Stage(stages[-1])  # refuses what has no samples: 20 timesteps end in pure noise
        weights[name] = unet.state_dict()
        millions = sum(weight.numel() for weight in weights[name].values()) / 1e6
        rows.append(f"| {name} | {size}x{size} | {millions:.2f} M | {checkpoint.relative_to(source)} |")
    cascade = validate(CascadeConfig, {"stages": stages}, str(where))
    text_dim = stages[0].unet.text_dim
    assert text_dim is not None  # MinImagen's U-Nets always read text
    encoder = _text_encoder(imagen["text_encoder_name"], text_dim, where)
    card = CARD.format(
        name=out.name,
        source=source.name,
        version=__version__,
        stages="\n".join(rows),
        encoder=encoder["name"] if encoder else "none, give embeddings",
        timesteps=imagen["timesteps"],
    )
    return write_model(out, cascade, weights, text_encoder=encoder, encoder_folder=None, card=card)


def _unet_files(source: Path) -> list[tuple[Path, Path]]:
    """(parameters, weights) of every U-Net in order."""
    if not (source / "parameters").is_dir():
        raise ValueError(f"{source} is not a MinImagen training directory: it has no folder parameters")
    numbers = {
        folder: {
            int(match[1])
            for path in (source / folder).glob(f"unet_*{suffix}")
            if (match := re.match(r"unet_(\d+)_", path.name))
        }
        for folder, suffix in (("parameters", ".json"), ("state_dicts", ".pth"), ("tmp", ".pth"))
    }
    count = len(numbers["parameters"])
    if not count or numbers["parameters"] != set(range(count)):
        raise ValueError(
            f"{source / 'parameters'} must hold unet_0_params_*.json, unet_1_params_*.json, ..., found "
            f"{'numbers ' + ', '.join(map(str, sorted(numbers['parameters']))) if count else 'none'}; a "
            f"restarted run lacks them: copy them from the run that it started from"
        )
    if extra := (numbers["state_dicts"] | numbers["tmp"]) - numbers["parameters"]:
        raise ValueError(
            f"{source} holds weights of unet_{min(extra)}, but no parameters/unet_{min(extra)}_params_*.json"
        )
    files = []
    for index in range(count):
        checkpoint = _only_one(source / "state_dicts", f"unet_{index}_*.pth")
        if checkpoint is None:
            checkpoint = _only_one(source / "tmp", f"unet_{index}_*.pth")
            if checkpoint is None:
                raise ValueError(f"{source} holds no weights of unet_{index}, neither in state_dicts nor in tmp")
            logger.warning("unet_%d has no best weights in state_dicts: taking the latest, %s", index, checkpoint)
        parameters = _only_one(source / "parameters", f"unet_{index}_*.json")
        assert parameters is not None  # found above
        files.append((parameters, checkpoint))
    return files


def _read_imagen(parameters: Path) -> tuple[dict[str, Any], Path]:
    """Arguments of MinImagen's Imagen, defaults filled in, and the file that they are from."""
    where = _only_one(parameters, "imagen_*.json")
    if where is None:
        raise ValueError(
            f"there is no imagen_params_*.json in {parameters}; a restarted run lacks it: copy it from "
            f"the run that it started from"
        )
    given = read_json_object(where)
    command = _read_command(parameters)
    if "T5_NAME" in command:
        given.setdefault("text_encoder_name", command["T5_NAME"])
    known = {"image_sizes", "text_encoder_name", *_IMAGEN_DEFAULTS}
    wrong = [f"unknown {key}" for key in sorted(given.keys() - known)]
    wrong += [f"missing {key}" for key in sorted({"image_sizes", "text_encoder_name"} - given.keys())]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    imagen = _IMAGEN_DEFAULTS | given
    if command.get("T5_NAME", imagen["text_encoder_name"]) != imagen["text_encoder_name"]:
        raise ValueError(
            f"{where} names text encoder {imagen['text_encoder_name']}, training_parameters "
            f"{command['T5_NAME']}: make them agree; captions were encoded with the latter in training, "
            f"with the former in sampling"
        )
    for key, argument, value in (
        ("timesteps", "TIMESTEPS", imagen["timesteps"]),
        ("the last of image_sizes", "IMG_SIDE_LEN", imagen["image_sizes"]),
    ):
        value = value[-1] if isinstance(value, list) and value else value
        if argument in command and command[argument] != str(value):
            logger.warning(
                "%s is %s in %s, %s is %s in training_parameters: the former is what was trained",
                key,
                value,
                where.name,
                argument,
                command[argument],
            )
    if imagen["only_train_unet_number"] is not None:
        logger.warning(
            "only_train_unet_number is %s: the other U-Nets may be untrained", imagen["only_train_unet_number"]
        )
    return imagen, where


def _read_command(parameters: Path) -> dict[str, str]:
    """The --KEY=VALUE lines of training_parameters*.txt; empty without the file."""
    path = _only_one(parameters, "training_*.txt")
    if path is None:
        return {}
    lines = [line.partition("=") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if bad := [key for key, equals, _ in lines if not equals or not key.startswith("--")]:
        raise ValueError(f"{path}: lines must be --KEY=VALUE, got {bad[0]!r}")
    return {key.removeprefix("--"): value.strip() for key, _, value in lines}


def _text_encoder(name: str | None, width: int, where: Path) -> dict[str, Any] | None:
    """Reference to the text encoder for model_index.json; None if it cannot have made embeddings of this width."""
    if name not in T5_NAMES:
        raise ValueError(f"{where}: text_encoder_name must be one of {', '.join(T5_NAMES)}, got {name!r}")
    if T5_NAMES[name][1] != width:
        logger.warning(
            "the U-Nets read embeddings of width %d, but %s makes %d: the weights win, and the model names no "
            "text encoder (sample with --embeddings)",
            width,
            name,
            T5_NAMES[name][1],
        )
        return None
    return {"name": name, "revision": None, "max_length": MINIMAGEN["max_text_length"], "included": False}


def _only_one(folder: Path, pattern: str) -> Path | None:
    """The file in `folder` that matches, None if there is none. Raises ValueError naming them if there are several."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several candidates, {', '.join(path.name for path in found)}: leave one of them"
        )
    return found[0] if found else None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:  # all that a damaged file raises
        raise ValueError(f"cannot read weights {path}: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict: parameter names and tensors")
    return content
