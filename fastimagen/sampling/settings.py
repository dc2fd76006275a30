"""Sampling settings as users give them: by name, one value for all stages or one for each of several stages.

The settings are the fields of SamplingConfig. The command line, the web page and samples.json are made from those
fields, so a new field appears in all three. Imports without torch, because `fastimagen sample --help` needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from ..config import SamplingConfig
from ..config_file import hint, validate

Offload = Literal["auto", "always", "never"]
"""When a stage's weights are on the GPU: "always" offloads them while other stages run, "auto" only if they fill it."""


@dataclass(frozen=True)
class Setting:
    """One field of SamplingConfig, as a command line flag or a control of the web page needs it."""

    name: str
    kind: type
    """bool, int, float, str, or tuple for a range low:high; str also for the choices of a Literal."""
    choices: tuple[str, ...]
    """The values of a Literal; empty for numbers."""
    optional: bool
    """Whether None is allowed."""
    default: Any
    minimum: float | None
    maximum: float | None
    excludes_minimum: bool
    help: str

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, where: str) -> Any:
        """`value`, a string included, in the field's type. Raises ValueError that starts with `where`."""
        try:
            return getattr(validate(SamplingConfig, {self.name: value}, "sampling"), self.name)
        except ValueError as error:
            problem = str(error).removeprefix(f"sampling.{self.name}: ")
            raise ValueError(f"{where}: {problem}") from None

    def text(self, value: Any) -> str:
        """`value` as a user writes it, and `check` reads it; empty for None."""
        if value is None:
            return ""
        return ":".join(f"{bound:g}" for bound in value) if self.kind is tuple else str(value)

    def parse(self, text: str, where: str) -> Any:
        """A value from `20`, or values by stage from `base=20,sr=8`. Raises ValueError that starts with `where`."""
        if "=" not in text:
            return self.check(text, where)
        by_stage: dict[str, Any] = {}
        for part in text.split(","):
            stage, equals, value = part.strip().partition("=")
            if not stage or not equals or stage in by_stage:
                raise ValueError(f"{where}: give one value, or one for each stage as in base=A,sr=B (given: {text!r})")
            by_stage[stage] = self.check(value, f"{where} {stage}")
        return by_stage


def sampling_settings() -> Iterator[Setting]:
    """Every field of SamplingConfig, in order."""
    for name, field in SamplingConfig.model_fields.items():
        annotation: Any = field.annotation
        members = get_args(annotation)
        optional = NoneType in members
        if optional:
            annotation = next(member for member in members if member is not NoneType)
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        is_choice = get_origin(annotation) is Literal
        bounds: dict[str, Any] = {}
        for constraint in field.metadata:  # annotated_types: Ge(ge=1), Le(le=1), ...
            for bound in ("ge", "gt", "le", "lt"):
                if hasattr(constraint, bound):
                    bounds[bound] = getattr(constraint, bound)
        yield Setting(
            name=name,
            kind=_kind(annotation),
            choices=get_args(annotation) if is_choice else (),
            optional=optional,
            default=field.default,
            minimum=bounds.get("ge", bounds.get("gt")),
            maximum=bounds.get("le", bounds.get("lt")),
            excludes_minimum="gt" in bounds,
            help=" ".join((field.description or name).split()),
        )


def _kind(annotation: Any) -> type:
    if annotation in (bool, int, float):
        return annotation
    return tuple if get_origin(annotation) is tuple else str


def require_known(settings: Mapping[str, Any], arguments: Iterable[str] = ()) -> None:
    """Raise ValueError that names the nearest setting if one of `settings` is not a field of SamplingConfig.

    arguments: other names that the caller takes, among which the nearest may be.
    """
    for name in settings:
        if name not in SamplingConfig.model_fields:
            known = hint(
                name, [*arguments, *SamplingConfig.model_fields], "valid names" if arguments else "valid settings"
            )
            raise ValueError(f'unknown sampling setting "{name}"; {known}')
