"""README.md, CONTRIBUTING.md and docs/ are true: their commands, Python, paths and links work."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.page_checks import (
    command_problems,
    commands,
    configuration_problems,
    extras_table,
    inline_command_problems,
    inline_commands,
    link_problems,
    name_problems,
    path_problems,
    python_problems,
    setup_py,
)

PAGES = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
NOT_PINNED = {"xformers"}  # needs CUDA and one release of torch, so the Makefile does not install it


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_blocks_run(page: Path, toy_model: Path, tmp_path: Path) -> None:
    assert python_problems((ROOT / page).read_text(), tmp_path, toy_model) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_are_accepted_by_their_parsers(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert command_problems(text) + inline_command_problems(text) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_images_and_paths_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert link_problems(text, page) + path_problems(text) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_configurations_describe_a_cascade(page: Path, toy_model: Path) -> None:
    """JSON blocks are sections of "fastimagen"; a model directory is a toy model with stages of that name."""
    assert configuration_problems((ROOT / page).read_text(), toy_model) == []


def test_the_contributing_guide_names_what_exists() -> None:
    assert name_problems((ROOT / "CONTRIBUTING.md").read_text()) == []


def test_the_table_of_extras_lists_those_of_setup_py() -> None:
    assert extras_table((ROOT / "README.md").read_text()) == set(setup_py()["extras_require"])


def test_ci_runs_what_the_pages_say() -> None:
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    ran = [line for line in lines if line and not line.startswith(("#", "set ", "command -v chromium "))]
    assert ran == ["make lint", "make test"]
    assert ["make", "test"] in list(commands((ROOT / "README.md").read_text()))
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    named = [*commands(guide), *inline_commands(guide)]
    assert all(["make", target] in named for target in ("venv", "lint", "test", "test-fast", "drills"))


def test_pre_commit_runs_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    recipe = re.search(r"^lint: venv\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    lines = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe[1].splitlines()]
    assert hooks == lines
    assert {repository["repo"] for repository in config["repos"]} == {"local"}


def test_every_dependency_is_pinned_to_a_version_that_setup_py_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    arguments = setup_py()
    requirements = [*arguments["install_requires"], *chain.from_iterable(arguments["extras_require"].values())]
    for requirement in map(Requirement, requirements):
        if requirement.name in NOT_PINNED:
            continue
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement}, but constraints.txt has {pins[name]}"


# ---- the checks find faults of every kind

BROKEN = """# A page

See [the notes](docs/nowhere.md), [below](#no-such-heading), [here](#a-page) and <img src="lost.png">,
not [this](https://a.b). In fastimagen/nowhere.py or fastimagen/cli.py, tests/kernels/interpreted_*.py or
`kernels/NAME.py`; `take_steps` and `take_step`; `make lint`, `make bricks`, `fastimagen sample
--settings FILE`, `fastimagen sample --setings FILE`, `fastimagen paint`, `python -m benchmarks.cpu --only data`,
`python -m benchmarks.cpu --solely data`, `python -m benchmarks.gone`.

```bash
$ fastimagen sample --model m --captions "a [red](circle.md)" --stepz 3   # no such flag
fastimagen sample --model m --captions launch/nowhere.txt && make nonsense
make quickstart PYTHN=python3
pip install --editable '.[train,dmeo]'
CUDA_VISIBLE_DEVICES=0 deepspeed --num_gpus 2 launch/train.py --config ds.json --set fastimagen.train.stepz=1
deepspeed launch/train.py \\
    --config ds.json --stage bsae
python launch/trian.py
fastimagen embed --config lost.json
python -m fastimagen.cli info --xyz
torchrun --nproc_per_node 8 -m fastimagen.cli sample --model m --captions my_captions.txt --out samples
.venv/bin/python -m pytest tests/test_lost.py -k word
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


def endings_match(found: list[str], endings: list[str]) -> bool:
    return len(found) == len(endings) and all(line.endswith(ending) for line, ending in zip(found, endings))


def test_python_faults_are_found(toy_model: Path, tmp_path: Path) -> None:
    assert python_problems(BROKEN, tmp_path, toy_model) == [
        "Python: AttributeError: 'Output' object has no attribute 'nothing'"
    ]
    assert python_problems("```python\nif\n```\n", tmp_path, toy_model)[0].startswith("Python: SyntaxError")
    wrong = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert python_problems(wrong, tmp_path, toy_model) == ["Python: the page shows '3\\n', but the block prints '2\\n'"]
    assert python_problems(wrong.replace("3", "2"), tmp_path, toy_model) == []


def test_faults_of_commands_are_found() -> None:
    found = command_problems(BROKEN)
    expected = [
        "unknown flag --stepz; did you mean --steps?",
        "there is no launch/nowhere.txt",
        "make nonsense: no such target",
        "make PYTHN=python3: no such variable",
        "there is no extra dmeo",
        'unknown key fastimagen.train.stepz; did you mean "steps"?',
        'no stage "bsae"; the cascade has base, sr',
        "there is no launch/trian.py",
        "cannot read lost.json: No such file or directory",
        "unknown flag --xyz; -h lists all flags",
        "there is no tests/test_lost.py",
    ]
    assert endings_match(found, expected), found


def test_faults_of_commands_in_inline_code_are_found() -> None:
    found = inline_command_problems(BROKEN)
    assert "invalid choice: 'paint'" in found.pop(2)
    expected = ["make bricks: no such target", "no flag --setings", "no flag --solely", "no module benchmarks.gone"]
    assert endings_match(found, expected), found


def test_faults_of_links_paths_and_names_are_found() -> None:
    assert [line.split(" links to ")[1] for line in link_problems(BROKEN, Path("README.md"))] == [
        "docs/nowhere.md, which does not exist",
        "#no-such-heading, but there is no such heading",
        "lost.png, which does not exist",
    ]
    assert path_problems(BROKEN) == ["there is no docs/nowhere.md", "there is no fastimagen/nowhere.py"]
    assert name_problems(BROKEN) == ["take_steps is not in the source"]
    assert extras_table(BROKEN) == {"train", "demo"}
