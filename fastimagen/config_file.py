"""Reads and checks ds.json. Every mistake in it becomes an error of one line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import Tag, ValidationError

from .config import Config, FastimagenConfig
from .files import read_json_object
from .section import Section

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ds.json and apply overrides ``a.b=value``, whose values are JSON or else strings.

    Keys start at the top level of the file: ``train_batch_size=64``, ``fastimagen.train.steps=10``. Elements of a list
    are found by number or by name: ``fastimagen.cascade.stages.base64.size=64``. That key changes a preset as well.
    Raises ValueError with one line for a missing file, invalid JSON and unknown or contradictory keys.
    """
    content = read_json_object(path)
    for override in overrides:
        _apply_override(content, override)
    return config_from_dict(content)


def config_from_dict(content: dict[str, Any]) -> Config:
    """Validate the content of a ds.json. Raises ValueError with one line."""
    deepspeed = {key: value for key, value in content.items() if key != "fastimagen"}
    if "fastimagen" not in content:  # a misspelled section would otherwise be passed on to DeepSpeed
        near = difflib.get_close_matches("fastimagen", deepspeed, n=1, cutoff=0.7)
        if near:
            raise ValueError(f'unknown key "{near[0]}"; did you mean "fastimagen"?')
    section = validate(FastimagenConfig, content.get("fastimagen", {}), "fastimagen")
    return Config(deepspeed=deepspeed, fastimagen=section)


def validate(section: type[S], value: Any, where: str) -> S:
    """A `section` from `value`. Raises ValueError with one line that starts with the key of the first mistake."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise ValueError(_error_line(section, error, where)) from None


def _error_line(section: type[Section], error: ValidationError, where: str) -> str:
    """The first mistake in one line. Unknown keys come first, because they often cause the other mistakes."""
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return _unknown_key_line(section, problem["loc"], where)
    problem = problems[0]
    key = ".".join([where, *_key_path(problem["loc"])])
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    if problem["type"] != "missing" and not isinstance(value, (dict, list)):
        message += f" (given: {value!r})"
    others = len({tuple(_key_path(other["loc"])) for other in problems}) - 1  # the types of one field are one mistake
    if others:
        message += f" (and {others} more)"
    return f"{key}: {message}"


def _unknown_key_line(section: type[Section], location: tuple[int | str, ...], where: str) -> str:
    valid = sorted({key for owner in _sections_at([section], location[:-1]) for key in owner.model_fields})
    path = _key_path(location)
    return f"unknown key {'.'.join([where, *path])}; {hint(path[-1], valid, 'valid keys')}"


OTHER_NAMES = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "prompt": "captions",
    "negative_prompt": "negative",
    "num_images_per_prompt": "count",
    "generator": "seed",
    "image": "init_image",
    "mask_image": "init_image",
    "callback_on_step_end": "callback",
}
"""What other libraries call our settings and arguments, where the nearest name is not the right one."""


def hint(name: str, valid: Iterable[str], label: str) -> str:
    """What an error about an unknown name ends with: the nearest valid one, or `label` and all of them."""
    valid = list(valid)
    same = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in valid else []
    near = same or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else f"{label}: {', '.join(valid)}"


def _key_path(location: tuple[int | str, ...]) -> list[str]:
    """Keys and indices of a pydantic location, without the names that pydantic adds for the types of a field."""
    type_name = re.compile(r"<\w+>|int|bool|str|tuple\[.*")
    return [str(step) for step in location if not type_name.fullmatch(str(step))]


def _sections_at(sections: list[type[Section]], location: tuple[int | str, ...]) -> list[type[Section]]:
    """The section classes that may stand at a pydantic location below one of `sections`, through unions, tuples and
    dicts. The tags in the location choose the members of unions."""
    for index, step in enumerate(location):
        fields = [section.model_fields[str(step)] for section in sections if step in section.model_fields]
        if fields:  # else an index of a tuple, a key of a dict or a tag
            tag = next((Tag(str(after)) for after in location[index + 1 : index + 2]), None)
            sections = [found for field in fields for found in _sections_in(field.annotation, tag)]
    return sections


def _sections_in(annotation: Any, tag: Tag | None) -> list[type[Section]]:
    """The section classes in the annotation of a field, such as `tuple[StageConfig, ...]`; of a tagged union those of
    one tag."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    members = get_args(annotation)
    if any(tag in get_args(member) for member in members):
        members = tuple(member for member in members if tag in get_args(member))
    return [found for member in members for found in _sections_in(member, None)]


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set one key of `content` from KEY=VALUE."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"--set takes KEY=VALUE, got {override!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, leaf = path.split(".")
    node: Any = content
    for depth, key in enumerate(parents):
        node = _descend(node, key, override)
        if parents[: depth + 1] == ["fastimagen", "cascade"] and isinstance(node, str):
            content["fastimagen"]["cascade"] = node = {"preset": node}
        if not isinstance(node, (dict, list)):
            raise ValueError(f"--set {override}: {key} is not a section")
    node[leaf if isinstance(node, dict) else _list_index(node, leaf, override)] = value


def _descend(node: Any, key: str, override: str) -> Any:
    """The value of `key` in a section, which is added if it is missing, or the element of a list."""
    if isinstance(node, list):
        return node[_list_index(node, key, override)]
    if key == "cascade":
        return node.setdefault(key, FastimagenConfig().cascade)
    return node.setdefault(key, {})


def _list_index(elements: list[Any], key: str, override: str) -> int:
    """The index of a list's element, by number or by its "name". Raises ValueError that lists the choices."""
    names = [element.get("name") if isinstance(element, dict) else None for element in elements]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(elements):
        return int(key)
    choices = [*map(str, range(len(elements))), *(str(name) for name in names if name is not None)]
    raise ValueError(f"--set {override}: there is no element {key}; the list has {', '.join(choices)}")
