"""Conditions of data.where on the metadata of a sample, such as "width >= 256"."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """KEY OPERATOR VALUE. text: as the configuration has it."""

    text: str
    key: str
    compare: Callable[[Any, Any], bool]
    value: Any

    def problem(self, metadata: Mapping[str, Any]) -> str | None:
        """Why a sample is left out; None if it is not. A number may stand as text: CSV has no others."""
        found = _derived(self.key, metadata)
        if found is None:
            return f"{self.text} (no {self.key})"
        if isinstance(self.value, (int, float)) and isinstance(found, str):
            try:
                found = float(found)
            except ValueError:
                return f"{self.text} ({self.key} is not a number)"
        try:
            return None if self.compare(found, self.value) else self.text
        except TypeError:
            return f"{self.text} ({self.key} is of another type)"


def parse_conditions(texts: Sequence[str]) -> list[Condition]:
    """The conditions of data.where. Raises ValueError that names the one at fault."""
    conditions = []
    for text in texts:
        match = CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(
                f'fastimagen.data.where: "{text}" is not a condition: write a key, one of {", ".join(OPERATORS)} and a '
                f'value, such as "width >= 256"'
            )
        try:
            value = json.loads(match[3])
        except json.JSONDecodeError:
            value = match[3]
        if isinstance(value, (list, dict)) or (isinstance(value, str) and match[2] not in ("==", "!=")):
            raise ValueError(f'fastimagen.data.where: "{text}" compares with {match[3]}, which is not a number')
        conditions.append(Condition(text, match[1], OPERATORS[match[2]], value))
    return conditions


def _derived(key: str, metadata: Mapping[str, Any]) -> Any:
    """The value of a key. If the metadata have no "side" and "aspect" themselves: the shorter side, and the longer side
    divided by it."""
    if key in metadata or key not in ("side", "aspect"):
        return metadata.get(key)
    sides = [side for side in (metadata.get("width"), metadata.get("height")) if isinstance(side, (int, float))]
    if len(sides) < 2 or min(sides) <= 0:
        return None
    shorter, longer = sorted(sides)
    return shorter if key == "side" else longer / shorter
