"""Captioned shapes: a world small enough to learn on a laptop, with captions that say what is in the picture.

A picture and its caption are a pure function of (split, index, seed, size), whatever else was made. Some pairs of colour
and shape never occur in training; every caption of the split "unseen" names one, so that composition is measured and
not memory. Lengths below are in pixels of a 64-pixel canvas.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30), "orange": (245, 135, 20), "yellow": (245, 220, 30), "green": (40, 160, 60),
    "cyan": (40, 200, 210), "blue": (40, 70, 220), "purple": (130, 50, 170), "pink": (245, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), **COLORS,
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADIUS = {"small": 10.0, "large": 16.0}
POSITIONS: dict[str, tuple[float, float]] = {  # offset of the centre from the middle, x to the right, y down
    "center": (0, 0), "left": (-15, 0), "right": (15, 0), "top": (0, -15), "bottom": (0, 15),
}
PLACES = {"center": "in the center", "left": "on the left", "right": "on the right", "top": "at the top",
          "bottom": "at the bottom"}
RELATIONS: dict[str, tuple[float, float]] = {  # offset of the first object; the second is opposite
    "to the left of": (-15, 0), "to the right of": (15, 0), "above": (0, -15), "below": (0, 15),
}
UNSEEN_PAIRS = frozenset({("red", "star"), ("blue", "cross"), ("green", "circle"), ("yellow", "triangle"),
                          ("purple", "square")})
SPLITS = ("train", "val", "seen", "unseen")
HELD_OUT = {"val": 512, "seen": 500, "unseen": 500}
"""Pictures of the other splits, whatever the number of training pictures."""

CANVAS = 64
SUPERSAMPLING = 4
JITTER = 1.5  # of the centre, uniform to each side
RADIUS_JITTER = 0.05  # relative, uniform to each side
UNMENTIONED = 0.1  # share of training captions that leave out the size, and of those that leave out the place
TWO_OBJECTS = 4  # every fourth picture shows two objects
VERSION = 1  # of the pictures: raise it when anything above changes


@dataclass(frozen=True)
class Object:
    """One shape; what the caption does not mention is None. The second of two objects has no size and position."""

    color: str
    shape: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or two and how the first lies to the second, on a background."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None


# ---------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """The sentence of a scene, e.g. "a large red circle on the left of a white background"."""
    ground = f"{_a(scene.background)} background"
    if scene.relation:
        first, second = (_a(f"{thing.color} {thing.shape}") for thing in scene.objects)
        return f"{first} {scene.relation} {second} on {ground}"
    thing, = scene.objects
    what = _a(" ".join(word for word in (thing.size, thing.color, thing.shape) if word))
    return f"{what} {PLACES[thing.position]} of {ground}" if thing.position else f"{what} on {ground}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun.startswith("orange") else f"a {noun}"


def _one_of(words) -> str:
    return f"({'|'.join(words)})"


_THING = f"an? (?:{_one_of(RADIUS)} )?{_one_of(COLORS)} {_one_of(SHAPES)}"
_GROUND = f"an? {_one_of(BACKGROUNDS)} background"
_SINGLE = re.compile(f"{_THING} (?:{_one_of(PLACES.values())} of|on) {_GROUND}")
_PAIR = re.compile(f"an? {_one_of(COLORS)} {_one_of(SHAPES)} {_one_of(RELATIONS)} "
                   f"an? {_one_of(COLORS)} {_one_of(SHAPES)} on {_GROUND}")


def parse(text: str) -> Scene:
    """The scene of a caption: the inverse of `caption`. Raises ValueError for sentences outside the grammar."""
    if match := _SINGLE.fullmatch(text):
        size, color, shape, place, background = match.groups()
        position = next((name for name, words in PLACES.items() if words == place), None)
        return Scene((Object(color, shape, size, position),), background)
    if match := _PAIR.fullmatch(text):
        color, shape, relation, color2, shape2, background = match.groups()
        return Scene((Object(color, shape), Object(color2, shape2)), background, relation)
    raise ValueError(f'not a caption of the shapes: "{text}"')


# ---------------------------------------------------------------- scenes


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split: a pure function of its arguments.

    Attributes are uniform, but for the pairs that a split must not or must contain. Test captions ("seen", "unseen") of
    one object mention everything. Raises ValueError for an unknown split.
    """
    return _draw_scene(split, index, _generator(split, index, seed))


def sample(split: str, index: int, seed: int = 0, size: int = CANVAS) -> tuple[np.ndarray, str]:
    """(picture (size, size, 3) uint8, caption) number `index` of a split."""
    rng = _generator(split, index, seed)
    drawn = _draw_scene(split, index, rng)
    return render(drawn, size, rng), caption(drawn)


def _generator(split: str, index: int, seed: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f'no split "{split}"; there are {", ".join(SPLITS)}')
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, SPLITS.index(split), index))))


def _pick(rng: np.random.Generator, choices) -> str:
    choices = tuple(choices)
    return choices[rng.integers(len(choices))]


def _draw_scene(split: str, index: int, rng: np.random.Generator) -> Scene:
    first = _pair(rng, unseen=split == "unseen")
    if index % TWO_OBJECTS == TWO_OBJECTS - 1:
        second = first
        while second == first:
            second = _pair(rng, unseen=False)
        background = _pick(rng, [name for name in BACKGROUNDS if name not in (first[0], second[0])])
        objects = (Object(*first), Object(*second))
        if split == "unseen" and rng.random() < 0.5:  # the new pair in either place
            objects = objects[::-1]
        return Scene(objects, background, _pick(rng, RELATIONS))
    background = _pick(rng, [name for name in BACKGROUNDS if name != first[0]])
    size, position = _pick(rng, RADIUS), _pick(rng, POSITIONS)
    unmentioned = rng.random(2) < (UNMENTIONED if split in ("train", "val") else 0.0)
    return Scene((Object(*first, None if unmentioned[0] else size, None if unmentioned[1] else position),), background)


def _pair(rng: np.random.Generator, *, unseen: bool) -> tuple[str, str]:
    if unseen:
        return sorted(UNSEEN_PAIRS)[rng.integers(len(UNSEEN_PAIRS))]
    while (pair := (_pick(rng, COLORS), _pick(rng, SHAPES))) in UNSEEN_PAIRS:
        pass
    return pair


# ---------------------------------------------------------------- pictures


def outline(shape: str, radius: float) -> list[tuple[float, float]] | None:
    """Corners around (0, 0), y down, of a shape of this radius; None for the circle. Areas are alike by design."""
    if shape == "circle":
        return None
    if shape == "square":
        half = 0.85 * radius
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        return _regular(3, 1.15 * radius, dy=0.15 * radius)
    if shape == "star":
        outer, inner = _regular(5, 1.15 * radius), _regular(5, 0.5 * radius, turn=math.pi / 5)
        return [corner for pair in zip(outer, inner) for corner in pair]
    arm, half = radius, 0.36 * radius
    return [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half),
            (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half)]


def _regular(corners: int, radius: float, turn: float = 0.0, dy: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, the first one on top."""
    angles = (turn + 2 * math.pi * i / corners for i in range(corners))
    return [(radius * math.sin(angle), dy - radius * math.cos(angle)) for angle in angles]


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: (size, size, 3) uint8, antialiased. Place and radius jitter; what is not mentioned is random."""
    scale = SUPERSAMPLING * size / CANVAS
    canvas = Image.new("RGB", (SUPERSAMPLING * size,) * 2, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for number, thing in enumerate(scene.objects):
        if scene.relation:
            x, y = RELATIONS[scene.relation]
            x, y, radius = (x, y, RADIUS["small"]) if number == 0 else (-x, -y, RADIUS["small"])
        else:
            x, y = POSITIONS[thing.position or _pick(rng, POSITIONS)]
            radius = RADIUS[thing.size or _pick(rng, RADIUS)]
        x, y = (CANVAS / 2 + offset + rng.uniform(-JITTER, JITTER) for offset in (x, y))
        radius *= rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
        corners = outline(thing.shape, radius)
        if corners is None:
            pen.ellipse([scale * (x - radius), scale * (y - radius), scale * (x + radius), scale * (y + radius)],
                        fill=COLORS[thing.color])
        else:
            pen.polygon([(scale * (x + dx), scale * (y + dy)) for dx, dy in corners], fill=COLORS[thing.color])
    return np.asarray(canvas.reduce(SUPERSAMPLING))


# ---------------------------------------------------------------- shards


def write_shards(out: str | Path, count: int, size: int = CANVAS, seed: int = 0, *, shard_size: int = 2000,
                 progress: Callable[[int, int], None] | None = None) -> None:
    """Write WebDataset shards out/train (count samples), out/val, out/seen, out/unseen: KEY.png, KEY.txt, KEY.json.

    Complete or not at all. Shards of the same pictures are left as they are; raises ValueError if `out` holds anything
    else. progress(done, total) is called now and then.
    """
    import webdataset

    out = Path(out)
    if has_shards(out, count, size, seed):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and does not hold these shapes: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    done, total = 0, count + sum(HELD_OUT.values())
    try:
        for split in SPLITS:
            (aside / split).mkdir(parents=True)
            with webdataset.ShardWriter(str(aside / split / "%05d.tar"), maxcount=shard_size, verbose=0) as writer:
                for index in range(HELD_OUT.get(split, count)):
                    image, text = sample(split, index, seed, size)
                    key = f"{index // shard_size:05d}{index % shard_size:04d}"
                    about = json.dumps({"caption": text, **asdict(parse(text))}).encode()
                    writer.write({"__key__": key, "png": _png(image), "txt": text, "json": about})
                    done += 1
                    if progress and done % 1000 == 0:
                        progress(done, total)
        (aside / "shapes.json").write_text(json.dumps(_stamp(count, size, seed)) + "\n")
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def has_shards(out: str | Path, count: int, size: int, seed: int) -> bool:
    """Whether `out` holds exactly these pictures, complete."""
    try:
        return json.loads((Path(out) / "shapes.json").read_text()) == _stamp(count, size, seed)
    except (OSError, json.JSONDecodeError):
        return False


def _stamp(count: int, size: int, seed: int) -> dict[str, int]:
    return {"count": count, "size": size, "seed": seed, "version": VERSION}


def _png(image: np.ndarray) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
