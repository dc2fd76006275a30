"""Boxes and arrows of the tutorial: the way from a caption to an image, and the U-Net."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, FACE = "#0072b2", "#d55e00", "#eef3f8"
Point = tuple[float, float]


def cascade(caption: str, tokens: np.ndarray, noises: list[np.ndarray], images: list[np.ndarray]) -> Figure:
    """From the caption to the image. tokens (L, E); noise and image (H, W, 3) uint8 of the base and the sr stage."""
    figure, canvas = _canvas(9.4, 3.4)
    canvas.text(0.1, 3.15, f"“{caption}”", va="center", style="italic")
    _arrow(canvas, (1.2, 3.0), (1.2, 2.62))
    _box(canvas, (1.2, 2.35), (2.0, 0.5), "text encoder")
    _arrow(canvas, (2.25, 2.35), (2.75, 2.35))
    vectors = _image(canvas, (2.8, 2.05, 1.8, 0.6))
    vectors.imshow(tokens, cmap="RdBu", aspect="auto", vmin=-3, vmax=3)
    canvas.text(4.7, 2.35, "one vector per token", va="center", fontsize=9)
    for x, noise, image, name in zip((0.6, 5.3), noises, images, ("base stage\n32x32", "super-resolution\n64x64")):
        _image(canvas, (x - 0.5, 0.3, 1.0, 1.0)).imshow(noise, interpolation="nearest")
        _arrow(canvas, (x + 0.55, 0.8), (x + 0.85, 0.8))
        _box(canvas, (x + 1.55, 0.8), (1.4, 0.6), name)
        _arrow(canvas, (x + 2.27, 0.8), (x + 2.57, 0.8))
        _image(canvas, (x + 2.6, 0.3, 1.0, 1.0)).imshow(image, interpolation="nearest")
        canvas.text(x, 0.15, "noise", ha="center", va="center", fontsize=9)
        _arrow(canvas, (3.7, 2.0), (x + 1.55, 1.13))
    canvas.text(3.7, 0.15, "base image", ha="center", va="center", fontsize=9)
    canvas.text(8.4, 0.15, "final image", ha="center", va="center", fontsize=9)
    canvas.plot([3.7, 3.7, 6.6, 6.6], [0.05, -0.1, -0.1, 0.0], color="black", linewidth=1)
    _arrow(canvas, (6.6, -0.1), (6.6, 0.47))
    canvas.set_ylim(-0.15, 3.3)
    return figure


def unet() -> Figure:
    """The quickstart's base U-Net; shapes are (channels, height, width)."""
    figure, canvas = _canvas(9.4, 4.2)
    boxes = {
        "x_t": ((0.8, 3.7), "x_t\n(3, 32, 32)"),
        "stem": ((0.8, 2.6), "patches, stem\n(64, 8, 8)"),
        "down 0": ((2.7, 2.6), "level 0\nres + cross\n(64, 8, 8)"),
        "down 1": ((2.7, 0.7), "level 1\nres\ntransformer"),
        "middle": ((4.7, 0.7), "middle\n2 x res + cross\n(64, 4, 4)"),
        "up 1": ((6.7, 0.7), "level 1\nres\ntransformer"),
        "up 0": ((6.7, 2.6), "level 0\nres + cross\n(64, 8, 8)"),
        "final": ((8.6, 2.6), "res, convolution\n(48, 8, 8)"),
        "output": ((8.6, 3.7), "output\n(3, 32, 32)"),
    }
    for middle, words in boxes.values():
        _box(canvas, middle, (1.4, 0.85), words)
    at = {name: middle for name, (middle, _) in boxes.items()}
    for start, stop, way in (
        ("x_t", "stem", -1),
        ("down 0", "down 1", -1),
        ("up 1", "up 0", 1),
        ("final", "output", 1),
    ):
        (x, low), (_, high) = at[start], at[stop]
        _arrow(canvas, (x, low + way * 0.45), (x, high - way * 0.45))
    for start, stop in (("stem", "down 0"), ("down 1", "middle"), ("middle", "up 1"), ("up 0", "final")):
        _arrow(canvas, (at[start][0] + 0.72, at[start][1]), (at[stop][0] - 0.72, at[stop][1]))
    _arrow(canvas, (3.45, 2.6), (5.95, 2.6), color=ORANGE, style="--")
    canvas.plot([3.05, 3.05, 6.35], [1.15, 1.5, 1.5], color=ORANGE, linestyle="--", linewidth=1)
    _arrow(canvas, (6.35, 1.5), (6.35, 1.15), color=ORANGE, style="--")
    canvas.text(4.7, 2.68, "skip (64, 8, 8)", ha="center", color=ORANGE, fontsize=9)
    canvas.text(4.7, 1.58, "skip (64, 4, 4)", ha="center", color=ORANGE, fontsize=9)
    canvas.text(2.6, 1.75, "halve the\nresolution", ha="right", va="center", fontsize=9)
    canvas.text(6.8, 1.85, "double the\nresolution", va="center", fontsize=9)
    canvas.text(
        4.7, 3.8, "time and pooled text: FiLM in every residual block (res)", ha="center", color=BLUE, fontsize=9
    )
    canvas.text(4.7, 3.5, "text tokens: cross-attention (cross)", ha="center", color=BLUE, fontsize=9)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A drawing without axes; coordinates are inches."""
    figure = pyplot.figure(figsize=(width, height))
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, width), ylim=(0, height))
    canvas.axis("off")
    return figure, canvas


def _image(canvas: Axes, box: tuple[float, float, float, float]) -> Axes:
    """A place for an image: left, bottom, width, height."""
    axes = canvas.inset_axes(box, transform=canvas.transData)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes


def _box(canvas: Axes, middle: Point, size: Point, words: str) -> None:
    corner = (middle[0] - size[0] / 2, middle[1] - size[1] / 2)
    canvas.add_patch(pyplot.Rectangle(corner, *size, facecolor=FACE, edgecolor=BLUE, linewidth=1))
    canvas.text(*middle, words, ha="center", va="center", fontsize=9)


def _arrow(canvas: Axes, start: Point, stop: Point, *, color: str = "black", style: str = "-") -> None:
    canvas.annotate("", stop, start, arrowprops={"arrowstyle": "->", "color": color, "linestyle": style})
