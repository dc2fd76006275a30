"""Unknown keys and names in the DeepSpeed part of ds.json. DeepSpeed ignores them or answers with a traceback."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, KeysView, Mapping
from typing import Any, get_args

from ..config_file import hint
from ..extras import import_extra

MUON_PARAMS = ("muon_lr", "adam_lr", "torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach", "fused")
"""Of DeepSpeed 0.19.8's Muon, beside those of its two halves."""


class _Recorded(dict):
    """A dict that notes which keys are looked up."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.known: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.known.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.known.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # dict's own view would look keys up unnoticed
        return KeysView(self)


def check_deepspeed_keys(resolved: dict[str, Any]) -> None:
    """Raise ValueError, with one line that names the nearest valid one, for a key or name that DeepSpeed does not know.

    resolved: what `resolve_deepspeed` returns. DeepSpeed has no list of its top-level keys. Valid are those that it
    looks up while it reads the configuration; in the sections it refuses unknown keys itself.
    """
    import_extra("deepspeed", user="training", extra="train")
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from pydantic import ValidationError
    from torch import optim

    # The batch sizes are checked already. Without the total DeepSpeed accepts any number of processes: that of the
    # process group, or 1 in a dry run.
    recorded = _Recorded({key: copy.deepcopy(value) for key, value in resolved.items() if key != "train_batch_size"})
    try:
        DeepSpeedConfig(recorded)
    except ValidationError as error:
        raise ValueError(section_error(error, resolved)) from None
    _require_known(resolved, recorded.known)
    torch_optimizers = [name for name, value in vars(optim).items() if isinstance(value, type)]
    _require_name("optimizer", resolved, [*DEEPSPEED_OPTIMIZERS, *torch_optimizers])
    _require_name("scheduler", resolved, lr_schedules.VALID_LR_SCHEDULES)
    if resolved["optimizer"]["type"].lower() == "muon":  # other optimizers refuse unknown parameters themselves
        from deepspeed.runtime.engine import DeepSpeedEngine

        muon = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, *MUON_PARAMS}
        _require_known(resolved["optimizer"].get("params", {}), muon, "optimizer.params.")
    if scheduler := resolved.get("scheduler", {}).get("type"):
        accepted = inspect.signature(getattr(lr_schedules, scheduler)).parameters.keys() - {"optimizer"}
        _require_known(resolved["scheduler"].get("params", {}), accepted, "scheduler.params.")


def section_error(error: Any, resolved: dict[str, Any]) -> str:
    """The first mistake of pydantic's ValidationError for one of DeepSpeed's sections, in one line."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    first = error.errors()[0]
    *parents, key = location = [str(step) for step in first["loc"]]
    path = ".".join(next(_paths(resolved, key), location))
    if first["type"] != "extra_forbidden":
        return f"DeepSpeed key {path}: {first['msg']}"
    sections = [section for section in _subclasses(DeepSpeedConfigModel) if section.__name__ == error.title]
    for parent in parents:
        annotations = [section.model_fields[parent].annotation for section in sections]
        sections = [found for annotation in annotations for found in (annotation, *get_args(annotation))]
        sections = [found for found in sections if hasattr(found, "model_fields")]
    valid = [name for section in sections for name in section.model_fields]
    return f"unknown DeepSpeed key {path}; {hint(key, valid, 'valid keys')}"


def _paths(tree: Mapping[str, Any], key: str) -> Iterator[list[str]]:
    """The paths at which a key stands in a section of `tree`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if key in value:
                yield [name, key]
            yield from ([name, *path] for path in _paths(value, key))


def _subclasses(owner: Any) -> Iterator[Any]:
    for child in owner.__subclasses__():
        yield child
        yield from _subclasses(child)


def _require_known(given: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown DeepSpeed key {prefix}{key}; {hint(key, sorted(known), 'valid keys')}")


def _require_name(section: str, resolved: dict[str, Any], valid: list[str]) -> None:
    name = resolved.get(section, {}).get("type")
    if name is not None and name not in valid and name.lower() not in valid:
        raise ValueError(f'unknown DeepSpeed {section}.type "{name}"; {hint(name, valid, "valid types")}')
