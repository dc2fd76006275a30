"""The built-in text encoder: its features, vocabulary, files and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from fastimagen.text.t5 import RANDOM_WEIGHTS, T5Encoder, encoder_identity, is_random_encoder, text_width
from fastimagen.text.tiny_t5 import build_tiny_t5
from tests.text.conftest import CAPTIONS, COMBINATIONS


def test_embeddings_distinguish_object_colour_from_background_colour(encoder):
    """Least squares on mean-pooled embeddings of held-out captions: a bag of words would be right half the time."""
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    encoded = encoder.encode(CAPTIONS, batch_size=256)
    pooled = (encoded.embeds.sum(1) / encoded.lengths[:, None])[order]  # (B, D)
    inputs = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1).double()  # (B, D + 1)
    for column in (1, 4):
        target = torch.tensor([combination[column] for combination in COMBINATIONS])[order]
        weight = torch.linalg.lstsq(inputs[:2400], one_hot(target[:2400], 8).double()).solution  # (D + 1, 8)
        assert ((inputs[2400:] @ weight).argmax(1) == target[2400:]).double().mean() > 0.99


def test_known_words_are_one_token_and_others_are_characters(encoder):
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    assert [len(row) for row in encoder.tokens.rows(words)] == [2] * len(words)
    ids = encoder.tokens.rows(["a Reddish circle, large"])[0]
    tokens = encoder.tokens.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["▁a", "▁", *"Reddish", "▁circle", ",", "▁large", "</s>"]


def test_building_is_reproducible_and_keeps_the_global_random_state(tiny, tmp_path):
    before = torch.get_rng_state()
    again = build_tiny_t5(tmp_path / "tiny", CAPTIONS)
    other = build_tiny_t5(tmp_path / "other", CAPTIONS[:200], dim=32, layers=1, seed=1, vocab_size=120)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder_identity(again) == encoder_identity(tiny)
    assert text_width(other) == 32 and len(T5Encoder(other).tokens.tokenizer) <= 120
    assert "never trained" in (other / "README.md").read_text()


def test_random_weights_are_marked_in_the_configuration_without_changing_the_identity(tiny, tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    assert is_random_encoder(tiny) and not is_random_encoder("t5_small") and not is_random_encoder(tmp_path)
    model = T5EncoderModel.from_pretrained(tiny)
    assert getattr(model.config, RANDOM_WEIGHTS) is True and len(AutoTokenizer.from_pretrained(tiny)) > 100
    unmarked = remove_mark(build_tiny_t5(tmp_path / tiny.name, CAPTIONS))
    assert encoder_identity(unmarked) == encoder_identity(tiny)


def test_encoders_built_before_the_mark_are_recognized_by_their_readme(tmp_path):
    encoder = remove_mark(build_tiny_t5(tmp_path / "tiny", CAPTIONS[:9]))
    old_line = "**Its weights are random (seed 0): it was never trained and knows nothing.**"
    (encoder / "README.md").write_text(f"# A tiny random text encoder\n\n{old_line}\n")
    assert is_random_encoder(encoder)
    (encoder / "README.md").unlink()
    assert not is_random_encoder(encoder)


def remove_mark(folder: Path) -> Path:
    """Remove the mark of random weights from an encoder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    del config[RANDOM_WEIGHTS]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_invalid_arguments_are_refused_and_failures_leave_no_files(tiny, tmp_path, monkeypatch):
    for arguments, message in (
        ({"captions": ["", " "]}, "no captions"),
        ({"dim": 12}, "multiple of 8"),
        ({"vocab_size": 50}, "too small"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tiny_t5(**{"folder": tmp_path / "new", "captions": CAPTIONS[:9]} | arguments)
    with pytest.raises(ValueError, match="is not empty"):
        build_tiny_t5(tiny, CAPTIONS)
    monkeypatch.setattr("fastimagen.text.tiny_t5.README", "{unknown_field}")
    with pytest.raises(KeyError):
        build_tiny_t5(tmp_path / "new", CAPTIONS[:9])
    assert list(tmp_path.iterdir()) == []
