"""The keys of DeepSpeed: which exist, of which type, with which default.

DeepSpeed has no list of them. Sections are pydantic models, or dicts in which it looks up what it knows; the top level
is such a dict. There it ignores other keys, and takes values of any type.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, KeysView, Mapping
from functools import cache
from typing import Any, NamedTuple, get_args

from ..config_file import hint
from ..extras import import_extra
from ..files import first_line

MISSING = inspect.Parameter.empty
"""The default of a key that does not exist, or has none."""

DICT_SECTIONS = ("data_types", "torch_autocast", "flops_profiler")
"""Sections without a pydantic model that the configuration may have."""

DTYPES = ("bf16", "fp16", "fp32")
"""Of data_types."""

TOP_LEVEL = ("optimizer", "scheduler", "timers")
"""Sections that are checked by what they stand for."""


class _Recorded(dict):
    """A dict that notes which keys are looked up, and with which default."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.known: dict[str, Any] = {}

    def __contains__(self, key: object) -> bool:
        self.known.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.known.setdefault(key, None)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if self.known.get(key) is None:
            self.known[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)  # dict's own view would look keys up unnoticed


class Known(NamedTuple):
    """defaults: of the keys without a model, by section, "" is the top level. models: of the sections with one."""

    defaults: dict[str, dict[str, Any]]
    models: dict[str, Any]


@cache
def known_keys() -> Known:
    """All keys of the installed DeepSpeed."""
    import_extra("deepspeed", user="training", extra="train")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {name: _Recorded({}) for name in DICT_SECTIONS}
    # Without the total, DeepSpeed accepts any number of processes.
    top = _Recorded({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **sections})
    DeepSpeedConfig(top)
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
    }
    return Known({"": top.known} | {name: section.known for name, section in sections.items()}, models)


def default_of(path: str) -> Any:
    """DeepSpeed's default of the key at a dotted path; None is "not set", MISSING is no such key, or none."""
    known = known_keys()
    section, _, key = path.rpartition(".")
    if section in known.defaults:
        return known.defaults[section].get(key, MISSING)
    first, *steps = section.split(".")
    models = [known.models[first]] if first in known.models else []
    for step in steps:
        models = [inner for model in models for inner in _models_in(_fields(model).get(step))]
    for model in models:
        field = _fields(model).get(key)
        if field is not None:
            default = field.get_default(call_default_factory=False)
            return int(default) if isinstance(default, int) and not isinstance(default, bool) else default
    return MISSING


def check_keys(tree: dict[str, Any]) -> None:
    """Raise ValueError, with one line that names the nearest valid one, for a key that DeepSpeed does not know.

    Values may be "auto". Of "optimizer" and "scheduler" only the top level is checked.
    """
    known = known_keys()
    require_known(tree, {*known.defaults[""], *known.models, *TOP_LEVEL}, "")
    for name, section in tree.items():
        is_section = name in known.models or name in known.defaults or name in TOP_LEVEL
        if is_section and not isinstance(section, dict):
            raise ValueError(f"DeepSpeed key {name} must be an object, got {section!r}")
        if name in known.models:
            _check_names(section, [known.models[name]], f"{name}.")
        elif name in known.defaults and name != "":
            require_known(section, known.defaults[name], f"{name}.")
    require_known(tree.get("optimizer", {}), ("type", "params", "legacy_fusion"), "optimizer.")
    require_known(tree.get("scheduler", {}), ("type", "params"), "scheduler.")
    require_known(tree.get("timers", {}), ("throughput",), "timers.")


def check_values(tree: dict[str, Any]) -> None:
    """Raise ValueError, with one line that begins with the key, for a value that DeepSpeed would not take.

    tree: without "auto". Numbers, true and false in quotes are errors; DeepSpeed takes them for text at the top level,
    and converts them in sections.
    """
    from pydantic import ValidationError

    known = known_keys()
    for section, defaults in known.defaults.items():
        for key, value in (tree if section == "" else tree.get(section, {})).items():
            check_type(f"{section}.{key}" if section else key, value, defaults.get(key))
    for key, value in tree.get("data_types", {}).items():
        if key.endswith("dtype") and value is not None and value not in DTYPES:
            raise ValueError(f"DeepSpeed key data_types.{key} must be one of {_quoted(DTYPES)}, got {value!r}")
    for name, model in known.models.items():
        if name not in tree:
            continue
        _check_types(tree[name], [model], f"{name}.")
        try:
            model(**tree[name])
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join([name, *(str(step) for step in first["loc"])])
            message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            raise ValueError(f"DeepSpeed key {path}: {message}") from None
    timers = tree.get("timers", {}).get("throughput", {})
    require_known(timers, ("enabled", "synchronized"), "timers.throughput.")


def check_as_a_whole(resolved: dict[str, Any]) -> None:
    """Raise ValueError, with one line, for keys that DeepSpeed refuses together.

    resolved: what `resolve_deepspeed` returns. What only training finds out is in engine.make_engine.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    # The batch sizes are checked already. Without the total DeepSpeed accepts any number of processes: that of the
    # process group, or 1 in a dry run.
    whole = {key: copy.deepcopy(value) for key, value in resolved.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(whole)
    except Exception as error:  # ValueError, AssertionError, and DeepSpeedConfigError, which is an Exception
        raise ValueError(f"DeepSpeed refuses this configuration: {first_line(error)}") from None


def check_type(path: str, value: Any, default: Any) -> None:
    """Raise ValueError if the default is a number, or true or false, and the value is not."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        return
    if not fits:
        raise ValueError(f"DeepSpeed key {path} must be {wanted}, got {value!r}{_without_quotes(value)}")


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _without_quotes(value: Any) -> str:
    """What to say about a number or a truth value in quotes."""
    if not isinstance(value, str):
        return ""
    if value.lower() in ("true", "false"):
        return f": write {value.lower()}, without quotes"
    try:
        float(value)
    except ValueError:
        return ""
    return f": write {value}, without quotes"


def _fields(model: Any) -> dict[str, Any]:
    """The fields of a model by name and by alias."""
    return {name: field for key, field in model.model_fields.items() for name in (key, field.alias) if name}


def _models_in(field: Any) -> Iterator[Any]:
    """The models that the value of a field may be."""
    annotation = None if field is None else field.annotation
    for found in (annotation, *get_args(annotation)):
        if hasattr(found, "model_fields"):
            yield found


def _check_names(section: dict[str, Any], models: list[Any], prefix: str) -> None:
    fields = {name: field for model in models for name, field in _fields(model).items()}
    require_known(section, fields, prefix)
    for key, value in section.items():
        inner = list(_models_in(fields[key]))
        if inner and isinstance(value, dict):
            _check_names(value, inner, f"{prefix}{key}.")


def _check_types(section: dict[str, Any], models: list[Any], prefix: str) -> None:
    for key, value in section.items():
        for field in [fields[key] for fields in map(_fields, models) if key in fields]:
            inner = list(_models_in(field))
            if inner and isinstance(value, dict):
                _check_types(value, inner, f"{prefix}{key}.")
            elif value is not None:
                check_type(f"{prefix}{key}", value, field.get_default(call_default_factory=False))


def require_known(given: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    """Raise ValueError that names the nearest valid one for a key that is not known."""
    for key in given:
        if key not in known:
            raise ValueError(f"unknown DeepSpeed key {prefix}{key}; {hint(key, sorted(known), 'valid keys')}")
