"""The built-in text encoder: a small T5 with random weights, for the captioned shapes and for tests."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import atomic_folder, require_empty
from .t5 import RANDOM_WEIGHTS, need, preprocess

if TYPE_CHECKING:
    from transformers import T5EncoderModel

HEADS = 8
HEAD_OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
"""Which neighbour each attention head of the built-in encoder looks at, in tokens."""

TINY_README = """# A tiny random text encoder

A T5 encoder in Hugging Face's format: {layers} layers of width {dim}, {vocabulary} pieces (words of
{captions} captions, and single characters).
**Its weights are random (seed {seed}): it was never trained and knows nothing.**
Captions of those words get distinct embeddings that depend on word order: enough for the built-in captioned
shapes and for a first run without a download. For other images use a real T5 (`t5_small` ... `xxl1.1`).
Made by fastimagen's `build_tiny_t5`.
"""


def build_tiny_t5(
    folder: str | Path,
    captions: Sequence[str],
    *,
    dim: int = 64,
    layers: int = 2,
    vocab_size: int = 1024,
    seed: int = 0,
) -> Path:
    """Makes a small random T5 encoder with tokenizer in `folder`; leaves the global random state alone.

    The most frequent words are one token each, up to vocab_size pieces in all; other words are spelled. The
    same arguments give the same encoder. Raises ValueError for a folder that is not empty, captions without
    text, dim not a multiple of 8, vocab_size too small for the characters; ImportError without transformers.
    """
    folder, texts = Path(folder), [text for text in map(preprocess, captions) if text]
    require_empty(folder)
    if not texts:
        raise ValueError("no captions to build a text encoder from")
    if dim % HEADS:
        raise ValueError(f"dim {dim} of the text encoder is not a multiple of {HEADS}")
    transformers = need("transformers")
    pieces = _vocabulary(texts, vocab_size)
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)  # vocab_file= would be ignored in silence
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=dim,
        d_kv=dim // HEADS,
        num_heads=HEADS,
        d_ff=4 * dim,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        **{RANDOM_WEIGHTS: True},
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own
        model = transformers.T5EncoderModel(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(
            TINY_README.format(layers=layers, dim=dim, vocabulary=len(pieces), captions=len(texts), seed=seed)
        )
    return folder


def _vocabulary(texts: Sequence[str], size: int) -> list[tuple[str, float]]:
    """Unigram model [(piece, score)]: <pad>, </s>, <unk> as in T5, single characters, most frequent words.

    The scores let the fewest pieces win: a known word is one token, any other is spelled. (Sentencepiece's
    training wants substrings that recur in different words: of a few dozen words it keeps characters only.)
    """
    letters = {"▁", *string.printable}.union(*texts)  # "▁" is sentencepiece's mark of a word's beginning
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -10.0) for letter in sorted(letters) if not letter.isspace()]
    words = Counter(word for text in texts for word in re.findall(r"(?<!\S)\w+", text))
    frequent = sorted(words, key=lambda word: (-words[word], word))[: max(size - len(pieces), 0)]
    if len(pieces) + 1 > size:
        raise ValueError(f"vocab_size {size} is too small: special tokens and characters take {len(pieces)}")
    return pieces + [(f"▁{word}", -1.0) for word in frequent]


@torch.no_grad()
def _draw_weights(model: T5EncoderModel, generator: torch.Generator) -> None:
    """Random projections of unit gain; head h attends to the neighbour HEAD_OFFSETS[h] places away.

    With T5's own initialisation, of next to no position bias, a caption stays a bag of words, silent on what
    is red, circle or background. Here the gated feed-forward layers multiply each token with its neighbours.
    """
    config = model.config
    buckets = config.relative_attention_num_buckets // 2  # per direction; later tokens have the second half
    for name, weight in model.named_parameters():
        if "layer_norm" in name:
            continue  # ones
        if "relative_attention_bias" in name:  # (buckets, heads)
            weight.zero_()
            for head, offset in enumerate(HEAD_OFFSETS):
                weight[abs(offset) + (buckets if offset > 0 else 0), head] = 8.0
            continue
        weight.normal_(generator=generator)
        if "shared" not in name and "embed_tokens" not in name:
            weight.mul_(weight.shape[1] ** -0.5)  # fan-in
        if name.endswith(".q.weight"):
            weight.mul_(config.d_kv**-0.5)  # T5 has no scale on its logits
