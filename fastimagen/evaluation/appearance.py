"""How images of captioned shapes look beside true ones: contrast, background colour, outlines, and their variety.

Accuracy is blind to all of these. Each figure is a mean over images with its standard error, and stands beside that of
the true images of the same scenes. Images are (B, size, size, 3) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..data.shapes import BACKGROUNDS, Scene
from .shape_reader import Found, Reading

Figure = dict[str, float]
"""{"mean", "error" (standard error), "count"}."""


def contrast(images: np.ndarray, true: np.ndarray) -> Figure:
    """The ratio of the images' contrast to that of the true ones.

    An image's contrast is the standard deviation of its pixels and channels; the ratio is that of the means over all
    images, its standard error is that of a ratio estimator.
    """
    ours, theirs = (pixels.reshape(len(pixels), -1).std(axis=1, dtype=np.float64) for pixels in (images, true))  # (B,)
    ratio = ours.mean() / theirs.mean()
    return {**_figure((ours - ratio * theirs) / theirs.mean()), "mean": float(ratio)}


def background_error(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Figure:
    """The distance of the background from the named colour: root mean square over the channels, of 255."""
    offsets = [np.subtract(reading.ground, BACKGROUNDS[scene.background]) for reading, scene in zip(readings, scenes)]
    return _figure([math.sqrt(np.mean(offset**2)) for offset in offsets])


def outline_margins(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, Figure]:
    """How clearly the largest object has the named outline, by shape and for "all"; scenes of one object only.

    The margin is 1 - (error of the named outline) / (smallest error of another one): 1 for an ideal outline, below 0
    for an object that looks more like another shape, -1 for an image without an object.
    """
    margins: dict[str, list[float]] = {"all": []}
    for reading, scene in zip(readings, scenes):
        if len(scene.objects) == 1:
            shape = scene.objects[0].shape
            margin = _margin(reading.objects[0], shape) if reading.objects else -1.0
            margins["all"].append(margin)
            margins.setdefault(shape, []).append(margin)
    return {shape: _figure(values) for shape, values in margins.items() if values}


def _margin(found: Found, shape: str) -> float:
    others = min(error for name, error in found.outline_errors.items() if name != shape)
    return max(-1.0, 1 - found.outline_errors[shape] / others)


def distance(images: np.ndarray, others: np.ndarray) -> Figure:
    """The root mean square difference of two images of one caption, in [0, 2] for pixels in [-1, 1]."""
    difference = (images.astype(np.float64) - others) / 127.5  # (B, size, size, 3)
    return _figure(np.sqrt(np.square(difference).mean(axis=(1, 2, 3))))


def _figure(values: Sequence[float] | np.ndarray) -> Figure:
    count = len(values)
    return {"mean": float(np.mean(values)), "error": float(np.std(values) / math.sqrt(count)), "count": count}
