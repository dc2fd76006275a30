"""Captions -> token ids, with the tokenizer of a text encoder and the special tokens that it puts around a text."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def preprocess(caption: str) -> str:
    """What the tokenizer sees of a caption: Unicode NFC, without white space at its ends."""
    return unicodedata.normalize("NFC", caption).strip()


class CaptionTokens:
    """A tokenizer of transformers for captions of at most max_length tokens. lower: in lower case.

    truncated: number of captions truncated so far; unknown: number of captions with unknown tokens. The first of each
    is logged. Raises ValueError if max_length leaves no room for text.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, lower: bool = False) -> None:
        self.tokenizer, self.max_length, self.lower = tokenizer, max_length, lower
        self.truncated = 0
        self.unknown = 0
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        self.before, self.after = self._around()
        if max_length <= len(self.before) + len(self.after):
            around = tokenizer.convert_ids_to_tokens([*self.before, *self.after])
            raise ValueError(
                f"max_length is {max_length}, but must be at least {len(around) + 1}: {', '.join(around)} count as well"
            )

    @property
    def padding(self) -> int:
        """The id that fills rows of a batch."""
        return self.tokenizer.pad_token_id or 0

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption with the special tokens, truncated to max_length; counts `truncated` and `unknown`.

        A literal </s>, <pad> or <extra_id_0> in a caption becomes <unk>: a caption cannot end itself.
        """
        result = []
        for text, ids in self._all_ids(captions):
            if self._has_unknown(ids):
                if not self.unknown:
                    logger.warning("text encoder: %s (further ones are not logged)", _unknown_warning(text))
                self.unknown += 1
            if len(ids) > self.max_length:
                if not self.truncated:
                    warning = _truncation_warning(text, len(ids), self.max_length)
                    logger.warning("text encoder: %s (further ones are not logged)", warning)
                self.truncated += 1
                ids = [*ids[: self.max_length - len(self.after)], *self.after]
            result.append(ids)
        return result

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, before it is truncated; counts nothing."""
        return [len(ids) for _, ids in self._all_ids(captions)]

    def unreadable(self, captions: Sequence[str]) -> list[str]:
        """The captions with unknown tokens."""
        return [caption for caption, (_, ids) in zip(captions, self._all_ids(captions)) if self._has_unknown(ids)]

    def warnings(self, captions: Sequence[str]) -> list[str]:
        """One line for each distinct caption that is truncated, and for each that has unknown tokens."""
        warnings = []
        for text, ids in self._all_ids(list(dict.fromkeys(captions))):
            if self._has_unknown(ids):
                warnings.append(_unknown_warning(text))
            if len(ids) > self.max_length:
                warnings.append(_truncation_warning(text, len(ids), self.max_length))
        return warnings

    def _all_ids(self, captions: Sequence[str]) -> list[tuple[str, list[int]]]:
        """The text of each caption after `preprocess`, and all its token ids with the special tokens around it."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions must be a list of strings, got {captions!r:.80}")
        if not captions:
            return []
        texts = [preprocess(caption) for caption in captions]
        if self.lower:
            texts = [text.lower() for text in texts]
        unknown = self.tokenizer.unk_token_id
        instead = [] if unknown is None else [unknown]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # split_special_tokens=True is not enough: in T5's unigram model </s> and <pad> are ordinary pieces too.
        rows = [[i for token in row for i in (instead if token in self._special else [token])] for row in rows]
        return [(text, [*self.before, *row, *self.after]) for text, row in zip(texts, rows)]

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text. Raises ValueError if there are none, and
        none that ends a text: an empty caption needs a token."""
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), None)
        before, after = ([], []) if start is None else (whole[:start], whole[start + len(alone) :])
        if before or after:
            return before, after
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                "the tokenizer has no special tokens, so that an empty caption would have no tokens at all"
            )
        return [], [end]

    def _has_unknown(self, ids: list[int]) -> bool:
        return self.tokenizer.unk_token_id in ids


def _unknown_warning(text: str) -> str:
    return f"caption with unknown tokens: {_quoted(text)}"


def _truncation_warning(text: str, tokens: int, max_length: int) -> str:
    return f"caption truncated from {tokens} to {max_length} tokens: {_quoted(text)}"


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:60]}..."'
