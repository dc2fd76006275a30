"""Packing folders and lists of images into shards."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import webdataset
from PIL import Image

from fastimagen.data.folder import pack_folder, pack_manifest
from fastimagen.data.shards import open_shards


def image(color, format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(buffer, format)
    return buffer.getvalue()


def write(folder, files: dict[str, bytes | str]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture
def images(tmp_path):
    files = {}
    for i in range(25):
        extension = ("png", "jpg", "JPEG", "webp")[i % 4]
        data = image((i, i, 9), {"png": "PNG", "webp": "WEBP"}.get(extension, "JPEG"))
        stem = f"{'abc'[i % 3]}/deep/photo.{i}"
        files |= {f"{stem}.{extension}": data, f"{stem}.txt": f" image {i}\n"}
    return write(tmp_path / "images", files)


def stored(folder) -> dict[str, dict]:
    """path -> sample of webdataset."""
    samples = webdataset.WebDataset(sorted(str(path) for path in folder.glob("*.tar")), shardshuffle=False)
    return {json.loads(sample["json"])["path"]: sample for sample in samples}


def test_image_bytes_captions_and_paths_are_packed_unchanged(images, tmp_path):
    report = pack_folder(images, tmp_path / "out", shard_size=10)
    assert (report.packed, report.shards, report.skipped) == (25, 3, {})
    samples = stored(tmp_path / "out")
    files = [path for path in images.rglob("*") if path.is_file() and path.suffix != ".txt"]
    assert set(samples) == {str(path.relative_to(images)) for path in files}
    for name, sample in samples.items():
        assert sample[name.rpartition(".")[2].lower()] == (images / name).read_bytes()
        assert sample["txt"].decode() == f"image {name.split('.')[-2]}"
    keys = sorted(sample["__key__"] for sample in samples.values())
    assert keys == [f"{i // 10:05d}{i % 10:04d}" for i in range(25)]
    shards = open_shards(tmp_path / "out")
    assert [len(shard) for shard in shards] == [10, 10, 5] and not any(shard.excluded for shard in shards)


def test_images_are_shuffled_and_packing_again_gives_the_same_bytes(images, tmp_path):
    for name in ("one", "two"):
        pack_folder(images, tmp_path / name, shard_size=9)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    folders = [
        json.loads(sample["json"])["path"][0]
        for sample in webdataset.WebDataset(str(tmp_path / "one" / "00000.tar"), shardshuffle=False)
    ]
    assert set(folders) == {"a", "b", "c"}


def test_skipped_files_are_reported_by_reason(tmp_path, caplog):
    good = image("red")
    source = write(
        tmp_path / "in",
        {
            "a.png": good,
            "a.txt": "ok",
            "lonely.png": good,
            "d/orphan.txt": "x",
            "empty.png": good,
            "empty.txt": " \n",
            "broken.jpg": image("red", "JPEG")[:100],
            "broken.txt": "x",
            "latin.png": good,
            "latin.txt": "é".encode("latin-1"),
            "notes.md": "ignored",
            "scan.TIF": b"",
            "scan.txt": "x",
            **{f"more{i}.png": good for i in range(9)},
        },
    )
    report = pack_folder(source, tmp_path / "out")
    assert report.packed == 1 and list(stored(tmp_path / "out")) == ["a.png"]
    assert report.skipped == {
        "caption without image": 1,
        "image without caption": 10,
        "empty caption": 1,
        "unreadable image": 1,
        "caption not in UTF-8": 1,
        "image of another type than jpg, jpeg, png, webp": 1,
    }
    assert len(report.examples["image without caption"]) == 5
    assert report.examples["empty caption"] == ["empty.png"]
    for part in ("1 samples in 1 shards", "unreadable image: 1 (broken.jpg: ", "orphan.txt"):
        assert part in str(report)


def test_a_folder_without_captioned_images_is_refused_and_nothing_is_written(tmp_path):
    source = write(tmp_path / "in", {"a.png": image("red"), "b.txt": "x"})
    for folder in (source, write(tmp_path / "none", {"c.md": "x"})):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack_folder(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        pack_folder(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ValueError, match="at least one"):
        pack_folder(source, tmp_path / "out", shard_size=0)
    assert sorted(os.listdir(tmp_path)) == ["in", "none"]


def test_packing_without_webdataset_says_how_to_install_it(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"packing shards needs webdataset: pip install --editable '\.\[data\]'$"):
        pack_folder(images, tmp_path / "out")
    assert os.listdir(tmp_path) == ["images"]


def test_interrupted_packing_leaves_no_files(images, tmp_path, monkeypatch):
    count = iter(range(9))

    def interrupt(data):
        if next(count) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastimagen.data.folder.open_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(images, tmp_path / "out")
    assert os.listdir(tmp_path) == ["images"]


def test_an_output_folder_that_is_not_empty_is_refused(images, tmp_path):
    (tmp_path / "empty").mkdir()
    assert pack_folder(images, tmp_path / "empty").packed == 25
    with pytest.raises(ValueError, match="is not empty"):
        pack_folder(images, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        pack_folder(images, tmp_path / "file")
    assert pack_folder(images, tmp_path / "new" / "100% odd {name}").packed == 25
    assert len(stored(tmp_path / "new" / "100% odd {name}")) == 25


def test_a_manifest_is_packed_in_its_order(images, tmp_path):
    names = sorted(str(path.relative_to(tmp_path)) for path in images.rglob("*.png"))[::-1]
    lines = [json.dumps({"image": name, "caption": f"nr {i}", "more": 1}) for i, name in enumerate(names)]
    lines[2:2] = [
        "",
        *(
            json.dumps({"image": image, "caption": caption})
            for image, caption in (("a.gif", "x"), ("gone.png", "x"), (names[0], " "))
        ),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    report = pack_manifest(tmp_path / "list.jsonl", tmp_path / "out", shard_size=4)
    assert report.skipped == {
        "image of another type than jpg, jpeg, png, webp": 1,
        "image not found": 1,
        "empty caption": 1,
    }
    assert report.packed == len(names)
    samples = stored(tmp_path / "out")
    assert list(samples) == names
    assert [sample["txt"].decode() for sample in samples.values()] == [f"nr {i}" for i in range(len(names))]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'image'}", "list.jsonl:2: not JSON"),
        ('["a"]', "list.jsonl:2: expected"),
        ('{"image": "a.png"}', "expected"),
        ('{"image": "a.png", "caption": 5}', "expected"),
    ],
)
def test_an_invalid_line_of_a_manifest_is_an_error_with_its_number(tmp_path, line, message):
    write(tmp_path, {"a.png": image("red"), "list.jsonl": '{"image": "a.png", "caption": "x"}\n' + line})
    with pytest.raises(ValueError, match=message) as error:
        pack_manifest(tmp_path / "list.jsonl", tmp_path / "out")
    assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["a.png", "list.jsonl"]
    with pytest.raises(ValueError, match="no manifest"):
        pack_manifest(tmp_path / "gone.jsonl", tmp_path / "out")


def test_a_validation_share_holds_out_the_same_images_every_time(images, tmp_path):
    report = pack_folder(images, tmp_path / "split", shard_size=10, validation=0.2)
    assert (report.packed, report.held_out, report.shards) == (25, 5, 3)
    assert "5 of them held out for validation" in str(report)
    splits = {name: paths(tmp_path / "split" / name) for name in ("train", "val")}
    assert not splits["train"] & splits["val"]
    assert (len(splits["train"]), len(splits["val"])) == (20, 5)
    pack_folder(images, tmp_path / "again", shard_size=7, validation=0.2)
    assert splits == {name: paths(tmp_path / "again" / name) for name in ("train", "val")}


def test_only_usable_images_are_held_out(images, tmp_path):
    """Images that cannot be packed never make up the validation split, whichever they are."""
    for path in sorted(images.rglob("*"))[:-6]:
        if path.suffix == ".txt":
            path.write_text("  ")
        elif path.is_file():
            path.write_bytes(path.read_bytes()[:20])
    report = pack_folder(images, tmp_path / "split", validation=0.02)
    assert (report.packed, report.held_out) == (3, 1)
    assert len(paths(tmp_path / "split/val")) == 1
    for path in images.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(ValueError, match=r"nothing to pack for .*: empty caption: 25 \("):
        pack_folder(images, tmp_path / "none", validation=0.02)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_validation_share_outside_its_range_is_refused(share, images, tmp_path):
    with pytest.raises(ValueError, match=r"validation share must lie in \[0, 1\)"):
        pack_folder(images, tmp_path / "out", validation=share)
    assert not (tmp_path / "out").exists()


def paths(folder) -> set[str]:
    """The original paths of all images in a folder of shards."""
    shards = open_shards(folder)
    return {shard.metadata(index)["path"] for shard in shards for index in range(len(shard))}
