"""The contract of resuming: what happens to each key of the configuration that differs from the checkpoint's.

A key acts from the resumed step on, which is announced in one line, or it is refused with the way out. A checkpoint's
state has the settings that it was trained with, by dotted key and fully resolved: the stage's DeepSpeed keys and the
fields of its StageConfig at the top level, then data, text and train.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..config import FastimagenConfig, StageConfig, StageTrainConfig
from ..data.listed import ListedShard
from ..data.shard import Shard
from .adapters import settings_of_adapters

ACTS = "acts"
NETWORK = "the checkpoint's weights belong to the other network"
PROCESS = "the network has learned the other diffusion process"
TEXT = "the network has learned the other text embeddings"
DATA = "positions in the data would mean other samples"
START = "it acts on initial weights only"
ADAPTERS = "the checkpoint has the adapters of the other settings, or of other weights under them"
BATCHES = "with data.buckets every batch has one size, so that positions would mean other samples"
OPTIMIZER = "the optimizer's state belongs to the other type"

RULES = {
    # the stage
    "name": NETWORK,
    "size": PROCESS,
    "crop": ACTS,
    "lowres_size": PROCESS,
    "unet": NETWORK,
    "unet.checkpoint_levels": ACTS,
    "unet.zero_init": START,
    "schedule": PROCESS,
    "objective.prediction": PROCESS,
    "objective.loss": ACTS,
    "objective.difference_weight": ACTS,
    "objective.perceptual": ACTS,
    "objective.weighting": ACTS,
    "objective.min_snr_gamma": ACTS,
    "objective.times": ACTS,
    "objective.edm_mean": ACTS,
    "objective.edm_std": ACTS,
    "objective.logit_mean": ACTS,
    "objective.logit_std": ACTS,
    "objective.sigma_data": PROCESS,
    "objective.variance": ACTS,
    "objective.caption_dropout": ACTS,
    "augmentation.schedule": PROCESS,
    "augmentation.train_range": ACTS,
    "augmentation.sample_level": ACTS,
    "augmentation.resize": PROCESS,
    "sampling": ACTS,
    # data and text
    "data.samples": DATA,
    "data.shards": ACTS,
    "data.weights": DATA,
    "data.validation": ACTS,
    "data.shapes": DATA,
    "data.cache": ACTS,
    "data.cache_gb": ACTS,
    "data.remote": ACTS,
    "data.threads": ACTS,
    "data.max_bad_share": ACTS,
    "data.caption_key": ACTS,
    "data.where": ACTS,
    "data.flip": ACTS,
    "data.buckets": DATA,
    "text.encoder": TEXT,
    "text.random_weights": ACTS,
    "text.revision": TEXT,
    "text.max_length": ACTS,
    "text.encoding": TEXT,
    "text.cache": ACTS,
    "text.batch_size": ACTS,
    "text.dtype": ACTS,
    # the loop
    "train.run": ACTS,
    "train.seed": DATA,
    "train.steps": ACTS,
    "train.epochs": ACTS,
    "train.ema": ACTS,
    "train.init_from": START,
    "train.lora": ADAPTERS,
    "train.distill": ACTS,
    "train.log_every": ACTS,
    "train.checkpoint_every": ACTS,
    "train.keep_checkpoints": ACTS,
    "train.keep_every": ACTS,
    "train.validate_every": ACTS,
    "train.validation_samples": ACTS,
    "train.profile": ACTS,
    "train.sample_every": ACTS,
    "train.sample_count": ACTS,
    "train.compile": ACTS,
    "train.cudnn_benchmark": ACTS,
    "train.max_nonfinite": ACTS,
    "train.timeouts": ACTS,
    # DeepSpeed
    "processes": ACTS,
    "optimizer.type": OPTIMIZER,
}
"""By key or section; the longest that fits counts. DeepSpeed's other keys act: it reads them anew at every start."""

COMMIT = re.compile("[0-9a-f]{40}")

OWN_SECTIONS = {*StageConfig.model_fields, "data", "text", "train"}
"""First parts of the keys that are not DeepSpeed's."""


def settings_of(
    config: FastimagenConfig,
    stage: StageConfig,
    *,
    steps: int,
    epochs: float | None,
    lowres_size: int | None,
    deepspeed: dict[str, Any],
    processes: int,
    shards: Sequence[Shard | ListedShard] | None,
) -> dict[str, Any]:
    """All that the training of a stage depends on, as JSON values by dotted key.

    steps, epochs: of the stage. lowres_size: of the images that it enlarges. deepspeed: resolved. shards: of the
    training samples, for data.samples, which lets them move; None leaves it out.
    """
    own = config.train.stages.get(stage.name, StageTrainConfig())
    train = config.train.model_dump(mode="json", exclude={"stages"})
    train |= {"steps": steps, "epochs": epochs, "init_from": own.init_from, **settings_of_adapters(stage.name, own)}
    train["ema"] = (own.ema or config.train.ema).model_dump(mode="json")
    data, text = config.data.model_dump(mode="json"), config.text.model_dump(mode="json")
    if shards is not None:
        data["samples"] = describe_samples(shards)
    if config.data.mixture:
        data["weights"] = {source.name: source.weight for source in config.data.mixture}
    if not data["buckets"]:
        del data["buckets"]  # which earlier checkpoints do not have either
    text["encoder"] = Path(config.text.encoder).name  # a folder may move; the embedding cache knows its content
    sections = {"data": data, "text": text, "train": train}
    own_fields = stage.model_dump(mode="json") | {"lowres_size": lowres_size}
    return json.loads(json.dumps(flatten({"processes": processes, **deepspeed, **own_fields, **sections})))


def without_deepspeed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what depends on DeepSpeed and the number of processes."""
    return {key: value for key, value in settings.items() if _section(key) in OWN_SECTIONS}


def check_resuming(
    where: Path, stage: str, saved: dict[str, Any], now: dict[str, Any], *, step: int, samples: int
) -> list[str]:
    """A line for each key that acts from the step after `step` on, when `samples` samples have been read.

    saved, now: settings of the checkpoint `where`, and those to resume with. Raises ValueError that names all refused
    keys, and the way out.
    """
    changed = differences(saved, now)
    _refuse(where, stage, {key: text for key, text in changed.items() if refusal(key, saved, now)}, saved, now)
    lines = [f"{stage}: {key} {text} from step {step + 1} on" for key, text in changed.items()]
    if "train_batch_size" in changed:
        lines.append(f"{stage}: the data continue with sample {samples}: none is repeated or left out")
    return lines


def check_trained(where: Path, stage: str, saved: dict[str, Any], now: dict[str, Any], *, step: int) -> list[str]:
    """A line for each key that differs from what a stage was trained with that does not train now.

    Raises ValueError if the stage itself differs, or the text encoder, which all stages of an exported model share.
    """
    changed = differences(saved, now)
    changed.pop("data.samples", None)  # the data of a trained stage may be gone
    exported = {key: text for key, text in changed.items() if _section(key) in {*StageConfig.model_fields, "text"}}
    _refuse(where, stage, {key: text for key, text in exported.items() if refusal(key, saved, now)}, saved, now)
    return [f"{stage}: {key} {text} does not change it: trained to step {step}" for key, text in changed.items()]


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """A text such as "0.1 -> 0.2" for each key whose values differ."""
    keys = [*now, *(key for key in saved if key not in now)]
    # An earlier fastimagen did not record the commit, and nobody looks it up when nothing is left to train.
    if not all(COMMIT.fullmatch(settings.get("text.revision") or "") for settings in (saved, now)):
        keys = [key for key in keys if key != "text.revision"]
    return {
        key: f"{_show(saved, key)} -> {_show(now, key)}"
        for key in keys
        if key not in saved or key not in now or saved[key] != now[key]
    }


def refusal(key: str, saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why a changed key is refused; None if it acts."""
    if key == "optimizer.type" and {str(saved.get(key)).lower(), str(now.get(key)).lower()} == {"adam", "adamw"}:
        return None  # they have the same state
    if key == "train_batch_size" and "data.buckets" in now:
        return BATCHES
    rule = rule_of(key)
    return None if rule == ACTS else rule


def rule_of(key: str) -> str:
    """The rule of a dotted key: ACTS, or why a change is refused."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (rule := RULES.get(".".join(parts[:end]))) is not None:
            return rule
    assert parts[0] not in OWN_SECTIONS, f"train/resume.py has no rule for {key}"
    return ACTS


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _refuse(where: Path, stage: str, texts: dict[str, str], saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError that names these keys, if there are any."""
    if not texts:
        return
    reasons = {key: refusal(key, saved, now) for key in texts}
    listed = "; ".join(f"{key} {text} ({reasons[key]})" for key, text in texts.items())
    way_out = "choose another --run-dir"
    if NETWORK not in reasons.values():
        key = f"fastimagen.train.stages.{stage}.init_from"
        way_out += f", which may start from these weights (fastimagen export, {key})"
    raise ValueError(f"{where} cannot resume with {listed}: restore what it was trained with, or {way_out}")


def _section(key: str) -> str:
    return key.split(".")[0]


def _show(settings: dict[str, Any], key: str) -> str:
    text = json.dumps(settings[key]) if key in settings else "not set"
    if key == "data.samples":  # its text is compared with that of older checkpoints
        text = text.replace(" in 1 shards", " in 1 shard")
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe_samples(shards: Sequence[Shard | ListedShard]) -> str:
    """The number of samples, and a hash that changes with names, sizes and order of the shards, wherever they are."""
    digest = blake2b(digest_size=8)
    for shard in shards:
        digest.update(json.dumps([Path(shard.path).name, len(shard), *shard.ends]).encode())
    return f"{sum(map(len, shards))} in {len(shards)} shards, {digest.hexdigest()}"
