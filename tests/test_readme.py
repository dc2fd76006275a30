"""What README.md and docs/ say works: their commands, their Python, their links, the table of extras.

The Python blocks of a page run one after the other in one namespace, as a reader would type them, in a folder
of their own. A model directory given to `from_pretrained` is a toy model; without a GPU "cuda" reads "cpu".
A block that can run on nobody's laptop has `<!-- not run: why -->` on the line above it and is only compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastimagen import cli
from fastimagen.config_file import load_config
from fastimagen.train.stage_setup import plan
from tests.conftest import ROOT, write_toy_encoder, write_toy_model

PAGES = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
NOT_PINNED = {"xformers"}  # built for CUDA alone, for one release of torch each; the Makefile leaves it out


def blocks(text: str, *languages: str) -> Iterator[tuple[str, str]]:
    """(code, note in the comment above it) of every fenced block in one of the languages."""
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            yield match["code"], match["note"] or ""


# ---- Python


def run_python(text: str, folder: Path, toy_model: Path) -> list[str]:
    """Run the blocks of a page inside `folder`; one line for what does not work."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for code, note in blocks(text, "python", "py"):
        try:
            compiled = compile(code if torch.cuda.is_available() else code.replace('"cuda"', '"cpu"'), "block", "exec")
            if note.startswith("not run: "):
                continue
            for path in re.findall(r'from_pretrained\("([^"]+)"', code):
                if not (folder / path).exists():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).symlink_to(toy_model)
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
                exec(compiled, namespace)
        except Exception as error:  # whatever a reader would meet
            return [f"Python: {type(error).__name__}: {error}"]
    return []


# ---- commands


def commands(text: str) -> Iterator[list[str]]:
    """Every command of the shell blocks as words, without its prompt and the variables set before it."""
    for code, _ in blocks(text, "bash", "sh", "shell", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in ("&&", "||", ";", "|", ">", ">>", "&"):
                    if words:
                        yield words
                    words = []
                elif words or not re.fullmatch(r"\w+=.*", word):
                    words.append(word)


def command_problems(text: str) -> list[str]:
    """One line for every command that its real parser refuses, or that names a file which is not there."""
    found = []
    for words in commands(text):
        name, arguments = words[0], words[1:]
        script = next((i for i, word in enumerate(arguments) if re.fullmatch(r"(\./)?[\w/]+\.py", word)), None)
        if name == "make":
            found += _make(arguments)
        elif name == "fastimagen":
            found += _parsed(cli.parser().parse_args, arguments, words)
        elif name in ("pip", "pip3") or arguments[:2] == ["-m", "pip"]:
            found += _extras_installed(arguments)
        elif script is not None and name in ("deepspeed", "torchrun", "python", "python3"):
            if not (ROOT / arguments[script]).is_file():
                found.append(f"{shlex.join(words)}: there is no {arguments[script]}")
            elif Path(arguments[script]).as_posix() == "launch/train.py":
                found += _parsed(_launch_train().parse, arguments[script + 1 :], words)
    return found


def _parsed(parse: Any, arguments: list[str], words: list[str]) -> list[str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            options = parse(arguments)
    except SystemExit as stop:
        return [] if stop.code == 0 else [f"{shlex.join(words)}: {said.getvalue().strip().splitlines()[-1]}"]
    return [f"{shlex.join(words)}: {problem}" for problem in _files(options)]


def _files(options: argparse.Namespace) -> list[str]:
    """What a command reads that is part of the repository must be there and be right."""
    found = []
    for caption in getattr(options, "captions", None) or []:
        if caption.endswith(".txt") and not (ROOT / caption).is_file():
            found.append(f"there is no {caption}")
    if getattr(options, "config", None):
        try:
            with contextlib.chdir(ROOT):
                plan(load_config(options.config, options.overrides), getattr(options, "stage", "all"))
        except ValueError as error:
            found.append(str(error))
    return found


def _launch_train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make(arguments: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", makefile, re.MULTILINE))
    return [
        f"make {word}: no such {'variable' if '=' in word else 'target'}"
        for word in arguments
        if (word.partition("=")[0] not in variables if "=" in word else word not in targets)
    ]


def _extras_installed(arguments: list[str]) -> list[str]:
    named = [
        extra.strip()
        for word in arguments
        for group in re.findall(r"\[([\w, -]+)\]", word)
        for extra in group.split(",")
    ]
    return [f"pip install: there is no extra {extra}" for extra in named if extra not in setup_py()["extras_require"]]


# ---- links and tables


def link_problems(text: str, page: Path) -> list[str]:
    """One line for every link or image that leads nowhere in the repository; the web is not tried."""
    found = []
    for match in LINK.finditer(FENCE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not file.exists() or not file.is_relative_to(ROOT):
            found.append(f"{page} links to {path}, which is not there")
        elif anchor and anchor not in _anchors(text if not path else file.read_text()):
            found.append(f"{page} links to {target}, but there is no such heading")
    return found


def _anchors(text: str) -> set[str]:
    """Headings as GitHub makes them into anchors."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def extras_table(text: str) -> set[str]:
    """The words in code type in the table below the heading that speaks of extras."""
    section = re.search(r"^#+ [^\n]*\bextras?\b[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    rows = [line for line in section[1].splitlines() if line.startswith("|")] if section else []
    return {word for row in rows for word in re.findall(r"`([\w-]+)`", row)}


def setup_py() -> dict[str, Any]:
    """The arguments that setup.py gives to setup()."""
    import setuptools

    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


# ---- the pages as they are


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_python_runs(page: Path, toy_model: Path, tmp_path: Path) -> None:
    assert run_python((ROOT / page).read_text(), tmp_path, toy_model) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_are_understood(page: Path) -> None:
    assert command_problems((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_images_are_there(page: Path) -> None:
    assert link_problems((ROOT / page).read_text(), page) == []


def test_the_table_of_extras_is_that_of_setup_py() -> None:
    assert extras_table((ROOT / "README.md").read_text()) == set(setup_py()["extras_require"])


def test_ci_runs_what_the_readme_says() -> None:
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line for line in lines if line and not line.startswith(("#", "set "))] == ["make lint", "make test"]
    assert ["make", "test"] in list(commands((ROOT / "README.md").read_text()))


def test_everything_that_the_makefile_installs_is_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    given = setup_py()
    for text in [*given["install_requires"], *(text for extra in given["extras_require"].values() for text in extra)]:
        need = Requirement(text)
        if need.name in NOT_PINNED:
            continue
        assert canonicalize_name(need.name) in pins, f"{need.name} is not in constraints.txt"
        pin = pins[canonicalize_name(need.name)]
        assert need.specifier.contains(pin), f"{text}, but the tests run {pin}"


# ---- a page with a fault of every kind

BROKEN = """# A page

See [the notes](docs/nowhere.md), [below](#no-such-heading), [here](#a-page) and <img src="lost.png">,
not [this](https://a.b).

```bash
$ fastimagen sample --model m --captions "a [red](circle.md)" --stepz 3   # no such option
fastimagen sample --model m --captions nowhere.txt && make nonsense
make quickstart PYTHN=python3
pip install --editable '.[train,dmeo]'
CUDA_VISIBLE_DEVICES=0 deepspeed --num_gpus 2 launch/train.py --config ds.json --set fastimagen.train.stepz=1
deepspeed launch/train.py \\
    --config ds.json --stage bsae
python launch/trian.py
fastimagen embed --config lost.json
```

```python
from fastimagen import ImagenPipeline
```

<!-- not run: needs a year -->
```python
raise RuntimeError("not run")
```

```python
ImagenPipeline.from_pretrained("toy", device="cuda")(["a"], steps=1, seeds=[0]).nothing
```

## Extras

| what | install |
| --- | --- |
| train | `train` (deepspeed), `pip install .` |
| dance | `demo` |

## Others

| `no` |
"""


def test_every_fault_of_a_page_is_seen(toy_model: Path, tmp_path: Path) -> None:
    assert run_python(BROKEN, tmp_path, toy_model) == [
        "Python: AttributeError: 'Output' object has no attribute 'nothing'"
    ]
    assert run_python("```python\nif\n```\n", tmp_path, toy_model)[0].startswith("Python: SyntaxError")
    complaints = [
        "unrecognized arguments: --stepz 3",
        "there is no nowhere.txt",
        "make nonsense: no such target",
        "make PYTHN=python3: no such variable",
        "there is no extra dmeo",
        'unknown key fastimagen.train.stepz; did you mean "steps"?',
        'no stage "bsae"; the cascade has base, sr',
        "there is no launch/trian.py",
        "cannot read lost.json: No such file or directory",
    ]
    found = command_problems(BROKEN)
    assert len(found) == len(complaints)
    assert all(problem.endswith(complaint) for problem, complaint in zip(found, complaints)), found
    assert [line.split(" links to ")[1] for line in link_problems(BROKEN, Path("README.md"))] == [
        "docs/nowhere.md, which is not there",
        "#no-such-heading, but there is no such heading",
        "lost.png, which is not there",
    ]
    assert extras_table(BROKEN) == {"train", "demo"}
