"""Captioned shapes: captions, images, splits and shards."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image

from fastimagen.data import shapes
from fastimagen.data.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    POSITIONS,
    RADIUS,
    RELATIONS,
    SHAPES,
    SPLITS,
    UNMENTIONED,
    UNSEEN_PAIRS,
    Object,
    Scene,
    caption,
    has_shards,
    parse,
    render,
    sample,
    scene,
    write_shards,
)
from fastimagen.data.shards import open_shards

AREAS = {  # of a shape of radius 1, from the formulas of geometry
    "circle": math.pi * 0.92**2,
    "square": 1.6**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.2**2,
    "star": 5 * 1.14 * 0.55 * math.sin(math.pi / 5),
    "cross": 4 * (2 * 0.38) - (2 * 0.38) ** 2,
}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [scene(split, i) for i in range(HELD_OUT.get(split, 1400))] for split in SPLITS}


def pairs_of(item: Scene) -> list[tuple[str, str]]:
    return [(thing.color, thing.shape) for thing in item.objects]


def singles(items: list[Scene]) -> list[Scene]:
    return [item for item in items if len(item.objects) == 1]


class Placed:
    """Stands in for the random generator: the centre is moved by `offset`, the radius stays."""

    def __init__(self, offset):
        self.offset = offset

    def uniform(self, low, high, size=None):
        return 1.0 if size is None else self.offset


# ---- captions


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "a large red circle on the left of a white background",
            Scene((Object("red", "circle", "large", "left"),), "white"),
        ),
        (
            "a small orange star in the center of a black background",
            Scene((Object("orange", "star", "small", "center"),), "black"),
        ),
        ("an orange cross at the top of a black background", Scene((Object("orange", "cross", None, "top"),), "black")),
        ("a large pink triangle on a gray background", Scene((Object("pink", "triangle", "large"),), "gray")),
        ("a red circle on a white background", Scene((Object("red", "circle"),), "white")),
        (
            "a red circle to the left of a green square on a white background",
            Scene((Object("red", "circle"), Object("green", "square")), "white", "to the left of"),
        ),
        (
            "a red circle below an orange circle on a gray background",
            Scene((Object("red", "circle"), Object("orange", "circle")), "gray", "below"),
        ),
    ],
)
def test_captions_parse_to_their_scenes(text, expected):
    assert parse(text) == expected
    assert caption(expected) == text


def test_different_scenes_have_different_captions(scenes):
    every = [
        Scene((Object(color, shape, size, position),), ground)
        for color, shape, size, position, ground in itertools.product(
            COLORS, SHAPES, [*RADIUS, None], [*POSITIONS, None], BACKGROUNDS
        )
    ]
    captions = [caption(item) for item in every]
    assert len(set(captions)) == len(every) == 8 * 5 * 3 * 6 * 3
    assert [parse(text) for text in captions] == every
    for items in scenes.values():
        assert [parse(caption(item)) for item in items] == items


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "A red circle on a black background",
        "a red circle on a black background.",
        " a red circle on a black background",
        "a red circle on a black background\n",
        "a huge red circle on a black background",
        "an red circle on a black background",
        "a orange circle on a black background",
        "a red circle on an black background",
        "a brown circle on a black background",
        "a red circle on the middle of a black background",
        "a red circle on a blue background",
        "a red circle above a red circle on a gray background",
        "a large red circle above a blue star on a white background",
        "a red circle near a blue star on a white background",
    ],
)
def test_other_sentences_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert "\n" not in str(error.value) and repr(text) in str(error.value)


# ---- splits


def test_a_sample_depends_on_split_index_and_seed_only():
    forwards = [sample("train", i) for i in range(8)]
    backwards = [sample("train", i) for i in reversed(range(8))][::-1]
    for (image, text), (again, text_again) in zip(forwards, backwards):
        assert text == text_again and np.array_equal(image, again)
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert [caption(scene("train", i)) for i in range(8)] == [text for _, text in forwards]
    assert [text for _, text in forwards] != [sample("train", i, seed=1)[1] for i in range(8)]
    assert [text for _, text in forwards] != [sample("val", i)[1] for i in range(8)]
    assert len({sample("train", i)[0].tobytes() for i in range(200)}) == 200


def test_an_image_shows_the_same_scene_at_any_size():
    for i in range(12):
        full, half = sample("seen", i)[0], sample("seen", i, size=32)[0]
        reduced = np.asarray(Image.fromarray(full).reduce(2))
        assert half.shape == (32, 32, 3)
        assert np.abs(reduced.astype(int) - half).mean() < 2


def test_unseen_pairs_occur_in_the_unseen_split_only(scenes):
    assert len({color for color, _ in UNSEEN_PAIRS}) == len({shape for _, shape in UNSEEN_PAIRS}) == 5
    for split in ("train", "val", "seen"):
        assert not any(pair in UNSEEN_PAIRS for item in scenes[split] for pair in pairs_of(item))
    found = [[pair in UNSEEN_PAIRS for pair in pairs_of(item)] for item in scenes["unseen"]]
    assert all(any(flags) for flags in found)
    assert {len(flags) for flags in found} == {1, 2}
    places = Counter(flags.index(True) for flags in found if len(flags) == 2)  # first or second object
    assert abs(places[0] - places[1]) <= 1


def test_splits_are_independent(scenes):
    for split, other in itertools.combinations(("train", "val", "seen"), 2):
        both = list(zip(scenes[split], scenes[other]))
        alike = sum(pairs_of(a) == pairs_of(b) for a, b in both)
        assert alike < 0.1 * len(both), (split, other)  # 1 in 35 by chance


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_balanced(scenes, split):
    items = scenes[split]
    assert {len(items) // 4} == {sum(len(item.objects) == 2 for item in items)}
    alone = singles(items)
    kinds = Counter(pair for item in alone for pair in pairs_of(item))
    assert len(kinds) == (5 if split == "unseen" else 35) and max(kinds.values()) - min(kinds.values()) <= 1
    grounds = Counter(item.background for item in items)
    assert set(grounds) == set(BACKGROUNDS) and max(grounds.values()) - min(grounds.values()) <= 2
    relations = Counter(item.relation for item in items if item.relation)
    assert set(relations) == set(RELATIONS) and max(relations.values()) - min(relations.values()) <= 1
    assert all(len(set(item.objects)) == len(item.objects) for item in items)


def test_test_captions_mention_every_attribute_and_training_captions_most(scenes):
    for split in ("seen", "unseen"):
        places = Counter((item.objects[0].size, item.objects[0].position) for item in singles(scenes[split]))
        assert set(places) == {*itertools.product(RADIUS, POSITIONS)}
        assert max(places.values()) - min(places.values()) <= 1
    things = [item.objects[0] for item in singles(scenes["train"])]
    for attribute in ("size", "position"):
        share = sum(getattr(thing, attribute) is None for thing in things) / len(things)
        assert abs(share - UNMENTIONED) < 4 * math.sqrt(UNMENTIONED * (1 - UNMENTIONED) / len(things))
    assert any(thing.size is thing.position is None for thing in things)
    # Knowing one attribute says nothing about another: every combination of shape and place occurs.
    assert len({(thing.shape, thing.size, thing.position) for thing in things if thing.size and thing.position}) == len(
        SHAPES
    ) * len(RADIUS) * len(POSITIONS)


@pytest.mark.parametrize(
    "split, index, seed, word",
    [
        ("test", 0, 0, "train, val, seen, unseen"),
        ("train", -1, 0, "-1"),
        ("train", 3, -2, "-2"),
    ],
)
def test_unknown_splits_and_negative_numbers_are_refused(split, index, seed, word):
    with pytest.raises(ValueError, match=word):
        sample(split, index, seed)


def test_images_of_this_version_are_unchanged():
    """If images change, increase VERSION, so that folders of older images are not reused, and update these numbers."""
    texts = [sample("train", i)[1] for i in (0, 1, 3)]
    means = [[round(float(value)) for value in sample("train", i)[0].mean((0, 1))] for i in (0, 1, 3)]
    assert shapes.VERSION == 3
    assert texts == [
        "a small orange star on the left of a white background",
        "a large purple cross on the right of a black background",
        "a blue square above a red triangle on a white background",
    ]
    assert np.abs(np.subtract(means, [[250, 244, 239], [30, 14, 37], [236, 229, 238]])).max() <= 1


# ---- images


def cover(image: np.ndarray, color: str, background: str) -> np.ndarray:
    """Share (H, W) of a colour in pixels that mix it with the background."""
    start = np.array(BACKGROUNDS[background], float)
    step = COLORS[color] - start
    return (image - start) @ step / (step @ step)


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_match_the_caption(split):
    for i in range(60):
        image, text = sample(split, i)
        item = parse(text)
        for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]):
            assert tuple(corner) == BACKGROUNDS[item.background], text
        if item.relation:
            x, y = RELATIONS[item.relation]
            first, second = item.objects
            assert tuple(image[32 + y, 32 + x]) == COLORS[first.color], text
            assert tuple(image[32 - y, 32 - x]) == COLORS[second.color], text
            continue
        (thing,) = item.objects
        mask = cover(image, thing.color, item.background)
        if thing.position:
            x, y = POSITIONS[thing.position]
            assert tuple(image[32 + y, 32 + x]) == COLORS[thing.color], text
        if thing.size:
            assert abs(math.sqrt(mask.sum() / AREAS[thing.shape]) / RADIUS[thing.size] - 1) < 0.08, text


def test_every_large_shape_is_larger_than_every_small_one():
    def area(shape, size):
        item = Scene((Object("red", shape, size, "left"),), "white")
        return [cover(render(item, 64, np.random.default_rng(i)), "red", "white").sum() for i in range(30)]

    least, most = (
        min(min(area(shape, "large")) for shape in SHAPES),
        max(max(area(shape, "small")) for shape in SHAPES),
    )
    assert least > 1.2 * most


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", ["circle", "square", "cross"])  # their centroid is their middle
def test_shapes_are_centred_to_subpixel_accuracy(size, shape):
    errors = []
    for offset in np.random.default_rng(0).uniform(-1.5, 1.5, (40, 2)):
        image = render(Scene((Object("red", shape, "large", "center"),), "white"), size, Placed(offset))
        mask, centers = cover(image, "red", "white"), (np.arange(size) + 0.5) * 64 / size
        centroid = np.array([mask.sum(0) @ centers, mask.sum(1) @ centers]) / mask.sum()
        errors.append(centroid - 32 - offset)
    # Half a pixel of the fourfold canvas would be 0.125 and 0.25.
    assert np.abs(np.mean(errors, axis=0)).max() < 0.04


def test_edges_are_antialiased_and_unmentioned_attributes_vary():
    item = Scene((Object("red", "circle"),), "white")
    images = [render(item, 64, np.random.default_rng(i)) for i in range(40)]
    masks = [cover(image, "red", "white") for image in images]
    assert all(((mask > 0.1) & (mask < 0.9)).sum() > 20 for mask in masks)
    radii = [math.sqrt(mask.sum() / AREAS["circle"]) for mask in masks]
    assert min(radii) < 11 and max(radii) > 15
    lefts = [(mask.sum(0) @ np.arange(64)) / mask.sum() - 31.5 for mask in masks]
    assert min(lefts) < -12 and max(lefts) > 12


# ---- shards


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "HELD_OUT", {"val": 5, "seen": 6, "unseen": 7})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_webdataset_and_open_shards_read_the_shards(few, tmp_path):
    out = tmp_path / "100%" / "shapes"
    ticks = []
    write_shards(out, 1003, 16, seed=3, shard_size=500, progress=lambda *figures: ticks.append(figures))
    assert ticks == [(1000, 1021)]
    assert sorted(contents(out)) == [
        "seen/00000.tar",
        "shapes.json",
        "train/00000.tar",
        "train/00001.tar",
        "train/00002.tar",
        "unseen/00000.tar",
        "val/00000.tar",
    ]
    for split, count in {"val": 5, "seen": 6, "unseen": 7, "train": 1003}.items():
        tars = sorted(map(str, (out / split).glob("*.tar")))
        found = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert [item["__key__"] for item in found] == [f"{i // 500:05d}{i % 500:04d}" for i in range(count)]
        for i in {0, 4, count - 1}:
            image, text = sample(split, i, 3, 16)
            about = json.loads(found[i]["json"])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[i]["png"]))), image)
            assert found[i]["txt"].decode() == about["caption"] == text
            assert (tuple(Object(**thing) for thing in about["objects"]), about["background"], about["relation"]) == (
                parse(text).objects,
                parse(text).background,
                parse(text).relation,
            )
    captions = [text for shard in open_shards(out / "train") for text in shard.captions()]
    assert captions[::500] == [caption(scene("train", i, 3)) for i in range(0, 1003, 500)]
    assert [path.name for path in out.parent.iterdir()] == ["shapes"]


def test_rendering_again_gives_the_same_bytes_and_keeps_existing_shards(few, tmp_path):
    write_shards(tmp_path / "a", 9, 16)
    (tmp_path / "b").mkdir()  # an empty folder is accepted
    write_shards(tmp_path / "b", 9, 16)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert has_shards(tmp_path / "a", 9, 16, 0)
    before = (tmp_path / "a" / "train").stat().st_mtime_ns
    write_shards(tmp_path / "a", 9, 16)
    assert (tmp_path / "a" / "train").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_refused_and_unchanged(few, tmp_path, monkeypatch):
    out = tmp_path / "shapes"
    assert not has_shards(out, 9, 16, 0)
    write_shards(out, 9, 16)
    kept = contents(out)
    for other in [(10, 16, 0), (9, 32, 0), (9, 16, 1)]:
        assert not has_shards(out, *other)
        with pytest.raises(ValueError, match="is not empty: choose another folder") as error:
            write_shards(out, *other)
        assert "\n" not in str(error.value) and str(out) in str(error.value)
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    assert not has_shards(out, 9, 16, 0)
    monkeypatch.undo()
    assert contents(out) == kept
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "beach.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_shards(foreign, 9, 16)
    assert contents(foreign) == {"beach.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_shards(tmp_path / "file", 9, 16)
    (out / "shapes.json").write_bytes(b"\xff{")
    assert not has_shards(out, 9, 16, 0)


def test_interrupted_rendering_leaves_no_files(few, tmp_path, monkeypatch):
    def fail_late(split, index, *rest):
        if split == "unseen":
            raise KeyboardInterrupt
        return sample(split, index, *rest)

    monkeypatch.setattr(shapes, "sample", fail_late)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "shapes", 9, 16)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_progress_callback_leaves_no_files(few, tmp_path, monkeypatch):
    def stop(done, total):
        raise RuntimeError(f"{done} of {total}")

    one = sample("train", 0, 0, 16)
    monkeypatch.setattr(shapes, "sample", lambda *_: one)  # rendering a thousand images takes seconds
    with pytest.raises(RuntimeError, match="1000 of 1018"):
        write_shards(tmp_path / "shapes", 1000, 16, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "numbers", [dict(count=0), dict(size=8), dict(seed=-1), dict(shard_size=0), dict(shard_size=20000)]
)
def test_counts_and_sizes_out_of_range_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError, match="shapes need count >= 1"):
        write_shards(tmp_path / "out", **{"count": 4, "size": 16, **numbers})
    assert list(tmp_path.iterdir()) == []
