"""Mixtures of data sets: their shares, their epochs, one number to resume from, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastimagen.config import FastimagenConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.indexing import check_index, index_all
from fastimagen.data.interleaving import BLOCK
from fastimagen.data.loader import Loader
from fastimagen.data.mixture import Mixture, Part
from fastimagen.data.source import open_data
from fastimagen.train.metrics import console_line
from fastimagen.train.resume import check_resuming, describe_samples
from fastimagen.train.run import Run
from tests.data.test_shards import make_tar

SIZES = [5, 0, 7, 11, 2]
PARTS = [Part("a", 3, 2), Part("b", 1, 1), Part("c", 0.5, 2)]  # 5, 7 and 13 samples


def take(mixture: Mixture, start: int, count: int) -> list[tuple[int, int]]:
    return [mixture[position] for position in range(start, start + count)]


def test_each_data_set_has_its_own_epochs_without_loss_or_repetition() -> None:
    mixture = Mixture(PARTS, SIZES, seed=3)
    read = take(mixture, 0, 3 * BLOCK)
    for name, shards, total in (("a", (0, 1), 5), ("b", (2,), 7), ("c", (3, 4), 13)):
        own = [origin for origin in read if origin[0] in shards]
        assert {mixture.part_of(shard).name for shard, _ in own} == {name}
        for epoch in range(len(own) // total):
            assert len({*own[epoch * total : (epoch + 1) * total]}) == total
    assert mixture.epochs(1000)["b"] == sum(shard == 2 for shard, _ in read[:1000]) / 7


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), block=st.integers(0, 10**9))
def test_shares_follow_the_weights_wherever_a_run_resumes(weights: list[float], block: int) -> None:
    parts = [Part(str(number), weight, 1) for number, weight in enumerate(weights)]
    mixture = Mixture(parts, [1] * len(parts), seed=0)  # of one sample each, so that epochs are counts
    before, after = mixture.epochs(block * BLOCK), mixture.epochs((block + 1) * BLOCK)
    assert sum(after.values()) - sum(before.values()) == BLOCK
    for part in parts:
        assert after[part.name] >= before[part.name]
        assert abs(after[part.name] - (block + 1) * BLOCK * part.weight / sum(weights)) < len(parts) + 1e-3
    middle = take(mixture, block * BLOCK, BLOCK // 2)
    assert max(Counter(shard for shard, _ in middle).values()) <= BLOCK // 2


def test_data_sets_are_mixed_within_a_batch_and_the_seed_chooses_how() -> None:
    mixture = Mixture(PARTS, SIZES, seed=3)
    names = [mixture.part_of(shard).name for shard, _ in take(mixture, 0, BLOCK)]
    batches = [Counter(names[start : start + 64]) for start in range(0, BLOCK, 64)]
    assert all(35 <= batch["a"] <= 55 for batch in batches) and len({batch["a"] for batch in batches}) > 3
    assert take(mixture, 0, 100) == take(Mixture(PARTS, SIZES, seed=3), 0, 100)
    assert take(mixture, 0, 100) != take(Mixture(PARTS, SIZES, seed=4), 0, 100)


def test_the_order_of_a_mixture_is_the_same_in_every_version() -> None:
    mixture = Mixture(PARTS, SIZES, seed=1)
    assert take(mixture, 5 * BLOCK, 6) == [(4, 1), (3, 10), (0, 1), (2, 3), (3, 2), (3, 10)]


# ---- in training


@pytest.fixture
def config(toy_config: dict[str, Any], toy_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A mixture of the shapes for training and those for validation, 3 to 1."""
    shutil.copytree(toy_data, tmp_path / "data")
    toy_config["fastimagen"]["data"] = {
        "shards": [
            {"name": "train", "shards": str(tmp_path / "data/train"), "weight": 3},
            {"name": "other", "shards": [str(tmp_path / "data/val")], "weight": 1},
        ],
        "validation": {"count": 5},  # all of them may be of one data set
    }
    return toy_config


def loader(section: FastimagenConfig, **options: Any) -> Loader:
    train, _ = open_data(section, with_text=True)
    batch = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
    return train.loader(section, **{"size": 16, "crop": None, "seed": 7, "crop_seed": 7, **batch, **options})


def read(section: FastimagenConfig, start: int, count: int, **options: Any) -> dict[int, str]:
    """The keys of micro-batches, by position."""
    batches = loader(section, **options).batches(start)
    found = {int(p): k for batch in islice(batches, count) for p, k in zip(batch.positions, batch.keys)}
    batches.close()
    return found


def test_a_mixture_resumes_on_other_ranks_and_reports_its_shares(config: dict[str, Any]) -> None:
    section = config_from_dict(config).fastimagen
    train, validation = open_data(section, with_text=True)
    assert validation is not None and len(validation) == 5
    assert len(validation.fixed_batch(section, range(5), size=16, crop=None)) == 5
    assert train.describe_mixture()[0].startswith("train: 75.0% of the samples, out of ")
    everything = read(section, 0, 12)
    more_threads = section.model_copy(update={"data": section.data.model_copy(update={"threads": 3})})
    resumed: dict[int, str] = {}
    for rank in range(2):
        resumed |= read(more_threads, 40, 14, rank=rank, world_size=2, micro_batch=2)
    assert resumed == {position: key for position, key in everything.items() if position >= 40}
    whole = loader(section)
    batches = whole.batches(0)
    for _ in range(12):
        next(batches)
    batches.close()
    values = whole.mixture_values(96)
    assert values["share/train"] == pytest.approx(0.75, abs=0.15)
    assert values["share/train"] + values["share/other"] == pytest.approx(1)
    own = [shard for shard in train.shards if Path(shard.path).parent.name == "train"]
    assert values["epochs/train"] * sum(map(len, own)) == pytest.approx(96 * values["share/train"], abs=0.01)
    assert "train 7" in console_line("base 1/2", values) and "other 2" in console_line("base 1/2", values)
    assert set(map(str, validation.shards[0].keys)).isdisjoint(everything.values())


def test_a_factor_on_the_loss_of_a_data_set_preserves_what_a_model_can_do(config: dict[str, Any]) -> None:
    """The loss of DreamBooth: that of the new images plus a factor times that of the others."""
    config["fastimagen"]["data"]["shards"][1]["loss_weight"] = 0.5
    section = config_from_dict(config).fastimagen
    train, _ = open_data(section, with_text=True)
    assert train.describe_mixture()[1].endswith(", with 0.5 times their loss")
    batches, kinds = loader(section).batches(16), set()
    for batch in islice(batches, 3):
        losses = torch.arange(1.0, len(batch) + 1)  # (B,)
        preserved = torch.tensor([Path(train.shards[shard].path).parent.name == "val" for shard, _ in batch.origins])
        torch.testing.assert_close(batch.weighted(losses), torch.where(preserved, 0.5 * losses, losses))
        kinds.update(preserved.tolist())
    batches.close()
    assert kinds == {True, False}
    config["fastimagen"]["data"]["shards"][1]["loss_weight"] = 1.0
    batches = loader(config_from_dict(config).fastimagen).batches(0)
    assert next(batches).weighted(losses) is losses
    batches.close()


def test_changed_weights_epochs_and_shared_shards_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    def settings_now() -> dict[str, Any]:
        parsed = config_from_dict(config)
        run = Run(parsed, tmp_path / "run", "base")
        train, _ = open_data(parsed.fastimagen, with_text=False)
        assert describe_samples(train.shards)
        return run.resume_settings(run.stages[0], {}, train.shards)

    saved = settings_now()
    sources = config["fastimagen"]["data"]["shards"]
    sources[1]["weight"] = 2
    with pytest.raises(ValueError, match=r"data.weights.other 1.0 -> 2.0 \(positions in the data would mean"):
        check_resuming(tmp_path, "base", saved, settings_now(), step=1, samples=4)
    config["fastimagen"]["train"] |= {"steps": None, "epochs": 2}
    run = Run(config_from_dict(config), tmp_path / "run", "base")
    with pytest.raises(ValueError, match=r"epochs 2 have no meaning for a mixture of 2 data sets.*train.steps"):
        run.steps(run.stages[0], 1)
    sources[1]["shards"] = sources[0]["shards"]
    with pytest.raises(ValueError, match=r"shard .*\.tar is in two data sets of the mixture"):
        open_data(config_from_dict(config).fastimagen, with_text=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"fastimagen\.data\.shards\.1\.weight: Input should be greater than 0"),
        ({"name": "train"}, "need different names, got train, train"),
        ({"weigth": 1}, 'unknown key fastimagen.data.shards.1.weigth; did you mean "weight"'),
    ],
)
def test_a_wrong_mixture_is_one_line(change: dict[str, Any], message: str, config: dict[str, Any]) -> None:
    config["fastimagen"]["data"]["shards"][1] |= change
    with pytest.raises(ValueError, match=message) as raised:
        config_from_dict(config)
    assert "\n" not in str(raised.value)


def test_a_data_set_has_a_caption_key_and_conditions_of_its_own(
    toy_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{number}.jpg": b"x" for number in range(6)} | {f"{number}.txt": b"plain" for number in range(6)}
    metadata = {f"{n}.json": json.dumps({"alt": f"long {n}", "width": 10 * n, "height": 30}).encode() for n in range(6)}
    for name in ("plain", "rich"):
        (tmp_path / name).mkdir()
        make_tar(tmp_path / name / "0.tar", files | metadata)
    rich = {
        "name": "rich",
        "shards": str(tmp_path / "rich"),
        "weight": 1,
        "caption_key": "alt",
        "where": ["width > 20"],
    }
    sources = [{"name": "plain", "shards": str(tmp_path / "plain"), "weight": 1}, rich]
    toy_config["fastimagen"]["data"] = {"shards": sources, "validation": None, "where": ["width < 50"]}
    section = config_from_dict(toy_config).fastimagen
    train, _ = open_data(section, with_text=False)
    assert [[shard.caption(index) for index in range(len(shard))] for shard in train.shards] == [
        ["plain"] * 5,
        ["long 3", "long 4"],
    ]
    assert [shard.filtered for shard in train.shards] == [{"width < 50": 1}, {"width < 50": 1, "width > 20": 3}]
    index_all(section, say=print)  # the manifest of each reading
    check_index(section, say=print)
    written = capsys.readouterr().out.splitlines()
    assert "2 shards intact" in written and len({line for line in written if ".manifest: 1 shard" in line}) == 2
    sources[1]["where"] = ["width > 200"]
    with pytest.raises(ValueError, match=r"data.where leaves no samples of rich: 5 by width > 200, 1 by width < 50"):
        open_data(config_from_dict(toy_config).fastimagen, with_text=False)
