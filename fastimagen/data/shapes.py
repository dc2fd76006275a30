"""Captioned shapes: a data set that a small model learns on a laptop, with captions that describe the image.

An image and its caption are a pure function of (split, index, seed, size). Some pairs of colour and shape never occur
in training; every caption of the split "unseen" names one of them, so that this split measures composition and not
memorization. Lengths are in pixels of a 64-pixel canvas; x increases to the right, y downwards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..files import atomic_folder, read_json_object, require_empty
from ..seeds import numpy_generator
from .tar_writer import write_tars

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 25),
    "orange": (240, 125, 15),
    "yellow": (250, 230, 40),
    "green": (35, 155, 50),
    "cyan": (40, 205, 215),
    "blue": (35, 70, 225),
    "purple": (120, 25, 160),
    "pink": (245, 130, 190),
}
# No word is both a shape's colour and a background: a small network learns such captions three times as fast.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADIUS = {"small": 10.0, "large": 16.0}
POSITIONS: dict[str, tuple[float, float]] = {  # offset of the object from the middle
    "center": (0, 0),
    "left": (-15, 0),
    "right": (15, 0),
    "top": (0, -15),
    "bottom": (0, 15),
}
PLACES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
RELATIONS: dict[str, tuple[float, float]] = {  # offset of the first object; the second is opposite
    "to the left of": (-15, 0),
    "to the right of": (15, 0),
    "above": (0, -15),
    "below": (0, 15),
}
UNSEEN_PAIRS = (
    ("red", "star"),
    ("blue", "cross"),
    ("green", "circle"),
    ("yellow", "triangle"),
    ("purple", "square"),
)
SEEN_PAIRS = tuple(pair for pair in product(COLORS, SHAPES) if pair not in UNSEEN_PAIRS)
SPLITS = ("train", "val", "seen", "unseen")
HELD_OUT = {"val": 512, "seen": 500, "unseen": 500}
"""Number of images of the other splits; it does not depend on the number of training images."""

CANVAS = 64
SUPERSAMPLING = 4
JITTER = 1.5  # of the centre, uniform to each side
RADIUS_JITTER = 0.05  # relative, uniform to each side
UNMENTIONED = 0.15  # share of training captions without size, and the same share without position
TWO_OBJECTS = 4  # every fourth image shows two objects
VERSION = 3  # of scenes and images: increase it with every change that alters them

_STREAMS = ("image", "mention", "object", "place", "ground", "first", "second", "two grounds", "relation", "order")


@dataclass(frozen=True)
class Object:
    """One shape. Attributes that the caption does not mention are None; with two objects, so are size and position."""

    color: str
    shape: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or two and the relation of the first to the second, on a background."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None


# ---- captions


def caption(scene: Scene) -> str:
    """The sentence of a scene, e.g. "a large red circle on the left of a white background"."""
    ground = f"{_a(scene.background)} background"
    if scene.relation:
        first, second = (_a(f"{thing.color} {thing.shape}") for thing in scene.objects)
        return f"{first} {scene.relation} {second} on {ground}"
    (thing,) = scene.objects
    what = _a(" ".join(word for word in (thing.size, thing.color, thing.shape) if word))
    return f"{what} {PLACES[thing.position]} of {ground}" if thing.position else f"{what} on {ground}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun.startswith("orange") else f"a {noun}"


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_THING = f"an? (?:{_one_of(RADIUS)} )?{_one_of(COLORS)} {_one_of(SHAPES)}"
_GROUND = f"an? {_one_of(BACKGROUNDS)} background"
_SINGLE = re.compile(f"{_THING} (?:{_one_of(PLACES.values())} of|on) {_GROUND}")
_PAIR = re.compile(
    f"an? {_one_of(COLORS)} {_one_of(SHAPES)} {_one_of(RELATIONS)} an? {_one_of(COLORS)} {_one_of(SHAPES)} on {_GROUND}"
)


def parse(text: str) -> Scene:
    """The scene of a caption: the inverse of `caption`.

    Raises ValueError for sentences outside the grammar and for two objects of the same colour and shape.
    """
    scene = None
    if match := _SINGLE.fullmatch(text):
        size, color, shape, place, background = match.groups()
        position = next((name for name, words in PLACES.items() if words == place), None)
        scene = Scene((Object(color, shape, size, position),), background)
    elif match := _PAIR.fullmatch(text):
        color, shape, relation, color2, shape2, background = match.groups()
        scene = Scene((Object(color, shape), Object(color2, shape2)), background, relation)
    if scene is None or caption(scene) != text:  # a/an
        raise ValueError(
            f'not a caption of the shapes: {text!r}; one is "a large red circle on the left of a white background"'
        )
    if len(set(scene.objects)) < len(scene.objects):
        raise ValueError(f"two objects of a caption must differ in colour or shape: {text!r}")
    return scene


# ---- scenes


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments.

    Each attribute takes all its values equally often, in shuffled runs, so that every prefix of a split is balanced.
    Test captions ("seen", "unseen") of one object mention all attributes. Raises ValueError for an unknown split and
    for a negative index or seed.
    """

    def draw(choices: Sequence[Any], stream: str) -> Any:
        run, offset = divmod(number, len(choices))
        return choices[_generator(seed, split, stream, run).permutation(len(choices))[offset]]

    firsts = UNSEEN_PAIRS if split == "unseen" else SEEN_PAIRS
    group, within = divmod(index, TWO_OBJECTS)
    if within < TWO_OBJECTS - 1:
        number = group * (TWO_OBJECTS - 1) + within
        color, shape = draw(firsts, "object")
        size, position = draw([*product(RADIUS, POSITIONS)], "place")
        if split in ("train", "val"):
            no_size, no_position = _generator(seed, split, "mention", index).random(2) < UNMENTIONED
            size, position = None if no_size else size, None if no_position else position
        return Scene((Object(color, shape, size, position),), draw([*BACKGROUNDS], "ground"))
    number = group
    first = draw(firsts, "first")
    second = draw([pair for pair in SEEN_PAIRS if pair != first], "second")
    if split == "unseen" and draw((False, True), "order"):  # the unseen pair comes first or second
        first, second = second, first
    background, relation = draw([*BACKGROUNDS], "two grounds"), draw([*RELATIONS], "relation")
    return Scene((Object(*first), Object(*second)), background, relation)


def open_scene(index: int, seed: int = 0) -> Scene:
    """Scene number `index` whose caption leaves something open: in turn the size, the position and both.

    Otherwise these are the test scenes of one object. Raises ValueError for a negative index or seed.
    """
    group, within = divmod(index, TWO_OBJECTS - 1)
    seen = scene("seen", group * TWO_OBJECTS + within, seed)
    size, position = [(False, True), (True, False), (False, False)][index % 3]
    (named,) = seen.objects
    kept = replace(named, size=named.size if size else None, position=named.position if position else None)
    return replace(seen, objects=(kept,))


def open_image(index: int, draw: int, seed: int = 0, size: int = CANVAS) -> np.ndarray:
    """Image (size, size, 3) uint8 of `open_scene(index)`, one of many: what is open depends on `draw`."""
    return render(open_scene(index, seed), size, numpy_generator(seed, len(SPLITS), draw, index))


def sample(split: str, index: int, seed: int = 0, size: int = CANVAS) -> tuple[np.ndarray, str]:
    """Image (size, size, 3) uint8 and caption number `index` of a split. Raises ValueError as `scene` does."""
    item = scene(split, index, seed)
    return render(item, size, _generator(seed, split, "image", index)), caption(item)


def _generator(seed: int, split: str, stream: str, number: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f'no split "{split}"; there are {", ".join(SPLITS)}')
    if seed < 0 or number < 0:
        raise ValueError(f"seed and index of an image must not be negative, got seed {seed}, index {number}")
    key = (seed, SPLITS.index(split), _STREAMS.index(stream), number)
    return numpy_generator(*key)


# ---- images


@cache
def outline(shape: str) -> np.ndarray:
    """Corners (n, 2) of a shape of radius 1, (x, y) around the middle of what it spans; the circle has 64.

    The factors make the areas similar (1.8 to 2.7), so that size and shape are not confused.
    """
    if shape == "circle":
        corners = _regular(64, 0.92)
    elif shape == "square":
        corners = _regular(4, 0.8 * math.sqrt(2), turn=math.pi / 4)
    elif shape == "triangle":
        corners = _regular(3, 1.2)
    elif shape == "star":
        corners = np.stack([_regular(5, 1.14), _regular(5, 0.55, turn=math.pi / 5)], 1)  # (5, 2, 2)
        corners = corners.reshape(10, 2)  # (10, 2), outer and inner corners in turn
    else:
        arm, half = 1.0, 0.38
        corner = np.array([(-half, -arm), (half, -arm), (half, -half)])
        quarter = np.array([(0, 1), (-1, 0)])  # (x, y) @ quarter turns by 90 degrees
        corners = np.concatenate([corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])  # (12, 2)
    return corners - (corners.min(0) + corners.max(0)) / 2


def _regular(count: int, radius: float, turn: float = 0.0) -> np.ndarray:
    """Corners (count, 2) of a regular polygon around (0, 0), the first one on top."""
    angles = turn + 2 * math.pi / count * np.arange(count)
    return radius * np.stack([np.sin(angles), -np.cos(angles)], 1)  # (count, 2)


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: (size, size, 3) uint8, antialiased. Centre and radius are jittered, unknown attributes random."""
    scale = SUPERSAMPLING * size / CANVAS
    canvas = Image.new("RGB", (SUPERSAMPLING * size,) * 2, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for side, thing in zip((1, -1), scene.objects):
        if scene.relation:
            middle, radius = side * np.array(RELATIONS[scene.relation]), RADIUS["small"]
        else:
            middle = np.array(POSITIONS[thing.position or rng.choice([*POSITIONS])])
            radius = RADIUS[thing.size or rng.choice([*RADIUS])]
        middle = CANVAS / 2 + middle + rng.uniform(-JITTER, JITTER, 2)
        radius *= rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
        corners = scale * (middle + radius * outline(thing.shape))
        pen.polygon(corners.ravel().tolist(), fill=COLORS[thing.color])
    return np.array(canvas.reduce(SUPERSAMPLING))


# ---- shards


def write_shards(
    out: str | Path,
    count: int,
    size: int = CANVAS,
    seed: int = 0,
    *,
    shard_size: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write WebDataset shards out/train (count samples), out/val, out/seen, out/unseen: KEY.png, .txt, .json.

    All of them appear at once. Existing shards of the same images are kept. Raises ValueError if `out` contains
    anything else, and for counts and sizes out of range. progress(done, total) is called every 1000 samples.
    """
    if count < 1 or size < 16 or seed < 0 or not 1 <= shard_size <= 10000:
        raise ValueError(
            f"shapes need count >= 1, size >= 16, seed >= 0 and shard_size from 1 to 10000, got "
            f"{count}, {size}, {seed}, {shard_size}"
        )
    out = Path(out).resolve()
    if has_shards(out, count, size, seed):
        return
    require_empty(out)
    counts = {split: HELD_OUT.get(split, count) for split in SPLITS}
    done, total = 0, sum(counts.values())

    def samples(split: str) -> Iterator[dict[str, bytes]]:
        nonlocal done
        for index in range(counts[split]):
            yield _files(*sample(split, index, seed, size))
            done += 1
            if progress and done % 1000 == 0:
                progress(done, total)

    with atomic_folder(out) as temporary:
        for split in SPLITS:
            write_tars(temporary / split, samples(split), shard_size)
        (temporary / "shapes.json").write_text(json.dumps(_stamp(count, size, seed)) + "\n")


def _files(image: np.ndarray, text: str) -> dict[str, bytes]:
    """The files of a sample, by extension."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    about = {"caption": text, **asdict(parse(text))}
    return {"png": buffer.getvalue(), "txt": text.encode(), "json": json.dumps(about).encode()}


def has_shards(out: str | Path, count: int, size: int, seed: int) -> bool:
    """Whether `out` contains exactly these images, complete."""
    try:
        return read_json_object(Path(out) / "shapes.json") == _stamp(count, size, seed)
    except ValueError:  # missing, or another file
        return False


def _stamp(count: int, size: int, seed: int) -> dict[str, int]:
    return {"count": count, "size": size, "seed": seed, "version": VERSION}
