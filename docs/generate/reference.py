"""The generated pages of the reference: every field of the configuration, every command, every public name of Python.

Imports fastimagen, and nothing of MkDocs: the tests read the pages without building a site.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

import fastimagen
from fastimagen import cli, ops
from fastimagen.config import FastimagenConfig
from fastimagen.section import Section

TYPES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", NoneType: "`null`", Any: "any value"}
MAX_SIGNATURE = 90
"""Characters; longer signatures have one parameter per line."""
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "multiple of"}
CONFIGURATION = """# Configuration

Every key below `"fastimagen"` in the configuration file, with its type and default. [Training](../training.md)
describes the file, [your own cascade](../cascades.md) how to choose the stages. `STAGE` stands for the name of a
stage. DeepSpeed's own keys stand at the top level of the file; its documentation describes them.

`--set KEY=VALUE` overrides any key: `--set fastimagen.train.seed=1`.
"""
COMMANDS = """# Commands

Every command of `fastimagen` and its flags. `fastimagen COMMAND --help` prints the same. `python -m fastimagen` is the
same program.
"""
PYTHON = """# Python

The public names: `from fastimagen import ImagenPipeline`. The letters in shapes are B batch, C channels, H and W height
and width, L text tokens, E width of the text embeddings, N image tokens, A heads, D channels per head; a lower-case h
or w is that of a low-resolution image. [The glossary](../glossary.md) explains the words.
"""


def pages() -> dict[str, str]:
    """Markdown by the page's path in docs/."""
    return {
        "reference/configuration.md": configuration(),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
    }


# ---- configuration


def configuration() -> str:
    """A table for each section, in the order of the tree."""
    parts, titles = [CONFIGURATION], set()
    for section, paths in sections(FastimagenConfig).items():
        title = re.sub(r"^.*\.(?!STAGE|NAME)", "", paths[0])  # the last part, or stages.STAGE, shards.NAME
        title += f", {section.__name__}" if title in titles else ""
        titles.add(title)
        places = " and ".join(f"`{path}`" for path in paths)
        rows = [_row(name, field) for name, field in section.model_fields.items()]
        parts += [
            f"## {title} {{ #{_anchor(section)} }}",
            _doc(section),
            f"In the file: {places}. In Python: `{section.__name__}`.",
        ]
        parts.append("\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _anchor(section: type[Section]) -> str:
    return section.__name__.lower()


def sections(root: type[Section], path: str = "fastimagen") -> dict[type[Section], list[str]]:
    """Every section below `root`, with all its places in the file, in the order of the tree."""
    found: dict[type[Section], list[str]] = {root: [path]}
    for name, field in root.model_fields.items():
        for child, below in _children(field.annotation, f"{path}.{name}"):
            for section, paths in sections(child, below).items():
                found.setdefault(section, []).extend(paths)
    return found


def _children(annotation: Any, path: str) -> Iterator[tuple[type[Section], str]]:
    """The sections in a field's annotation. Those in a list or an object stand one level deeper."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, path
        return
    contains = get_origin(annotation) in (tuple, list, dict)
    for argument in get_args(annotation):
        element = "STAGE" if path.endswith("stages") else "NAME"
        yield from _children(argument, f"{path}.{element}" if contains else path)


def _row(name: str, field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    limits = [
        f"{word} {getattr(item, key)}" for item in field.metadata for key, word in LIMITS.items() if _has(item, key)
    ]
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "`{}`" if isinstance(value, Section) else f"`{json.dumps(value)}`"
    description = re.sub(r"\bNone\b", "`null`", field.description or "")
    return f"| `{name}` | {', '.join([kind, *limits])} | {default} | {_cell(description)} |"


def _has(item: Any, key: str) -> bool:
    return getattr(item, key, None) is not None


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, arguments))
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (tuple, list):
        if arguments[-1] is Ellipsis or origin is list:
            return f"list of {_kind(arguments[0])}"
        return f"[{', '.join(map(_kind, arguments))}]"
    if origin is dict:
        return "object" if arguments[1] is Any else f"object of {_kind(arguments[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"[{annotation.__name__}](#{_anchor(annotation)})"
    return TYPES[annotation]


# ---- commands


def commands() -> str:
    return COMMANDS + "".join(_command(parser) for parser in parsers(cli.parser()))


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser of every command, in the order of --help; a command with subcommands is not listed itself."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return [parser]
    return [leaf for action in below for choice in action.choices.values() for leaf in parsers(choice)]


def _command(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        value = "" if action.nargs == 0 else f" {formatter._format_args(action, _value_name(action))}"
        flags = ", ".join(f"`{flag}{value}`" for flag in action.option_strings) or f"`{action.dest.upper()}`"
        text = formatter._expand_help(action) if action.help else ""
        if action.required and action.option_strings:
            text = f"required; {text}"
        rows.append(f"| {_cell(flags)} | {_cell(text)} |")
    table = "\n".join(["| argument | meaning |", "| --- | --- |", *rows]) if rows else "It takes no arguments."
    description = parser.description or ""
    return f"\n## {parser.prog}\n\n{_text(description)}\n\n{table}\n"


def _value_name(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


# ---- Python


def python() -> str:
    """Signature and docstring of every public class and its methods, and of the fused ops."""
    parts = [PYTHON]
    for name in fastimagen.__all__:
        item = getattr(fastimagen, name)
        if inspect.isclass(item):
            parts += [f"## {name}", *_class(item)]
    parts += ["## Fused operations", "`from fastimagen import ops`. [Kernels](../kernels.md) describes the backends."]
    for name in ops.__all__:
        parts += [f"### ops.{_text(name)}", _signature(name, getattr(ops, name)), _doc(getattr(ops, name))]
    return "\n\n".join(parts) + "\n"


def _class(item: type) -> list[str]:
    if issubclass(item, Section):
        return [_doc(item), f"Its fields: [configuration](configuration.md#{_anchor(item)})."]
    parts = [_signature(item.__name__, item), _doc(item)]
    for name, member in vars(item).items():
        if inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod)):
            bound = getattr(item, name)
            if bound.__doc__ and (not name.startswith("_") or name == "__call__"):
                parts += [f"### {item.__name__}.{_text(name)}", _signature(name, bound), _doc(bound)]
    return parts


class _Bare(str):
    """An annotation that prints without quotes."""

    __repr__ = str.__str__


def _signature(name: str, item: Any) -> str:
    """`name` with the parameters and the result of `item`, on one line if it fits."""
    signature = inspect.signature(item)
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    returns = _bare(signature.return_annotation)
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=returns)}".removesuffix(" -> None")
    if len(line) > MAX_SIGNATURE:
        inner = [str(parameter) for parameter in parameters]
        first_keyword = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
        if first_keyword is not None:
            inner.insert(first_keyword, "*")
        arrow = "" if returns in (signature.empty, "None") else f" -> {returns}"
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in inner) + f"){arrow}"
    return f"```python\n{line}\n```"


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


# ---- Markdown


def _doc(item: Any) -> str:
    return _text(inspect.getdoc(item) or "")


def _text(words: str) -> str:
    """A docstring as Markdown: flags are code; nothing else is emphasis, HTML or attributes."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", words)
    for i in range(0, len(parts), 2):
        escaped = parts[i].replace("*", r"\*").replace("<", "&lt;").replace("_", r"\_").replace("{", "&#123;")
        parts[i] = re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", escaped)
    return "".join(parts)


def _cell(words: str) -> str:
    return _text(" ".join(words.split())).replace("|", r"\|")
