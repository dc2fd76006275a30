"""The judge of generated shapes: right on what it should know, at chance on what nobody can know."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fastimagen.data.shapes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RADIUS,
    SHAPES,
    SPLITS,
    Object,
    Scene,
    parse,
    render,
    sample,
)
from fastimagen.evaluation.shape_reader import Reading, accuracy, compare, components, judge, read

SINGLE = {"number", "background", "color", "shape", "size", "position", "caption"}
PAIR = {"number", "background", "colors", "shapes", "binding", "relation", "caption"}


def blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    small = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def stretched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fifth narrower or lower."""
    return moved(image, np.diag((1.2, 1) if rng.random() < 0.5 else (1, 1.2)))


def turned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """By up to ten degrees."""
    angle = math.radians(rng.uniform(-10, 10))
    return moved(image, np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))]))


def moved(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The image at matrix @ (x, y) from the middle, surrounded by its corner."""
    middle = np.full(2, 32)  # Pillow counts from the pixels' corners
    (a, b, c), (d, e, f) = np.column_stack([matrix, middle - matrix @ middle])
    return np.asarray(
        Image.fromarray(image).transform(
            (64, 64),
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            Image.Resampling.BICUBIC,
            fillcolor=tuple(image[0, 0].tolist()),
        )
    )


def wobbly(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges out of line by about half a pixel, in waves about eight pixels long."""
    shifts = [
        np.asarray(Image.fromarray(rng.normal(0, 0.5, (9, 9)).astype(np.float32)).resize((64, 64))) for _ in range(2)
    ]
    y, x = (np.clip(places + shift, 0, 62.999) for places, shift in zip(np.mgrid[:64, :64], shifts))
    rows, columns = y.astype(int), x.astype(int)
    down, right = (y - rows)[..., None], (x - columns)[..., None]
    top = image[rows, columns] * (1 - right) + image[rows, columns + 1] * right
    bottom = image[rows + 1, columns] * (1 - right) + image[rows + 1, columns + 1] * right
    return np.rint(top * (1 - down) + bottom * down).astype(np.uint8)


def untouched(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def samples(split: str, count: int, size: int = 64) -> tuple[list[np.ndarray], list[Scene]]:
    made = [sample(split, i, size=size) for i in range(count)]
    return [image for image, _ in made], [parse(text) for _, text in made]


def draw(text: str, seed: int = 0) -> np.ndarray:
    return render(parse(text), 64, np.random.default_rng(seed))


# ---- what it should know


@pytest.mark.parametrize("harm, least", [(untouched, 0.99), (blurred, 0.98), (noisy, 0.98)])
@pytest.mark.parametrize("split", SPLITS)
def test_rendered_images_are_read_right(split, harm, least):
    images, scenes = samples(split, 100)
    rng = np.random.default_rng(0)
    figures = accuracy([read(harm(image, rng)) for image in images], scenes)
    assert set(figures["single"]) == SINGLE | {"count"} and set(figures["pair"]) == PAIR | {"count"}
    assert (figures["single"]["count"], figures["pair"]["count"]) == (75, 25)
    for kind in figures.values():
        for key, value in kind.items():
            assert key == "count" or value["mean"] >= least, (key, value)


@pytest.mark.parametrize("harm", [stretched, turned, wobbly])
def test_imperfect_shapes_are_read_right(harm):
    images, scenes = samples("seen", 200)
    rng = np.random.default_rng(0)
    harmed = [harm(image, rng) for image in images]
    assert np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(images, harmed)]) > 0.5
    for figures in accuracy([*map(read, harmed)], scenes).values():
        for key, value in figures.items():
            assert key == "count" or value["mean"] >= 0.98, (key, value)


@pytest.mark.parametrize("size", [32, 128])
def test_images_of_other_sizes_are_read_right(size):
    images, scenes = samples("seen", 60, size)
    figures = accuracy([*map(read, images)], scenes)
    assert figures["single"]["caption"]["mean"] >= 0.97 and figures["pair"]["caption"]["mean"] >= 0.93


def test_every_attribute_is_read_for_every_combination_of_shape_size_and_place():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for size in RADIUS:
            for position, (x, y) in POSITIONS.items():
                thing = Object("cyan", shape, size, position)
                (found,) = read(render(Scene((thing,), "gray"), 64, rng)).objects
                assert Object(found.color, found.shape, found.size, found.position) == thing
                assert math.dist(found.middle, (32 + x, 32 + y)) < 3.2
                assert abs(found.radius / RADIUS[size] - 1) < 0.09


def test_every_colour_is_read_on_every_background():
    rng = np.random.default_rng(0)
    for ground in BACKGROUNDS:
        for color in COLORS:
            image = render(Scene((Object(color, "star", "small", "top"),), ground), 64, rng)
            reading = read(noisy(image, rng))
            assert (reading.background, [thing.color for thing in reading.objects]) == (ground, [color])


def test_colours_are_those_of_the_middle_and_not_of_blurred_edges():
    for ground in BACKGROUNDS:
        for color in COLORS:
            image = Image.fromarray(draw(f"a small {color} square in the center of a {ground} background"))
            (thing,) = read(np.asarray(image.filter(ImageFilter.GaussianBlur(3)))).objects
            assert thing.color == color, ground


def test_blobs_are_circles_and_a_haze_does_not_join_objects():
    image = Image.fromarray(draw("a small red circle in the center of a white background"))
    assert read(np.asarray(image.filter(ImageFilter.GaussianBlur(3)))).objects[0].shape == "circle"
    image = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    pen = ImageDraw.Draw(image)
    pen.rectangle((10, 28, 54, 36), fill=(250, 190, 190))  # of contrast 85, the objects 320
    pen.ellipse((8, 22, 28, 42), fill=COLORS["red"])
    pen.rectangle((38, 22, 58, 42), fill=COLORS["red"])
    reading = read(np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))))
    assert {(thing.color, thing.shape) for thing in reading.objects} == {("red", "circle"), ("red", "square")}
    named = parse("a red circle to the left of a red square on a white background")
    assert compare(reading, named)["caption"]


def test_specks_are_no_objects_and_nothing_is_no_object():
    image = draw("a large blue square in the center of a white background").copy()
    image[2:6, 2:6] = 0
    assert len(read(image).objects) == 1
    image[0, 0] = image[-1, -1] = 0  # the background is not that of a corner
    image[30:40, 2:10] -= 16  # nor is a faint stain, of contrast 28
    reading = read(image)
    assert (reading.background, [(thing.color, thing.shape) for thing in reading.objects]) == (
        "white",
        [("blue", "square")],
    )
    empty = np.full((64, 64, 3), 12, np.uint8)
    assert read(empty) == Reading((), "black", (12.0, 12.0, 12.0))
    assert judge(empty, parse("a red circle on a black background")) == {
        "number": False,
        "background": True,
        "color": False,
        "shape": False,
        "caption": False,
    }
    verdict = judge(empty, parse("a red circle above a blue star on a black background"))
    assert [key for key, right in verdict.items() if right] == ["background"] and set(verdict) == PAIR


def test_a_close_neighbour_does_not_add_to_an_object():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[22:42, 11:31] = image[22:42, 33:53] = COLORS["blue"]
    reading = read(image)
    assert sorted((thing.shape, *thing.middle) for thing in reading.objects) == [
        ("square", pytest.approx(21), pytest.approx(32)),
        ("square", pytest.approx(43), pytest.approx(32)),
    ]
    assert [thing.radius for thing in reading.objects] == pytest.approx([20 / 1.6] * 2)


def test_a_patchwork_around_the_background_colour_is_read():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[20:44, 20:44] = (28, 128, 128)
    image[20:44:2, 20:44:2] = image[21:44:2, 21:44:2] = (228, 128, 128)  # the median is the background
    (thing,) = read(image).objects
    assert 5 < thing.radius < 20 and thing.position == "center"


# ---- what counts as right


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a large red circle on the left of a white background", set()),
        ("a red circle on a white background", set()),
        ("a large pink circle on the left of a white background", {"color"}),
        ("a large red square on the left of a white background", {"shape"}),
        ("a small red circle on the left of a white background", {"size"}),
        ("a large red circle on the right of a white background", {"position"}),
        ("a large red circle on the left of a gray background", {"background"}),
        ("a small blue star at the top of a gray background", {"color", "shape", "size", "position", "background"}),
    ],
)
def test_exactly_the_wrong_attribute_of_one_object_is_wrong(text, wrong):
    verdict = judge(draw("a large red circle on the left of a white background"), parse(text))
    assert {key for key, right in verdict.items() if not right} == wrong | ({"caption"} if wrong else set())
    mentioned = parse(text).objects[0]
    assert ("size" in verdict, "position" in verdict) == (bool(mentioned.size), bool(mentioned.position))


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a red circle to the left of a green square on a white background", set()),
        ("a green square to the right of a red circle on a white background", set()),  # the same said differently
        ("a red circle to the right of a green square on a white background", {"relation"}),
        ("a red circle above a green square on a white background", {"relation"}),
        ("a red circle to the left of a blue square on a white background", {"colors", "binding"}),
        ("a red circle to the left of a green star on a white background", {"shapes", "binding"}),
        ("a red circle to the left of a green square on a black background", {"background"}),
        ("a red square to the left of a green circle on a white background", {"binding", "relation"}),
        ("a red circle to the left of a red square on a white background", {"colors", "binding"}),
    ],
)
def test_exactly_the_wrong_attribute_of_two_objects_is_wrong(text, wrong):
    verdict = judge(draw("a red circle to the left of a green square on a white background"), parse(text))
    assert set(verdict) == PAIR
    assert {key for key, right in verdict.items() if not right} == wrong | ({"caption"} if wrong else set())


@pytest.mark.parametrize("relation", ["to the left of", "to the right of", "above", "below"])
def test_relations_are_told_apart(relation):
    texts = {
        other: f"a pink star {other} a pink cross on a gray background"
        for other in ("to the left of", "to the right of", "above", "below")
    }
    image = draw(texts[relation])
    assert [other for other, text in texts.items() if judge(image, parse(text))["relation"]] == [relation]


def test_an_object_too_many_or_too_few_is_wrong():
    one = draw("a small red circle on the left of a white background")
    two = draw("a red circle to the left of a green square on a white background")
    verdict = judge(two, parse("a red circle on a white background"))
    assert not verdict["number"] and not verdict["caption"] and verdict["background"]
    verdict = judge(one, parse("a red circle to the left of a green square on a white background"))
    assert {key for key, right in verdict.items() if right} == {"background"}


# ---- what nobody can know


def attributes(seen: Reading | Scene, kind: str) -> dict[str, object]:
    """What must be equal for a verdict, by key of `compare`; None if nothing was seen. Not the relation."""
    things = seen.objects
    values: dict[str, object] = {"number": len(things), "background": seen.background}
    if kind == "single":
        for key in ("color", "shape", "size", "position"):
            values[key] = getattr(things[0], key) if things else None
        return values | {"caption": tuple(values.values())}
    named = [(thing.color, thing.shape) for thing in things[:2]]
    sought = {
        "colors": sorted(color for color, _ in named),
        "shapes": sorted(shape for _, shape in named),
        "binding": sorted(named),
    }
    return values | {key: tuple(value) if len(named) == 2 else None for key, value in sought.items()}


def chances(readings: list[Reading], scenes: list[Scene], kind: str) -> dict[str, float]:
    """Expected accuracies when images know nothing about captions.

    The sum over values v of (share of readings with v) x (share of captions with v): it allows for captions
    that are not uniform and for a reader that favours one answer. The relation has no such value, since it
    depends on which object is which: its chance, and with it that of whole two-object captions, is the mean
    over all readings with all captions.
    """
    result = {}
    for key in SINGLE if kind == "single" else PAIR - {"relation", "caption"}:
        seen, named = (Counter(attributes(item, kind)[key] for item in items) for items in (readings, scenes))
        result[key] = sum(seen[value] * named[value] for value in named) / len(readings) / len(scenes)
    if kind == "pair":
        every = [compare(reading, item) for reading in readings for item in scenes]
        for key in ("relation", "caption"):
            result[key] = sum(verdict[key] for verdict in every) / len(every)
    return result


@pytest.mark.parametrize("content", ["shuffled", "noise", "smooth noise"])
def test_images_that_know_nothing_are_right_by_chance(content):
    rng = np.random.default_rng(1)
    images, scenes = samples("seen", 240)
    if content != "shuffled":
        images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in images]
    if content == "smooth noise":  # blobs of all colours, in which objects are found
        coarse = [Image.fromarray(image[:6, :6]) for image in images]
        images = [np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in coarse]
    for kind, count in (("single", 1), ("pair", 2)):
        chosen = [i for i, item in enumerate(scenes) if len(item.objects) == count]
        order = rng.permutation(chosen)
        readings, named = [read(images[i]) for i in chosen], [scenes[i] for i in order]
        expected = chances(readings, named, kind)
        verdicts = [compare(reading, item) for reading, item in zip(readings, named)]
        assert set(expected) == set(verdicts[0]) == (SINGLE if kind == "single" else PAIR)
        for key, chance in expected.items():
            mean = sum(verdict[key] for verdict in verdicts) / len(verdicts)
            error = math.sqrt(chance * (1 - chance) / len(verdicts))
            assert abs(mean - chance) <= 3 * error + 1e-12, (kind, key)
        if content == "shuffled":  # the reader answers as captions do, so that chance is what it looks like
            sides = {"background": 1 / 3, "color": 1 / 8, "shape": 1 / 5, "size": 1 / 2, "position": 1 / 5}
            for key in sides.keys() & expected.keys():
                assert abs(expected[key] - sides[key]) < 0.03, key


# ---- figures, errors, regions


def test_accuracy_counts_what_captions_mention():
    texts = [
        "a large red circle on the left of a white background",
        "a red circle on a white background",
        "a large red square on a white background",
    ]
    image = draw(texts[0])
    figures = accuracy([read(image)] * 3, [parse(text) for text in texts])
    assert set(figures) == {"single"} and figures["single"]["count"] == 3
    assert figures["single"]["position"] == {"mean": 1.0, "error": 0.0, "count": 1}
    assert figures["single"]["size"]["count"] == 2
    share = figures["single"]["shape"]
    assert (share["mean"], share["count"]) == (pytest.approx(2 / 3), 3)
    assert share["error"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert figures["single"]["caption"] == share
    assert json.loads(json.dumps(figures)) == figures  # plain numbers, for the report
    assert accuracy([], []) == {}
    with pytest.raises(ValueError, match=r"2 images .* 1 scenes"):
        accuracy([read(image)] * 2, [parse(texts[0])])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3)),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((32, 64, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="expected pixels"):
        read(image)


def test_reading_does_not_depend_on_the_neighbours_or_change_the_image():
    images, scenes = samples("unseen", 6)
    for image in images:
        image.setflags(write=False)
    assert [read(image) for image in images] == [read(image) for image in images[::-1]][::-1]
    reading = read(images[0])
    assert (reading.background, len(reading.objects)) == (scenes[0].background, len(scenes[0].objects))


def flooded(mask: np.ndarray) -> np.ndarray:
    """Regions by flood fill, named by their first pixel."""
    labels = np.full(mask.shape, -1)
    for start in np.argwhere(mask):
        todo = [tuple(start)] if labels[tuple(start)] < 0 else []
        name = start[0] * mask.shape[1] + start[1]
        while todo:
            y, x = todo.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and labels[y, x] < 0:
                labels[y, x] = name
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return labels


def spiral(side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[0, 0] = True
    for length in [side - 1, *(n for n in range(side - 1, 1, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    return mask


def test_regions_are_those_of_a_flood_fill():
    rng = np.random.default_rng(0)
    masks = [rng.random((17, 23)) < density for density in (0, 0.2, 0.5, 0.6, 0.7, 1)]
    masks += [spiral(21), spiral(21).T, ~spiral(20)]
    for mask in masks:
        assert np.array_equal(components(mask), flooded(mask))
