"""`fastimagen info --data`: what a run will see, before it runs."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastimagen.cli import main
from fastimagen.config_file import config_from_dict
from fastimagen.data.source import open_data
from fastimagen.data.survey import spread_samples
from fastimagen.seeds import mix_seed


def write_own(folder: Path) -> Path:
    """A shard of ten grey images of three sizes with captions, one without a caption, and one that is no image."""
    folder.mkdir()
    with tarfile.open(folder / "own.tar", "w") as tar:
        for number in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", [(64, 64), (32, 96), (12, 16)][number % 3], (128, 128, 128)).save(buffer, "PNG")
            files = {"png": b"rubbish" if number == 11 else buffer.getvalue(), "txt": f"image {number % 5} 象".encode()}
            files = {"png": files["png"]} if number == 10 else files
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_shards_alone_are_described_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", "--data", str(write_own(tmp_path / "own"))]) == 0
    text = capsys.readouterr().out
    for line in (
        r"samples +11 in 1 shard",
        r"excluded +1 no caption",
        r"not an image +1 of 11 looked at",
        r"shorter side +12 to 64, median 32,",
        r"width to height +about 1:3 30\.0%, 3:4 30\.0%, 1:1 40\.0%",
        r"central square +keeps 72\.\d% of the area",
        r"captions +9 characters; 0 empty, 6 repeated, of 11",
        r"validation: none",
        r"contact sheet: data\.png",
    ):
        assert re.search(line, text), (line, text)
    assert "tokens" not in text and Image.open("data.png").size[0] > 1000


def test_a_configuration_is_described_by_data_set_and_drawn_by_stage(
    toy_config: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = toy_config["fastimagen"]
    own = {"name": "own", "shards": str(write_own(tmp_path / "own")), "weight": 1}
    section["data"] |= {"shapes": None, "max_bad_share": 0.5, "validation": {"count": 4}, "where": []}
    section["data"]["shards"] = [{"name": "shapes", "shards": section["data"]["shards"], "weight": 3}, own]
    section["text"] |= {"random_weights": True, "max_length": 8}
    config = write_config(toy_config)
    assert main(["info", "--data", str(config), "--out", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().out
    assert "shapes: 75.0% of the samples, out of " in text and "own: 25.0% of the samples, out of " in text
    assert "validation: 4 of these samples, held out" in text
    assert re.search(r"tokens .* cut to 8\n", text) and re.search(r"unknown tokens +in 1\d, such as 'image", text)
    assert re.search(r"sr +3\d\.\d% are smaller than its 16 pixels and enlarged", text)
    # The sheet of the stage with random crops has the images of the first positions of training.
    train, _ = open_data(config_from_dict(json.loads(config.read_text())).fastimagen, with_text=False)
    seed = mix_seed(0, "sr", "crops")
    loader = train.loader(
        config_from_dict(toy_config).fastimagen,
        size=16, crop=8, global_batch=16, micro_batch=16, rank=0, world_size=1, seed=0, crop_seed=seed,
    )  # fmt: skip
    first = next(loader.batches(0)).images[0].permute(1, 2, 0).numpy()  # (8, 8, 3)
    sheet = np.asarray(Image.open(tmp_path / "sheet-sr.png"))
    margin = next(i for i in range(100) if (sheet[i, i] != 255).any() or (sheet[i, i + 1] != 255).any())
    tile = 8 * -(-192 // 8)
    assert np.array_equal(sheet[margin : margin + tile : tile // 8, margin : margin + tile : tile // 8], first)
    assert (tmp_path / "sheet-base.png").exists()


def test_buckets_are_counted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = {"dim": 8, "dim_mults": [1], "groups": 4, "heads": 1, "head_dim": 16, "stem_kernels": [3]}
    stage = {"name": "base", "size": 16, "unet": unet | {"cross_attention": False}, "sampling": {"guidance": 1}}
    data = {"shards": str(write_own(tmp_path / "own")), "validation": None, "buckets": ["16x16", "8x24", "24x8"]}
    config = {"fastimagen": {"cascade": {"stages": [stage]}, "data": {**data, "max_bad_share": 0.5}}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert main(["info", "--data", str(tmp_path / "ds.json"), "--out", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().out
    for line in (
        r"samples +12 in 1 shard",
        r"base +27\.3% are smaller than the size of their bucket and enlarged",
        r"central square +would keep \d+\.\d% of the area",
        r"buckets +16x16 66\.7%, 8x24 33\.3%, 24x8 0\.0%; they keep 9\d\.\d% of the area",
    ):
        assert re.search(line, text), (line, text)
    assert Image.open(tmp_path / "sheet-base.png").size[0] > 500


def test_looking_at_data_takes_no_memory_for_each_sample() -> None:
    """100 million samples are 10,000 shards, and not 100 million pairs of a shard and a number."""

    class Samples:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

    shards = [Samples(size) for size in (10_000, 0, 9_999, 10_001) * 2500]
    tracemalloc.start()
    found = spread_samples(shards, 2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20 and 1900 < len(found) <= 2000 and all(index < len(shard) for shard, index in found)
    few = [Samples(3), Samples(0), Samples(2)]
    assert spread_samples(few, 9) == [(few[0], 0), (few[0], 1), (few[0], 2), (few[2], 0), (few[2], 1)]
    assert spread_samples(few, 2) == [(few[0], 0), (few[2], 0)] and spread_samples([], 5) == []
