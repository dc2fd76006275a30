"""ds.json from disk to a checked configuration, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from .config import Config, FastimagenConfig, Section
from .files import read_json_object


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read ds.json and apply overrides of the form ``a.b=value`` (values are JSON, or else strings).

    Paths start at the top of the file: ``train_batch_size=64``, ``fastimagen.train.steps=10``.
    Raises ValueError with one line: missing file, broken JSON, unknown or contradictory key.
    """
    tree = read_json_object(path)
    for override in overrides:
        _apply(tree, override)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Validate the content of a ds.json. Raises ValueError with one line."""
    deepspeed = {key: value for key, value in tree.items() if key != "fastimagen"}
    if (nearest := difflib.get_close_matches("fastimagen", deepspeed, n=1, cutoff=0.7)) and "fastimagen" not in tree:
        raise ValueError(f'unknown key "{nearest[0]}"; did you mean "fastimagen"?')
    return Config(deepspeed=deepspeed, fastimagen=validate(FastimagenConfig, tree.get("fastimagen", {}), "fastimagen"))


def validate(section: type[Section], value: Any, where: str) -> Any:
    """`section` built from `value`; a mistake becomes a ValueError of one line that starts with its key."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise ValueError(_explain(section, error, where)) from None


def _explain(section: type[Section], error: ValidationError, where: str) -> str:
    """The first mistake in one line, with the nearest valid key where a key is unknown."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    steps = _steps(problem)
    key = ".".join([where, *steps])
    others = len({tuple(_steps(other)) for other in problems}) - 1  # alternatives of one field are one mistake
    more = f" (and {others} more)" if others and not unknown else ""
    if problem["type"] == "extra_forbidden":
        owner = _section_at(section, steps[:-1])
        valid = sorted(owner.model_fields) if owner else []
        near = difflib.get_close_matches(steps[-1], valid, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    given = (
        ""
        if isinstance(problem["input"], (dict, list)) or problem["type"] == "missing"
        else f" (given: {problem['input']!r})"
    )
    return f"{key}: {message}{given}{more}"


def _steps(problem: Any) -> list[str]:
    """The keys and indices that lead to a mistake, without pydantic's names for the alternatives of a field."""
    alternatives = re.compile(r"<\w+>|int|bool|str|tuple\[.*")
    return [str(step) for step in problem["loc"] if not alternatives.fullmatch(str(step))]


def _section_at(section: type[Section], steps: list[str]) -> type[Section] | None:
    """The section class that the path `steps` leads to, through optionals, tuples and dicts."""
    for step in steps:
        field = section.model_fields.get(step)  # an index or a dict's key is no field: stay
        found = _section_in(field.annotation) if field else section
        if found is None:
            return None
        section = found
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"--set takes KEY=VALUE, got {override!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {override}: {parent} is not a section")
    tree[leaf] = value
