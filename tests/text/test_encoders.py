"""Text encoders beyond T5 v1.1, with their own tokenizers: tiny ones with random weights, saved on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagen.text.t5 import T5Encoder, encoder_identity, load_tokens, text_width

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "on", "blue"]
CAPTIONS = ["a red circle", "", "a [SEP] red [CLS] circle on a </s> blue <pad> circle", "a red circle on blue"]
SIZES: dict[str, Any] = {"num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}


Build = Callable[[Path, Path], torch.nn.Module]
"""Writes an encoder to a folder, with what it needs of the built-in one, and returns its half that encodes."""


def byt5(folder: Path, tiny: Path) -> torch.nn.Module:
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=384, **SIZES)).eval()
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return model.encoder


def umt5(folder: Path, tiny: Path) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(vocab_size=1024, **SIZES)).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return model


def t5gemma(folder: Path, tiny: Path) -> torch.nn.Module:
    """Both halves, as on the hub; text begins with <bos>, and nothing ends it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaForConditionalGeneration

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS[5:]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    half = {"vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 8, **sizes}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=half, decoder=half)).eval()
    model.save_pretrained(folder)
    return model.get_encoder()


def bert(folder: Path, tiny: Path) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(folder)  # without a pooler
    return model.bert


@pytest.mark.parametrize("build", [byt5, umt5, t5gemma, bert])
def test_an_encoder_gives_what_transformers_gives_for_each_caption_alone(
    build: Build, tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "encoder"
    model = build(folder, tiny)
    encoder, tokenizer = T5Encoder(folder, max_length=64), AutoTokenizer.from_pretrained(folder)
    assert encoder.dim == text_width(folder) == 16
    encoded = encoder.encode(CAPTIONS)
    for caption, found in zip(CAPTIONS, encoded.unpadded()):
        rows = encoder.tokens.rows([caption])
        if caption != CAPTIONS[2]:
            assert rows[0] == tokenizer(caption)["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(rows)).last_hidden_state[0]  # (L, E)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    around = {*encoder.tokens.before, *encoder.tokens.after}
    assert around.isdisjoint(encoder.tokens.rows([CAPTIONS[2]])[0][len(encoder.tokens.before) : -1])
    short = load_tokens(folder, max_length=4)
    (row,) = short.rows([CAPTIONS[3]])
    assert len(row) == 4 and short.truncated == 1 and row[4 - len(short.after) :] == short.after
    first = encoder_identity(folder)
    settings = "tokenizer_config.json" if build is byt5 else "tokenizer.json"
    (folder / settings).write_text((folder / settings).read_text() + " ")
    assert {key for key, value in encoder_identity(folder).items() if value != first[key]} == {"tokenizer"}


def test_a_decoder_and_captions_longer_than_an_encoder_reads_are_refused(tiny: Path, tmp_path: Path) -> None:
    bert(tmp_path / "bert", tiny)
    with pytest.raises(ValueError, match=r"reads at most 512 tokens, but fastimagen\.text\.max_length is 600"):
        T5Encoder(tmp_path / "bert", max_length=600)
    (tmp_path / "bert/config.json").write_text('{"model_type": "gpt2", "hidden_size": 16}')
    with pytest.raises(ValueError, match=r'a model of type "gpt2", not one of .*bert.*umt5') as caught:
        T5Encoder(tmp_path / "bert")
    assert "\n" not in str(caught.value)
