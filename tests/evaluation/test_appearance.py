"""Figures of how images look, on true images that are changed in known ways."""

from __future__ import annotations

import numpy as np
import pytest

from fastimagen.data.shapes import BACKGROUNDS, SHAPES, caption, open_image, open_scene, parse, render, sample, scene
from fastimagen.evaluation.appearance import background_error, contrast, distance, outline_margins
from fastimagen.evaluation.shape_reader import read

COUNT = 40
SCENES = [scene("seen", index) for index in range(COUNT)]
TRUE = np.stack([sample("seen", index)[0] for index in range(COUNT)])


def washed_out(images: np.ndarray, share: float) -> np.ndarray:
    """Each image mixed with its mean."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return np.round(mean + (1 - share) * (images - mean)).astype(np.uint8)


@pytest.mark.parametrize("share", [0.0, 0.12, 0.4])
def test_contrast_is_the_ratio_of_standard_deviations(share: float) -> None:
    figure = contrast(washed_out(TRUE, share), TRUE)
    assert figure["mean"] == pytest.approx(1 - share, abs=0.003) and figure["error"] < 0.002
    assert figure["count"] == COUNT


def test_background_error_is_the_distance_from_the_named_colour() -> None:
    readings = [read(image) for image in TRUE]
    assert background_error(readings, SCENES)["mean"] == 0
    shifted = np.clip(TRUE.astype(int) + np.array([3, 4, 0]), 0, 255).astype(np.uint8)
    figure = background_error([read(image) for image in shifted], SCENES)
    assert figure["mean"] == pytest.approx(np.sqrt((3**2 + 4**2) / 3), abs=1e-6)
    assert figure["error"] == pytest.approx(0, abs=1e-6)


def test_outline_margins_tell_round_circles_from_squarish_ones() -> None:
    named = parse("a large red circle in the center of a white background")
    square = render(parse("a large red square in the center of a white background"), 64, np.random.default_rng(0))
    circle = render(named, 64, np.random.default_rng(0))
    half = np.where(np.random.default_rng(1).random(circle.shape[:2])[..., None] < 0.5, circle, square)
    margins = [outline_margins([read(image)], [named])["circle"]["mean"] for image in (circle, half, square)]
    assert margins[0] > 0.7 and margins[0] > margins[1] > margins[2] and margins[2] < -0.5
    empty = np.full_like(circle, BACKGROUNDS["white"][0])
    assert outline_margins([read(empty)], [named])["all"]["mean"] == -1


def test_outline_margins_of_true_images_are_high_for_every_shape() -> None:
    figures = outline_margins([read(image) for image in TRUE], SCENES)
    assert set(figures) == {"all", *SHAPES}
    assert all(figure["mean"] > 0.5 for figure in figures.values())
    assert figures["all"]["count"] == sum(len(item.objects) == 1 for item in SCENES)


def test_distance_is_the_root_mean_square_of_pixels_between_minus_1_and_1() -> None:
    black, white = np.zeros((3, 8, 8, 3), np.uint8), np.full((3, 8, 8, 3), 255, np.uint8)
    assert distance(black, white) == {"mean": 2.0, "error": 0.0, "count": 3}
    half = white.copy()
    half[:, :4] = 0
    assert distance(white, half)["mean"] == pytest.approx(2 / np.sqrt(2))


def test_open_captions_name_no_size_no_position_or_neither() -> None:
    scenes = [open_scene(index) for index in range(30)]
    missing = {(item.objects[0].size is None, item.objects[0].position is None) for item in scenes}
    assert missing == {(True, False), (False, True), (True, True)}
    assert all(parse(caption(item)) == item for item in scenes)
    for index, item in enumerate(scenes):
        (found,) = read(open_image(index, 0)).objects
        (named,) = item.objects
        assert (found.color, found.shape) == (named.color, named.shape)
        assert named.position in (None, found.position) and named.size in (None, found.size)


def test_true_images_of_an_open_caption_differ_and_are_reproducible() -> None:
    first, again, other = ([open_image(index, draw) for index in range(12)] for draw in (0, 0, 1))
    assert np.array_equal(first, again)
    assert distance(np.stack(first), np.stack(other))["mean"] > 0.1
