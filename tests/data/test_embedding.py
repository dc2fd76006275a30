"""The embedding caches that a configuration names: filled, checked and planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastimagen.config import FastimagenConfig
from fastimagen.config_file import config_from_dict
from fastimagen.data.embedding import check_embeddings, embed_all, is_embedded, plan_embedding
from fastimagen.data.source import empty_text, open_data


@pytest.fixture
def config(toy_config: dict[str, Any], tmp_path: Path) -> FastimagenConfig:
    """The toy shards with the encoding of DeepFloyd IF and an empty cache."""
    toy_config["fastimagen"]["text"] |= {"encoding": "if", "max_length": 12, "cache": str(tmp_path), "batch_size": 32}
    toy_config["fastimagen"]["data"]["validation"] = {"count": 8}
    return config_from_dict(toy_config).fastimagen


def test_the_empty_caption_belongs_to_a_complete_cache(config: FastimagenConfig, tmp_path: Path) -> None:
    said: list[str] = []
    plan_embedding(config, say=said.append)
    assert " of 12.0 tokens on average" in said[0]  # all of them are padded
    assert not is_embedded(config)
    embed_all(config, say=said.append, rank=0, world_size=2)
    assert "1 shard written, 0 kept" in said[1] and is_embedded(config)
    empty = empty_text(config)
    assert empty is not None and empty.embeds.shape == (1, 12, 64)
    check_embeddings(config, say=said.append)
    assert said[2] == "2 embedding caches intact"
    next(tmp_path.glob("empty_caption*.safetensors")).unlink()
    assert not is_embedded(config)
    with pytest.raises(ValueError, match=r"^1 of 2 embedding caches not intact: there is no embedding cache .*/empty_"):
        check_embeddings(config, say=print)


def test_changed_bytes_are_found_by_the_check_and_when_they_are_read(config: FastimagenConfig, tmp_path: Path) -> None:
    embed_all(config, say=lambda line: None)
    path = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^1 of 2 embedding caches not intact: .* bytes have changed: delete them and"
    ):
        check_embeddings(config, say=print)
    cache = open_data(config, with_text=True)[0].caches[0]
    with pytest.raises(ValueError, match="is damaged: bytes have changed; delete it and rerun fastimagen embed"):
        [cache[index] for index in range(len(cache))]
