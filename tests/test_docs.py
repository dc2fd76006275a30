"""The documentation site: the reference is complete, the site builds without a warning, the figures are there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastimagen
from docs.generate import reference
from fastimagen import cli, config, data_config, diffusion_config, network_config
from fastimagen.presets import shapes
from fastimagen.section import Section
from tests.conftest import ROOT, write_toy_model
from tests.page_checks import LINK

TUTORIAL = ROOT / "docs/tutorial"
MAX_FIGURE_BYTES = 150_000


def parts(page: str) -> dict[str, str]:
    """The text below each heading of the second or third level."""
    headings = re.split(r"^###? (.+)$", reference.pages()[page], flags=re.MULTILINE)
    return dict(zip((heading.replace("\\", "") for heading in headings[1::2]), headings[2::2]))


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every row of a table, by the first one, without backticks."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return {first.strip().strip("`"): [cell.strip() for cell in others] for first, *others in cells}


# ---- the reference


def test_every_key_of_the_configuration_is_in_the_reference_with_its_meaning() -> None:
    found = {
        re.search(r"#(\w+) }$", title)[1]: rows(text) for title, text in parts("reference/configuration.md").items()
    }
    sections = vars(config) | vars(data_config) | vars(diffusion_config) | vars(network_config)
    expected = {name.lower(): list(item.model_fields) for name, item in sections.items() if is_section(item)}
    assert {name: list(fields) for name, fields in found.items()} == expected
    assert [f"{name}.{key}" for name, fields in found.items() for key, cells in fields.items() if "" in cells] == []
    assert found["unetconfig"]["head_dim"][:2] == ["integer, at least 16, at most 128, multiple of 8", "`64`"]
    assert found["emaconfig"]["decay"][:2] == ["number, at least 0, below 1", "`0.9999`"]


NOT_OF_THE_FILE = (Section, config.Config, network_config.NetworkConfig)
"""Base classes, and the whole file with DeepSpeed's keys."""


def is_section(item: object) -> bool:
    """Whether this is a section of the file."""
    return isinstance(item, type) and issubclass(item, Section) and item not in NOT_OF_THE_FILE


def test_every_command_is_in_the_reference_with_all_its_flags() -> None:
    found = parts("reference/commands.md")
    for name, flags in leaves(cli.parser(), ["fastimagen"]):
        listed = found.pop(" ".join(name))
        assert [flag for flag in flags if f"`{flag}`" not in listed and f"`{flag} " not in listed] == [], name
        assert [row for row, (meaning,) in rows(listed).items() if not meaning] == []
    assert not found


def leaves(parser: argparse.ArgumentParser, name: list[str]) -> list[tuple[list[str], list[str]]]:
    """(words, long flags that --help lists) of every command."""
    below = next((action for action in parser._actions if action.nargs == argparse.PARSER), None)
    if below is not None:
        return [leaf for word, sub in below.choices.items() for leaf in leaves(sub, [*name, word])]
    visible = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = [flag for action in visible for flag in action.option_strings if flag.startswith("--")]
    return [(name, [flag for flag in flags if flag != "--help"])]


def test_every_public_name_is_in_the_reference_with_its_docstring() -> None:
    found = parts("reference/python.md")
    for name in fastimagen.__all__:
        if name != "__version__":
            assert re.search(r"^[A-Z].*\.$", found[name], re.MULTILINE), name  # a sentence
    assert "offload: Offload = 'auto'" in found["ImagenPipeline"]
    assert "-> Output" in found["ImagenPipeline.__call__"]


def test_every_sampling_setting_is_in_the_table_of_the_samplers() -> None:
    page = (ROOT / "docs/samplers.md").read_text()
    assert [name for name in config.SamplingConfig.model_fields if f"| `{name}` |" not in page] == []


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (extra docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "WARNING" not in child.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_to_its_own_pages(site: Path) -> None:
    start = (site / "index.html").read_text()
    for target in (
        "training.html",
        "tutorial/index.html",
        "source/ds.json.html",
        "contributing.html",
        "quickstart.png",
    ):
        assert f'="{target}"' in start and (site / target).is_file(), target
    assert "train_batch_size" in (site / "source/ds.json.html").read_text()
    for name in reference.pages():
        assert (site / name).with_suffix(".html").is_file()


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]* href="https?:')
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text())] == []


# ---- the figures


@pytest.mark.drill
def test_the_script_draws_all_figures(toy_encoder: Path, tmp_path: Path) -> None:
    """From an untrained cascade: the figures show nothing, but the script still fits the code."""
    write_toy_model(tmp_path / "model", toy_encoder, shapes())
    records = [
        {"stage": stage, "step": step, "loss": 0.1, "val_loss": 0.1} for stage in ("base", "sr") for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "figures").mkdir()
    command = [sys.executable, "docs/generate/figures.py", "--run", str(tmp_path), "--out", str(tmp_path / "figures")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in TUTORIAL.iterdir() if path.suffix != ".md"
    }


def test_the_tutorial_shows_every_figure_that_the_script_draws() -> None:
    shown = set()
    for page in TUTORIAL.glob("*.md"):
        shown |= {match[1] for match in LINK.finditer(page.read_text()) if match[1].endswith((".png", ".svg"))}
    drawn = set(re.findall(r'out / "([\w.]+)"', (ROOT / "docs/generate/figures.py").read_text()))
    files = {path.name: path.stat().st_size for path in TUTORIAL.iterdir() if path.suffix in (".png", ".svg")}
    assert shown == drawn == set(files)
    assert {name: size for name, size in files.items() if size > MAX_FIGURE_BYTES} == {}


def test_every_page_of_the_tutorial_has_a_figure_and_a_place_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (listed,) = [item["Tutorial"] for item in navigation if "Tutorial" in item]
    assert listed == sorted(listed, key=listed.index) and set(listed) == {
        f"tutorial/{p.name}" for p in TUTORIAL.glob("*.md")
    }
    for page in TUTORIAL.glob("*.md"):
        assert re.search(r"!\[[^\]]+\]\(\w+\.(png|svg)\)", page.read_text()), page
