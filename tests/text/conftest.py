"""Shared by the tests of text: one built-in encoder, built from captions of coloured shapes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fastimagen.text.t5 import T5Encoder
from fastimagen.text.tiny_t5 import build_tiny_t5

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["circle", "square", "triangle", "star", "ring"]
PLACES = ["in the center", "at the top left", "at the top right", "at the bottom left", "at the bottom right"]
COMBINATIONS = list(itertools.product(["small", "large"], range(8), SHAPES, PLACES, range(8)))
CAPTIONS = [
    f"a {size} {COLORS[color]} {shape} {place} of a {COLORS[back]} background"
    for size, color, shape, place, back in COMBINATIONS
]


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built-in text encoder."""
    return build_tiny_t5(tmp_path_factory.mktemp("text") / "tiny", CAPTIONS)


@pytest.fixture(scope="package")
def encoder(tiny: Path) -> T5Encoder:
    return T5Encoder(tiny)
