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
from .t5 import RANDOM_WEIGHTS, RANDOM_WEIGHTS_README, bars_in_terminals_only, import_for_text
from .tokens import preprocess

if TYPE_CHECKING:
    from transformers import T5EncoderModel

NUM_HEADS = 8
HEAD_OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
"""Which neighbour each attention head attends to, in tokens."""

README = """# A small text encoder with random weights

A T5 encoder in Hugging Face's format: {layers} layers of width {dim}, {vocabulary} pieces (words of
{captions} captions, and single characters).
{random} (seed {seed}): it was never trained.**
Captions of those words get distinct embeddings that depend on word order. That is enough for the built-in captioned
shapes. For other images use a trained T5 (`t5_small` ... `xxl1.1`).
Built by fastimagen's `build_tiny_t5`.
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
    """Write a small random T5 encoder with its tokenizer to `folder`; the global random state stays as it is.

    The most frequent words are one token each, up to vocab_size pieces in all; other words are split into characters.
    The same arguments give the same encoder. Raises ValueError for a folder that is not empty, captions without text,
    dim that is not a multiple of 8, or vocab_size too small for the characters; ImportError without transformers.
    """
    folder, texts = Path(folder), [text for text in map(preprocess, captions) if text]
    require_empty(folder)
    if not texts:
        raise ValueError("no captions to build a text encoder from")
    if dim % NUM_HEADS:
        raise ValueError(f"dim {dim} of the text encoder is not a multiple of {NUM_HEADS}")
    transformers = import_for_text("transformers")
    pieces = _vocabulary(texts, vocab_size)
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)  # T5Tokenizer ignores vocab_file=
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=dim,
        d_kv=dim // NUM_HEADS,
        num_heads=NUM_HEADS,
        d_ff=4 * dim,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        **{RANDOM_WEIGHTS: True},
    )
    with torch.random.fork_rng(devices=[]):  # the constructor initializes weights from the global state
        model = transformers.T5EncoderModel(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    readme = README.format(
        layers=layers,
        dim=dim,
        vocabulary=len(pieces),
        captions=len(texts),
        random=RANDOM_WEIGHTS_README,
        seed=seed,
    )
    with atomic_folder(folder) as temporary, bars_in_terminals_only():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(readme)
    return folder


def _vocabulary(texts: Sequence[str], size: int) -> list[tuple[str, float]]:
    """Unigram model [(piece, score)]: <pad>, </s>, <unk> as in T5, single characters, most frequent words.

    With these scores the split into the fewest pieces wins: a word of the vocabulary is one token, others are split
    into characters. Sentencepiece's own training does not work here: it looks for substrings that different words
    share, and keeps only characters of a few dozen words.
    """
    letters = {"▁", *string.printable}.union(*texts)  # sentencepiece marks the beginning of a word with "▁"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -10.0) for letter in sorted(letters) if not letter.isspace()]
    words = Counter(word for text in texts for word in re.findall(r"(?<!\S)\w+", text))
    frequent = sorted(words, key=lambda word: (-words[word], word))[: max(size - len(pieces), 0)]
    if len(pieces) + 1 > size:
        raise ValueError(
            f"vocab_size {size} is too small: special tokens and characters need {len(pieces)}, and words at least 1"
        )
    return pieces + [(f"▁{word}", -1.0) for word in frequent]


@torch.no_grad()
def _draw_weights(model: T5EncoderModel, generator: torch.Generator) -> None:
    """Random projections of unit gain; head h attends to the neighbour HEAD_OFFSETS[h] tokens away.

    T5's own initialization has almost no position bias, so that embeddings would be those of a bag of words: they
    would not show whether the object or the background is red. With the biases set here, the gated feed-forward layers
    combine each token with its neighbours.
    """
    config = model.config
    buckets = config.relative_attention_num_buckets // 2  # per direction; later tokens have the second half
    for name, weight in model.named_parameters():
        if "layer_norm" in name:
            continue  # ones
        if "relative_attention_bias" in name:  # (buckets, heads)
            weight.zero_()
            for head, offset in enumerate(HEAD_OFFSETS):
                weight[abs(offset) + (buckets if offset > 0 else 0), head] = 8.0  # e^8: nearly all the weight
            continue
        weight.normal_(generator=generator)
        if "shared" not in name and "embed_tokens" not in name:
            weight.mul_(weight.shape[1] ** -0.5)  # fan-in
        if name.endswith(".q.weight"):
            weight.mul_(config.d_kv**-0.5)  # T5 has no scale on its logits
