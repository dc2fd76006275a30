"""The adapters of a trained stage (networks/lora.py): the model that they belong to, merging, a file of their own.

A run that trains adapters keeps only these. The network under them is that of train.stages.NAME.init_from, which a
checkpoint knows by its path and by a fingerprint of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import StageConfig, StageTrainConfig
from ..files import read_safetensors, write_safetensors
from ..network_config import LoraConfig
from ..networks.build import build_network
from ..networks.lora import merge, target_layers
from ..sampling.adapters import PREFIX

BLOCKS, BLOCK_BYTES = 256, 1 << 16
"""What a fingerprint reads of a file: training changes every weight."""


def check_adapters(stage: StageConfig, settings: StageTrainConfig, *, distilled: bool) -> None:
    """Raise ValueError, with one line that names the key, for adapters that a stage cannot train."""
    if settings.lora is None:
        return
    where = f"fastimagen.train.stages.{stage.name}.lora"
    if settings.init_from is None:
        raise ValueError(
            f'{where} adapts trained weights: set init_from beside it, or "cascade" to {{"model": FOLDER}}; without '
            f"either, remove lora"
        )
    if distilled:
        raise ValueError(f"{where} does not go with train.distill, which trains whole networks: remove one of them")
    with torch.device("meta"):
        network = build_network(stage.unet)
    try:
        target_layers(network, settings.lora.targets)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def settings_of_adapters(stage: str, settings: StageTrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of train.stages.NAME.lora, to compare with; {} without adapters."""
    if settings.lora is None:
        return {}
    assert settings.init_from is not None
    return {"lora": {**settings.lora.model_dump(mode="json"), "base": fingerprint(base_weights(settings, stage))}}


def saved_lora(saved: Mapping[str, Any]) -> LoraConfig | None:
    """The adapters in the settings of a checkpoint, by dotted key."""
    if "train.lora.rank" not in saved:
        return None
    return LoraConfig(**{field: saved[f"train.lora.{field}"] for field in LoraConfig.model_fields})


def base_weights(settings: StageTrainConfig, stage: str) -> Path:
    """The file with the weights that a stage starts from."""
    return Path(settings.init_from or "") / stage / "model.safetensors"


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of blocks from all over it: that of other weights differs. Raises OSError."""
    size = path.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=8)
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            file.seek(number * max(0, size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def merge_into_base(name: str, state: Mapping[str, Any], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a stage: those that its adapters were trained beside, with the adapters merged into them.

    state: state.json of the checkpoint. Raises ValueError if the weights are gone, or are others than in training.
    """
    saved = state["settings"]
    lora = saved_lora(saved)
    assert lora is not None
    path = Path(saved["train.init_from"]) / name / "model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"stage {name} was trained as adapters of {path}, but there is no such file: run export in the directory "
            f"that training was started in, or put the model back"
        )
    if fingerprint(path) != saved["train.lora.base"]:
        raise ValueError(f"{path} has other weights than those that the adapters of stage {name} were trained beside")
    return merge(read_safetensors(path), adapters, lora.scale)


def write_adapters(path: Path, state: Mapping[str, Any], adapters: Mapping[str, Tensor]) -> None:
    """Write adapters as PEFT and diffusers name them, with alpha equal to the rank: B is multiplied by alpha / rank."""
    lora = saved_lora(state["settings"])
    assert lora is not None
    tensors = {
        PREFIX + name: (weight * lora.scale if ".lora_B." in name else weight).contiguous()
        for name, weight in adapters.items()
    }
    write_safetensors(
        path, tensors, {"format": "pt", "rank": str(lora.rank), "base": state["settings"]["train.init_from"]}
    )
