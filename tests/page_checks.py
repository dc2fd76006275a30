"""Checks of Markdown pages: Python, commands, paths, links and the table of extras. Each returns one line per fault.

The Python blocks of a page run one after the other in one namespace, in a folder of their own, as a reader would type
them. A model directory given to `from_pretrained` is a toy model, and "cuda" becomes "cpu" where there is no GPU. A
block below the line `<!-- not run: reason -->` is compiled only. A `text` block directly below a Python block is what
the Python block prints.

Commands in shell blocks must be complete: their own parsers read them. Commands in inline code may leave out arguments
or use placeholders (`fastimagen sample --settings FILE`): command and flags must exist.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastimagen import cli
from fastimagen.config import Config, FastimagenConfig
from fastimagen.config_file import load_config, validate
from fastimagen.train import field_checks
from fastimagen.train.stage_setup import plan
from tests.conftest import ROOT

FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
PRINTED = re.compile(r"^```(?:python|py)\n(?P<code>.*?)^```\n\n```text\n(?P<output>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
INLINE_CODE = re.compile(r"`([^`]+)`")
REPOSITORY_PATH = re.compile(
    r"(?<![\w/])(?:\.\./)?((?:fastimagen|kernels|launch|benchmarks|tests|docs)/[\w./*-]*[\w*])"
)
SEPARATORS = ("&&", "||", ";", "|", ">", ">>", "&")
WRITTEN_BY_INIT = "mine.json"
"""The configuration that `fastimagen init` writes by default: pages use it in the commands that follow."""
Parse = Callable[[list[str]], argparse.Namespace]


def blocks(text: str, *languages: str) -> Iterator[tuple[str, str]]:
    """(code, note in the comment above it) of every fenced block in one of the languages."""
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            yield match["code"], match["note"] or ""


# ---- configurations


def configuration_problems(text: str, toy_model: Path) -> list[str]:
    """Resolve the cascade of every JSON block as training does, with an encoder of width 512, or the toy model's 64."""
    found = []
    for code, _ in blocks(text, "json"):
        section = json.loads(code)
        with tempfile.TemporaryDirectory() as folder:
            encoder = "t5_small"
            if "model" in section.get("cascade", {}):
                section["cascade"] |= {"model": str(toy_model), "stages": {}}
                (Path(folder) / "config.json").write_text('{"model_type": "t5", "d_model": 64}')
                encoder = folder
            try:
                config = validate(FastimagenConfig, {"text": {"encoder": encoder}, **section}, "fastimagen")
                with mock.patch.object(field_checks, "check_perceptual"):  # its files are the reader's
                    plan(Config(deepspeed={}, fastimagen=config))
            except ValueError as error:
                found.append(f"{code.strip()}: {error}")
    return found


# ---- Python


def python_problems(text: str, folder: Path, toy_model: Path) -> list[str]:
    """Run the Python blocks of a page inside `folder` until one fails."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    printed = {match["code"]: match["output"] for match in PRINTED.finditer(text)}
    for code, note in blocks(text, "python", "py"):
        expected, output = printed.get(code), io.StringIO()
        if not torch.cuda.is_available():
            code = code.replace('"cuda"', '"cpu"')
        try:
            compiled = compile(code, "block", "exec")
            if note.startswith("not run: "):
                continue
            _link_models(code, folder, toy_model)
            with contextlib.chdir(folder), contextlib.redirect_stdout(output):
                exec(compiled, namespace)
        except Exception as error:  # any error that a reader would see
            return [f"Python: {type(error).__name__}: {error}"]
        if expected not in (None, output.getvalue()):
            return [f"Python: the page shows {expected!r}, but the block prints {output.getvalue()!r}"]
    return []


def _link_models(code: str, folder: Path, toy_model: Path) -> None:
    """Make each model directory that the code loads a link to the toy model."""
    for name in re.findall(r'from_pretrained\("([^"]+)"', code):
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(toy_model)


# ---- commands


def commands(text: str) -> Iterator[list[str]]:
    """Every command of the shell blocks, split into words."""
    for code, _ in blocks(text, "bash", "sh", "shell", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            yield from _split(line.strip().removeprefix("$ "))


def inline_commands(text: str) -> Iterator[list[str]]:
    """Every command in inline code, split into words."""
    for code in INLINE_CODE.findall(FENCE.sub("", text)):
        if re.match(r"(make|fastimagen|python|deepspeed|torchrun|pip|\.venv/bin/python) ", " ".join(code.split())):
            yield from _split(" ".join(code.split()))


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line, each without the environment variables that are set in front of it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in SEPARATORS:
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)


def command_problems(text: str) -> list[str]:
    """Commands of the shell blocks that their parser refuses or that name files which do not exist."""
    return [problem for words in commands(text) for problem in _problems(words, complete=True)]


def inline_command_problems(text: str) -> list[str]:
    """Commands in inline code that do not exist or do not have the flags that are named."""
    return [problem for words in inline_commands(text) for problem in _problems(words, complete=False)]


def _problems(words: list[str], *, complete: bool) -> list[str]:
    check = _parsed if complete else _flags_known
    name, arguments = Path(words[0]).name, words[1:]
    if name == "make":
        return _make(arguments)
    if name == "fastimagen":
        return check(cli.parser().parse_args, arguments, words)
    if name not in ("pip", "pip3", "deepspeed", "torchrun", "python", "python3"):
        return []
    if name.startswith("pip") or arguments[:2] == ["-m", "pip"]:
        return _extras_installed(arguments)
    for flag in ("-m", "--module"):  # python -m MODULE, torchrun -m MODULE, deepspeed --module MODULE
        if flag in arguments:
            at = arguments.index(flag) + 1
            return _module(arguments[at], arguments[at + 1 :], words, check)
    script = next((i for i, word in enumerate(arguments) if re.fullmatch(r"(\./)?[\w/]+\.py", word)), None)
    if script is None:
        return []
    if not (ROOT / arguments[script]).is_file():
        return [f"{shlex.join(words)}: there is no {arguments[script]}"]
    if Path(arguments[script]).as_posix() == "launch/train.py":
        return check(cli.parser().parse_args, ["train", *arguments[script + 1 :]], words)
    return []


def _module(
    module: str, arguments: list[str], words: list[str], check: Callable[[Parse, list[str], list[str]], list[str]]
) -> list[str]:
    """`python -m module arguments`: fastimagen's command, pytest, or a module of the repository."""
    if module in ("fastimagen", "fastimagen.cli"):
        return check(cli.parser().parse_args, arguments, words)
    if module == "pytest":
        paths = [word.partition("::")[0] for word in arguments if "/" in word]
        return [f"{shlex.join(words)}: there is no {path}" for path in paths if not (ROOT / path).exists()]
    if module.partition(".")[0] not in ("benchmarks", "launch", "tests"):
        return []
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return [f"{shlex.join(words)}: there is no module {module}"]
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--help"]
    return [f"{shlex.join(words)}: no flag {flag}" for flag in flags if f'"{flag}"' not in path.read_text()]


def _parsed(parse: Parse, arguments: list[str], words: list[str]) -> list[str]:
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options = parse(arguments)
    except SystemExit as stop:
        return [] if stop.code == 0 else [f"{shlex.join(words)}: {output.getvalue().strip().splitlines()[-1]}"]
    return [f"{shlex.join(words)}: {problem}" for problem in _files(options)]


def _flags_known(parse: Parse, arguments: list[str], words: list[str]) -> list[str]:
    """Whether the command's help lists all flags among the arguments."""
    command = []
    for word in arguments:
        if not re.fullmatch(r"[a-z-]+", word) or word.startswith("-"):
            break
        command.append(word)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            parse([*command, "--help"])
        except SystemExit as stop:
            if stop.code != 0:
                return [f"{shlex.join(words)}: {output.getvalue().strip().splitlines()[-1]}"]
    known = set(re.findall(r"--[\w-]+", output.getvalue()))
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return [f"{shlex.join(words)}: no flag {flag}" for flag in flags if flag not in known]


def _files(options: argparse.Namespace) -> list[str]:
    """Problems with the files of the repository that a command reads."""
    found = []
    for caption in getattr(options, "captions", None) or []:
        if caption.endswith(".txt") and "/" in caption and not (ROOT / caption).is_file():
            found.append(f"there is no {caption}")
    if getattr(options, "config", None) and options.config != WRITTEN_BY_INIT:
        try:
            with contextlib.chdir(ROOT):
                plan(load_config(options.config, getattr(options, "overrides", ())), getattr(options, "stage", "all"))
        except ValueError as error:
            found.append(str(error))
    return found


def _make(arguments: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", makefile, re.MULTILINE))
    found = []
    for word in arguments:
        if "=" in word and word.partition("=")[0] not in variables:
            found.append(f"make {word}: no such variable")
        elif "=" not in word and word not in targets:
            found.append(f"make {word}: no such target")
    return found


def _extras_installed(arguments: list[str]) -> list[str]:
    known = setup_py()["extras_require"]
    found = []
    for word in arguments:
        for group in re.findall(r"\[([\w, -]+)\]", word):
            names = [name.strip() for name in group.split(",")]
            found += [f"pip install: there is no extra {name}" for name in names if name not in known]
    return found


# ---- links, paths, names and tables


def link_problems(text: str, page: Path) -> list[str]:
    """Links and images whose target does not exist in the repository; web addresses are not checked.

    The generated pages of the documentation site do not exist in the repository: link to reference/index.md.
    """
    found = []
    for match in LINK.finditer(FENCE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not file.exists() or not file.is_relative_to(ROOT):
            found.append(f"{page} links to {path}, which does not exist")
        elif anchor and anchor not in _anchors(text if not path else file.read_text()):
            found.append(f"{page} links to {target}, but there is no such heading")
    return found


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def path_problems(text: str) -> list[str]:
    """Paths of the repository in running text that do not exist. Upper-case parts such as NAME are placeholders."""
    paths = REPOSITORY_PATH.findall(FENCE.sub("", text).replace("\\_", "_"))
    named = [path for path in paths if not re.search(r"[A-Z]{2,}", path)]
    return [f"there is no {path}" for path in named if not any(ROOT.glob(path))]


def name_problems(text: str) -> list[str]:
    """Identifiers in inline code that occur nowhere in the source, the Makefile or the configuration."""
    files = ["Makefile", "pyproject.toml", "setup.py", *_sources()]
    known = set(re.findall(r"\w+", "\n".join((ROOT / file).read_text() for file in files)))
    names = re.findall(r"`([A-Za-z]\w{3,})(?:\(\))?`", FENCE.sub("", text))
    return [f"{name} is not in the source" for name in names if name not in known and not re.search("[A-Z]{2,}", name)]


def _sources() -> list[Path]:
    return [
        path for folder in ("fastimagen", "kernels", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]


def extras_table(text: str) -> set[str]:
    """The words in inline code in the table below the heading that speaks of extras."""
    section = re.search(r"^#+ [^\n]*\bextras?\b[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    rows = [line for line in section[1].splitlines() if line.startswith("|")] if section else []
    return {word for row in rows for word in re.findall(r"`([\w-]+)`", row)}


def setup_py() -> dict[str, Any]:
    """The arguments that setup.py passes to setup()."""
    import setuptools

    passed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return passed
