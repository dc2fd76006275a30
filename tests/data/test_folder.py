"""Packing folders and lists of images into shards."""

from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from fastimagen.data.packing.folder import CaptionOptions, pack_folder
from fastimagen.data.packing.writer import PackOptions
from fastimagen.data.shards import open_shards
from fastimagen.images import EXTENSIONS, open_rgb


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
    report = pack_folder(images, tmp_path / "out", PackOptions(shard_size=10))
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
        pack_folder(images, tmp_path / name, PackOptions(shard_size=9))
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
        "unreadable image": 2,
        "caption not in UTF-8": 1,
        "not an image that can be read, and not a caption (.md)": 1,
    }
    assert report.skipped == json.loads((tmp_path / "out/report.json").read_text())["skipped"]
    assert len(report.examples["image without caption"]) == 5
    assert report.examples["empty caption"] == ["empty.png"]
    for part in ("1 sample in 1 shard:", "unreadable image: 2 (", "orphan.txt"):
        assert part in str(report)


def test_a_folder_without_captioned_images_is_refused_and_nothing_is_written(tmp_path):
    source = write(tmp_path / "in", {"a.png": image("red"), "b.txt": "x"})
    for folder in (source, write(tmp_path / "none", {"c.md": "x"})):
        with pytest.raises(ValueError, match="nothing to pack"):
            pack_folder(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        pack_folder(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ValueError, match="at least one"):
        pack_folder(source, tmp_path / "out", PackOptions(shard_size=0))
    assert sorted(os.listdir(tmp_path)) == ["in", "none"]


def test_packing_without_webdataset_says_how_to_install_it(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"packing shards needs webdataset: pip install --editable '\.\[data\]'$"):
        pack_folder(images, tmp_path / "out")
    assert os.listdir(tmp_path) == ["images"]


def test_packing_that_is_killed_resumes_with_the_same_shards(images, tmp_path, monkeypatch):
    pack_folder(images, tmp_path / "whole", PackOptions(shard_size=7))
    count = iter(range(99))

    def interrupt(data):
        if next(count) == 10:
            raise KeyboardInterrupt
        return open_rgb(data)

    monkeypatch.setattr("fastimagen.data.packing.samples.open_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(images, tmp_path / "out", PackOptions(shard_size=7))
    assert sorted(os.listdir(tmp_path)) == [".out.incomplete", "images", "whole"]
    (tmp_path / ".out.incomplete/.00001.tar.1234.tmp").write_text("left by a kill")
    report = pack_folder(images, tmp_path / "out", PackOptions(shard_size=7))
    assert (report.packed, report.shards, report.kept) == (25, 4, 1) and "1 of the shards were there" in str(report)
    assert sorted(os.listdir(tmp_path)) == ["images", "out", "whole"]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes() or path.name == "report.json"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_what_changed_since_the_kill_is_packed_again(images, tmp_path, monkeypatch):
    monkeypatch.setattr("fastimagen.data.packing.folder.finish", lambda *_: next(iter([])))
    with pytest.raises(StopIteration):
        pack_folder(images, tmp_path / "out", PackOptions(shard_size=7))
    monkeypatch.undo()
    (images / "a/deep/photo.0.txt").write_text("another caption")
    report = pack_folder(images, tmp_path / "out", PackOptions(shard_size=7))
    assert report.kept == 3 and "another caption" in str(
        [sample["txt"] for sample in stored(tmp_path / "out").values()]
    )


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


def test_a_validation_share_holds_out_the_same_images_every_time(images, tmp_path):
    report = pack_folder(images, tmp_path / "split", PackOptions(shard_size=10), validation=0.2)
    assert (report.packed, report.held_out, report.shards) == (25, 5, 3)
    assert "5 of them held out for validation" in str(report)
    splits = {name: paths(tmp_path / "split" / name) for name in ("train", "val")}
    assert not splits["train"] & splits["val"]
    assert (len(splits["train"]), len(splits["val"])) == (20, 5)
    pack_folder(images, tmp_path / "again", PackOptions(shard_size=7), validation=0.2)
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


# ---- captions, formats, everything else that folders contain


def contents(folder) -> dict[str, dict]:
    """path -> metadata with its caption as "txt"."""
    return {
        path: json.loads(sample["json"]) | {"txt": sample["txt"].decode() if "txt" in sample else None}
        for path, sample in stored(folder).items()
    }


def test_hugging_face_metadata_files_and_files_beside_images_give_captions(tmp_path):
    red, rows = image("red"), pyarrow.table({"file_name": ["p.png"], "score": [0.5], "text": [["one", "two "]]})
    source = write(
        tmp_path / "in",
        {
            "metadata.csv": "file_name,text,label\na.png,from the table,7\nd/b.png,second,8\ngone.png,x,9\n",
            "a.png": red,
            "a.txt": "from a file",
            "d/b.png": red,
            "d/metadata.jsonl": '{"file_name": "../d/b.png", "text": "second"}\n{"no": 1}\nnot json\n',
            "c.PNG": red,
            "c.caption": "a .caption",
            "e.gif": image("blue", "GIF"),
            "e.json": '{"caption": "in the json", "aesthetic": 6.5}',
            "q/p.png": red,
        },
    )
    pyarrow.parquet.write_table(rows, source / "q/metadata.parquet")
    report = pack_folder(source, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert {path: sample["txt"] for path, sample in found.items()} == {
        "a.png": "from the table",
        "d/b.png": "second",
        "c.PNG": "a .caption",
        "e.gif": "in the json",
        "q/p.png": "one",
    }
    assert found["a.png"]["captions"] == ["from the table", "from a file"] and found["a.png"]["label"] == "7"
    assert found["q/p.png"]["captions"] == ["one", "two"] and found["q/p.png"]["score"] == 0.5
    assert found["e.gif"]["aesthetic"] == 6.5 and "captions" not in found["d/b.png"]
    assert report.captions == 7 and 'set fastimagen.data.caption_key to "captions"' in str(report)
    assert report.skipped == {
        "row of an image that is not there": 1,
        "row without a file name": 1,
        "row that is not a JSON object": 1,
    }


def test_each_line_can_be_a_caption_and_the_column_can_be_named(tmp_path):
    source = write(tmp_path / "in", {"a.png": image("red"), "a.txt": "one\n\ntwo\none\n", "b.png": image("red")})
    write(source, {"metadata.jsonl": '{"file_name": "b.png", "tags": "three", "text": "not this"}'})
    pack_folder(source, tmp_path / "out", captions=CaptionOptions(column="tags", per_line=True))
    found = contents(tmp_path / "out")
    assert found["a.png"]["captions"] == ["one", "two"] and found["b.png"]["txt"] == "three"
    with pytest.raises(ValueError, match=r"--caption-column label: .* has the columns file_name, tags, text"):
        pack_folder(source, tmp_path / "none", captions=CaptionOptions(column="label"))


@pytest.mark.parametrize("format", sorted(set(EXTENSIONS) - {"PSD"}))  # Pillow does not write PSD
def test_every_format_that_pillow_reads_is_packed(format, tmp_path):
    color = Image.new("RGB", (32, 32), (200, 30, 30))
    (tmp_path / "in").mkdir()
    for extension in EXTENSIONS[format]:
        path = tmp_path / f"in/{extension}.{extension.upper()}"
        if extension in ("pgm", "bw", "pbm", "pfm", "pnm"):
            continue
        color.save(path, format, **({"lossless": True} if format == "WEBP" else {}))
        path.with_suffix(".txt").write_text(extension)
    assert not pack_folder(tmp_path / "in", tmp_path / "out").skipped
    (shard,) = open_shards(tmp_path / "out")
    assert len(shard) == len(list((tmp_path / "in").glob("*.txt"))) and not shard.excluded
    for index in range(len(shard)):
        pixel = np.asarray(open_rgb(shard.image(index)))[16, 16].astype(int)
        assert np.abs(pixel - (200, 30, 30)).max() < 12, shard.caption(index)


def test_large_images_are_made_smaller_and_their_sizes_recorded(tmp_path):
    source = write(tmp_path / "in", {f"{name}.txt": name for name in ("wide", "small", "tall")})
    Image.new("RGB", (400, 100), "red").save(source / "wide.jpg")
    Image.new("RGB", (90, 100), "red").save(source / "small.jpg")
    Image.new("RGBA", (50, 301), "red").save(source / "tall.png")
    report = pack_folder(source, tmp_path / "out", PackOptions(max_side=100))
    assert report.resized == 2 and "2 images made smaller" in str(report)
    samples = stored(tmp_path / "out")
    assert samples["small.jpg"]["jpg"] == (source / "small.jpg").read_bytes()
    sizes = {path: open_rgb(sample.get("jpg") or sample["png"]).size for path, sample in samples.items()}
    assert sizes == {"wide.jpg": (100, 25), "small.jpg": (90, 100), "tall.png": (17, 100)}
    metadata = contents(tmp_path / "out")["wide.jpg"]
    assert (metadata["width"], metadata["height"], metadata["original_width"]) == (100, 25, 400)


def test_images_are_packed_without_captions(tmp_path):
    source = write(tmp_path / "in", {"a.png": image("red"), "b.png": image("blue"), "b.txt": "not packed"})
    report = pack_folder(source, tmp_path / "out", PackOptions(captions=False))
    assert report.packed == 2 and all("txt" not in sample for sample in stored(tmp_path / "out").values())


@pytest.mark.drill
def test_several_processes_write_the_same_shards(images, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        report = pack_folder(images, tmp_path / name, PackOptions(shard_size=6, processes=processes))
        assert report.packed == 25
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_links_and_other_files_are_counted(tmp_path):
    source = write(
        tmp_path / "in", {"a.png": image("red"), "a.txt": "x", "clip.mp4": "", "photo.heic": "", "bad.json": "{"}
    )
    write(source, {"b.png": image("red"), "b.json": "[1]"})
    (source / "gone.png").symlink_to("nowhere.png")
    (source / "loop").symlink_to(".")
    report = pack_folder(source, tmp_path / "out")
    assert report.packed == 1 and report.skipped == {
        "link to a folder": 1,
        "broken link": 1,
        "not an image that can be read, and not a caption (.mp4)": 1,
        "not an image that can be read, and not a caption (.heic)": 1,
        "caption without image": 1,
        "damaged .json": 1,
    }
