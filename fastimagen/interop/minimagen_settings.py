"""MinImagen's parameters folder, without weights -> a configuration that trains the same cascade."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..config import CascadeConfig
from ..config_file import config_from_dict, validate
from ..files import atomic_file, read_json_object
from ..text.t5 import T5_NAMES
from .minimagen import only_file, read_command, read_imagen, stage_of, unet_numbers
from .minimagen_unet import minimagen_config

logger = logging.getLogger(__name__)

# Defaults of MinImagen's command line.
_COMMAND = {
    "BATCH_SIZE": "2",
    "MAX_NUM_WORDS": "64",
    "ACCUM_ITER": "1",
    "EPOCHS": "5",
    "OPTIM_LR": "0.0001",
    "TRAIN_VALID_FRAC": "0.9",
    "CHCKPT_NUM": "500",
    "VALID_NUM": "None",
}


def import_parameters(source: str | Path, out: str | Path) -> Path:
    """Write a configuration for the cascade of a parameters folder, or of the training directory around it.

    Settings of training_parameters*.txt are taken over; without that file MinImagen's defaults are. data.shards is for
    the user to set. Raises ValueError, and writes nothing, for missing or contradictory files and if `out` exists.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another file, or remove it first")
    folder = source / "parameters" if (source / "parameters").is_dir() else source
    numbers = unet_numbers(folder, ".json")
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"{folder} must hold unet_0_params_*.json, unet_1_params_*.json, ...")
    imagen, path = read_imagen(folder)
    sizes, encoder = imagen["image_sizes"], imagen["text_encoder_name"]
    if not isinstance(sizes, list) or len(sizes) != len(numbers):
        raise ValueError(f"{path}: image_sizes must be a list of {len(numbers)} sizes, one per U-Net, got {sizes!r}")
    if encoder not in T5_NAMES:
        raise ValueError(f"{path}: text_encoder_name must be one of {', '.join(T5_NAMES)}, got {encoder!r}")
    stages = [stage_of(_unet(folder, number, encoder), size, imagen) for number, size in enumerate(sizes)]
    cascade = validate(CascadeConfig, {"stages": stages}, str(path))
    content = _content(cascade, encoder, _COMMAND | read_command(folder), out.stem)
    config_from_dict(content)
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def _unet(folder: Path, number: int, encoder: str) -> Any:
    """The U-Net's configuration. MinImagen saves wrong values of two arguments for super-resolution."""
    path = only_file(folder, f"unet_{number}_*.json")
    assert path is not None  # its number was found
    arguments = read_json_object(path)
    for argument, value, why in (
        ("lowres_cond", number > 0, "which MinImagen trains with"),
        ("text_embed_dim", T5_NAMES[encoder][1], f"the width of {encoder}"),
    ):
        if arguments.get(argument, value) != value:
            message = "unet_%d: %s is %s in %s: taken as %s, %s"
            logger.warning(message, number, argument, arguments[argument], path.name, value, why)
        arguments[argument] = value
    try:
        return minimagen_config(arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _content(cascade: CascadeConfig, encoder: str, command: dict[str, str], name: str) -> dict[str, Any]:
    """The file. Raises ValueError for values of the command line that are not numbers."""
    try:
        batch, accumulation = int(command["BATCH_SIZE"]), int(command["ACCUM_ITER"])
        tokens = int(command["MAX_NUM_WORDS"])  # MinImagen counts tokens
        epochs, rate, share = (float(command[key]) for key in ("EPOCHS", "OPTIM_LR", "TRAIN_VALID_FRAC"))
        checkpoint = int(command["CHCKPT_NUM"])
        samples = "all" if command["VALID_NUM"] == "None" else int(command["VALID_NUM"])
    except ValueError as error:
        raise ValueError(f"training_parameters: {error}") from None
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "Adam", "params": {"lr": rate}},
        "zero_optimization": {"stage": 1},
        "fastimagen": {
            "cascade": {"stages": [stage.model_dump(mode="json") for stage in cascade.stages]},
            "data": {"shards": f"data/{name}", "validation": {"share": round(1 - share, 6)} if share < 1 else None},
            "text": {"encoder": encoder, "max_length": tokens},
            "train": {
                "run": f"runs/{name}",
                "epochs": epochs,
                "checkpoint_every": checkpoint,
                "validation_samples": samples,
            },
        },
    }
