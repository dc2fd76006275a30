"""Reads the attributes of captioned shapes from the pixels, by image processing without a network.

The background colour is the median of the image's border. Objects are connected regions that differ from it. An
object's shape is the ideal outline that overlaps most with it; size and position follow from its area and centre.
Images are square, of any size; lengths are in pixels of the 64-pixel canvas of `shapes`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..data.shapes import BACKGROUNDS, CANVAS, COLORS, POSITIONS, RADIUS, SHAPES, Object, Scene, outline

MIN_CONTRAST = 45.0  # RGB distance of an object from the background; colours of the palette differ by at least 100
MIN_AREA = 0.01  # share of the image; the smallest object covers 0.04, smaller regions are noise
FRAME_CELLS = 32  # per side of the frame in which outlines are compared
FRAME_HALF_SIDE = 1.05  # of an object of area 1: every ideal outline fits in


@dataclass(frozen=True)
class Found:
    """An object as seen: names from `shapes`, middle (x, y) and radius in pixels of the canvas.

    outline_errors: by shape, the area in which the object differs from that shape's ideal outline, in units of its own.
    """

    color: str
    shape: str
    size: str
    position: str
    middle: tuple[float, float]
    radius: float
    outline_errors: Mapping[str, float] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Reading:
    """The background and the objects of an image, the largest object first. ground: the background's RGB, 0 to 255."""

    objects: tuple[Found, ...]
    background: str
    ground: tuple[float, float, float]


def read(image: np.ndarray) -> Reading:
    """Read an image (size, size, 3) uint8. Raises ValueError for other arrays and for sizes below 16."""
    if image.dtype != np.uint8 or image.shape != (len(image), len(image), 3) or len(image) < 16:
        raise ValueError(
            f"expected pixels (size, size, 3) uint8 with a size of at least 16, got {image.dtype} {image.shape}"
        )
    pixels = image.astype(np.float32)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # (4 size, 3)
    ground = np.median(rim, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=2)  # (size, size)
    labels = components(contrast > MIN_CONTRAST)
    strong = np.zeros(labels.shape, dtype=bool)
    for label in _large(labels):  # at half its contrast, objects that only blur connects become separate regions
        inside = labels == label
        strong |= inside & (contrast > 0.5 * np.quantile(contrast[inside], 0.9))
    labels = components(strong)
    found = tuple(_describe_region(pixels, ground, contrast, labels, label) for label in _large(labels))
    return Reading(found, _nearest(ground, BACKGROUNDS), tuple(ground.tolist()))


def _large(labels: np.ndarray) -> list[int]:
    """Labels of the regions that are large enough for an object, the largest first."""
    names, areas = np.unique(labels[labels >= 0], return_counts=True)
    return [int(name) for area, name in sorted(zip(-areas, names)) if -area >= MIN_AREA * labels.size]


def _describe_region(
    pixels: np.ndarray, ground: np.ndarray, contrast: np.ndarray, labels: np.ndarray, label: int
) -> Found:
    inside = labels == label  # (size, size)
    core = pixels[
        inside & (contrast >= np.quantile(contrast[inside], 0.7))
    ]  # (n, 3), without pixels mixed with the background
    # The pixel nearest to the median, since the median of several colours may be that of the background.
    color = core[np.argmin(np.linalg.norm(core - np.median(core, axis=0), axis=1))]
    # Share of the object in each pixel, taken as a mixture of background and object. The slope of 2 around one half
    # keeps a blurred outline in its place and removes faint halos.
    mixture = (pixels - ground) @ (color - ground) / np.sum((color - ground) ** 2)  # (size, size)
    share = np.clip(2 * (mixture - 0.5) + 0.5, 0, 1)
    share[~_dilate(_dilate(_dilate(inside))) | (~inside & (labels >= 0))] = 0
    area = float(share.sum())
    centers = np.arange(len(share)) + 0.5
    x, y = float(share.sum(0) @ centers) / area, float(share.sum(1) @ centers) / area

    offsets = _cell_centers()  # (FRAME_CELLS,)
    window = _at(share, y + math.sqrt(area) * offsets, x + math.sqrt(area) * offsets)  # (FRAME_CELLS, FRAME_CELLS)
    ideals = _ideals()
    cell = (2 * FRAME_HALF_SIDE / FRAME_CELLS) ** 2  # area, in units of the object's
    errors = {name: float(cell * np.abs(window - ideals[name].mask).sum()) for name in SHAPES}
    shape = min(SHAPES, key=lambda name: errors[name])

    scale = CANVAS / len(share)
    radius = scale * math.sqrt(area / ideals[shape].area)
    dx, dy = radius * ideals[shape].centroid
    middle = (scale * x - dx, scale * y - dy)
    position = _nearest(np.array(middle) - CANVAS / 2, POSITIONS)
    size = min(RADIUS, key=lambda name: abs(math.log(radius / RADIUS[name])))
    return Found(_nearest(color, COLORS), shape, size, position, middle, radius, errors)


def _nearest(value: np.ndarray, named: Mapping[str, Sequence[float]]) -> str:
    return min(named, key=lambda name: float(np.sum((value - named[name]) ** 2)))


# ---- regions and outlines


def components(mask: np.ndarray) -> np.ndarray:
    """Connected regions (4 neighbours) of a mask (H, W): labels (H, W) int64, -1 outside.

    A region's label is the flat index of its first pixel. Each round takes the smallest label among the neighbours and
    then the label of that label (pointer jumping), so the number of rounds depends on a region's bends, not its length.
    """
    height, width = mask.shape
    no_label = height * width
    labels = np.full((height + 2, width + 2), no_label)
    inner = labels[1:-1, 1:-1]
    inner[mask] = np.flatnonzero(mask)
    while True:
        before = inner[mask]
        smallest = np.minimum(
            np.minimum(labels[:-2, 1:-1], labels[2:, 1:-1]), np.minimum(labels[1:-1, :-2], labels[1:-1, 2:])
        )
        inner[mask] = np.minimum(before, smallest[mask])
        inner[mask] = inner.reshape(-1)[inner[mask]]
        if np.array_equal(before, inner[mask]):
            return np.where(mask, inner, -1)


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The mask and its 4 neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _at(image: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Bilinear values (n, m) of an image (H, W) at rows ys (n,) and columns xs (m,); 0 outside."""

    def weights(points: np.ndarray, count: int) -> np.ndarray:
        return np.clip(1 - np.abs(points[:, None] - np.arange(count) - 0.5), 0, None)  # (n, count)

    return weights(ys, image.shape[0]) @ image @ weights(xs, image.shape[1]).T


@dataclass(frozen=True)
class _Ideal:
    mask: np.ndarray  # (FRAME_CELLS, FRAME_CELLS) in [0, 1], of area 1 around its centroid
    area: float  # at radius 1
    centroid: np.ndarray  # (2,) at radius 1


@lru_cache(maxsize=1)
def _ideals() -> dict[str, _Ideal]:
    ideals = {}
    for shape in SHAPES:
        corners = outline(shape)
        x, y = corners.T
        x2, y2 = np.roll(corners, -1, axis=0).T
        cross = x * y2 - x2 * y  # the shoelace formula
        area = float(cross.sum()) / 2
        centroid = np.array([((x + x2) * cross).sum(), ((y + y2) * cross).sum()]) / (6 * area)
        fine = (np.arange(4 * FRAME_CELLS) + 0.5) / (2 * FRAME_CELLS) * FRAME_HALF_SIDE - FRAME_HALF_SIDE
        inside = _inside((corners - centroid) / math.sqrt(area), *np.meshgrid(fine, fine))
        mask = inside.reshape(FRAME_CELLS, 4, FRAME_CELLS, 4).mean(axis=(1, 3))
        ideals[shape] = _Ideal(mask, area, centroid)
    return ideals


def _cell_centers() -> np.ndarray:
    """Centres of the frame's cells along one side, relative to the centroid of an object of area 1: (FRAME_CELLS,)."""
    return (np.arange(FRAME_CELLS) + 0.5) / FRAME_CELLS * 2 * FRAME_HALF_SIDE - FRAME_HALF_SIDE


def _inside(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside a polygon: a ray to the right crosses its outline an odd number of times."""
    odd = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0)):
        if y1 != y2:
            odd ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return odd


# ---- judging


def judge(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which parts of a scene an image shows, by key of `compare`. Raises ValueError as `read` does."""
    return compare(read(image), scene)


def compare(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Which parts of a scene agree with a reading.

    Always "number" (of objects) and "background". One object: "color", "shape" and, if the caption mentions them,
    "size" and "position", all of the largest object found. Two objects, compared with the two largest found (all
    wrong if there are fewer): "colors" and "shapes" in any order; "binding", each colour with its shape; "relation",
    the objects lie along the right axis and match the named sides better than the opposite ones. "caption": all of
    these."""
    seen = reading.objects[: len(scene.objects)]
    verdict = {
        "number": len(reading.objects) == len(scene.objects),
        "background": reading.background == scene.background,
    }
    if len(scene.objects) == 1:
        (named,) = scene.objects
        for key in ("color", "shape", "size", "position"):
            if getattr(named, key) is not None:
                verdict[key] = bool(seen) and getattr(seen[0], key) == getattr(named, key)
    else:
        complete = len(seen) == 2
        verdict["colors"] = complete and _same(seen, scene.objects, lambda thing: thing.color)
        verdict["shapes"] = complete and _same(seen, scene.objects, lambda thing: thing.shape)
        verdict["binding"] = complete and _same(seen, scene.objects, lambda thing: (thing.color, thing.shape))
        verdict["relation"] = complete and _related(seen, scene)
    verdict["caption"] = all(verdict.values())
    return verdict


def _same(seen: Sequence[Found], named: Sequence[Object], attribute: Callable[[Any], Any]) -> bool:
    """Whether an attribute has the same values in both, in any order."""
    return sorted(map(attribute, seen)) == sorted(map(attribute, named))


def _related(seen: Sequence[Found], scene: Scene) -> bool:
    """Whether two objects are in the relation that the caption names."""
    (x1, y1), (x2, y2) = (thing.middle for thing in seen)
    sideways = scene.relation in ("to the left of", "to the right of")
    if sideways != (abs(x1 - x2) > abs(y1 - y2)):
        return False
    seen_order = sorted(seen, key=lambda thing: thing.middle[0 if sideways else 1])  # rightwards or downwards
    named_order = scene.objects if scene.relation in ("to the left of", "above") else scene.objects[::-1]
    return _agreement(seen_order, named_order) > _agreement(seen_order[::-1], named_order)


def _agreement(seen: Sequence[Found], named: Sequence[Object]) -> int:
    """Number of colours and shapes that agree, object by object."""
    return sum((a.color == b.color) + (a.shape == b.shape) for a, b in zip(seen, named))


def accuracy(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, dict]:
    """How often the readings of images agree with their captions' scenes.

    Returns {"single": ..., "pair": ...} for captions of one and of two objects; a kind without captions is absent.
    Each is {"count": captions, KEY: {"mean", "error", "count"}} with the keys of `compare`: the share that agrees,
    its binomial standard error and the number of captions that mention it. Raises ValueError unless there is one
    scene per reading."""
    if len(readings) != len(scenes):
        raise ValueError(f"there must be one scene for each image, got {len(readings)} images and {len(scenes)} scenes")
    verdicts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for reading, scene in zip(readings, scenes):
        for key, right in compare(reading, scene).items():
            verdicts["single" if len(scene.objects) == 1 else "pair"][key].append(right)
    return {
        kind: {"count": len(verdicts[kind]["caption"])}
        | {key: _share(values) for key, values in verdicts[kind].items()}
        for kind in ("single", "pair")
        if kind in verdicts
    }


def _share(values: Sequence[bool]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {"mean": mean, "error": math.sqrt(mean * (1 - mean) / len(values)), "count": len(values)}
