"""Captions -> T5 embeddings (Imagen, section 2.1: a frozen text encoder). The tokens of a caption include T5's </s>."""

from __future__ import annotations

import difflib
import hashlib
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from ..extras import import_extra
from ..files import first_line, read_json_object
from .embeddings import TextEmbeddings

if TYPE_CHECKING:
    from transformers import T5EncoderModel

logger = logging.getLogger(__name__)

PREPROCESSING = "nfc-strip-1"
"""Version of `preprocess` and of the treatment of special tokens; part of every encoder's identity."""

IF_PREPROCESSING = "nfc-strip-lower-padded-1"
"""The same for the encoding "if"."""

Encoding = Literal["words", "if"]
"""How captions become embeddings. "words": the tokens of a caption. "if": as DeepFloyd IF was trained, in lower case
and always max_length tokens; the encoder's outputs for padding depend on the caption and count as tokens."""

RANDOM_WEIGHTS = "fastimagen_random_weights"
"""Key in the config.json of the built-in text encoder (tiny_t5.py). Its README.md says the same in words."""

RANDOM_WEIGHTS_README = "**Its weights are random"

T5_NAMES: dict[str, tuple[str, int]] = {
    "t5_small": ("google-t5/t5-small", 512),
    "t5_base": ("google-t5/t5-base", 768),
    "t5_large": ("google-t5/t5-large", 1024),
    "t5_3b": ("google-t5/t5-3b", 1024),
    "t5_11b": ("google-t5/t5-11b", 1024),
    "small1.1": ("google/t5-v1_1-small", 512),
    "base1.1": ("google/t5-v1_1-base", 768),
    "large1.1": ("google/t5-v1_1-large", 1024),
    "xl1.1": ("google/t5-v1_1-xl", 2048),
    "xxl1.1": ("google/t5-v1_1-xxl", 4096),
}
"""MinImagen's short names -> (name on the Hugging Face hub, width of the embeddings)."""


def preprocess(caption: str) -> str:
    """What the tokenizer sees of a caption: Unicode NFC, without white space at its ends."""
    return unicodedata.normalize("NFC", caption).strip()


def is_path(name_or_path: str | Path) -> bool:
    """Whether a text encoder is given as a folder, which may be missing, and not as a name on the hub."""
    name = str(name_or_path)
    return Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1


def text_width(name_or_path: str | Path) -> int:
    """Width E of an encoder's embeddings; no network for folders and for the encoders of T5_NAMES.

    Raises ValueError if the encoder is not found, ImportError if asking the hub needs transformers.
    """
    if not Path(name_or_path).is_dir():
        for short, (hub, width) in T5_NAMES.items():
            if str(name_or_path) in (short, hub, hub.removeprefix("google-t5/")):
                return width
    return _width(_locate(name_or_path, None)[1])


def is_random_encoder(name_or_path: str | Path) -> bool:
    """Whether this is the folder of a built-in text encoder, whose weights are random (tiny_t5.py)."""
    config, readme = Path(name_or_path) / "config.json", Path(name_or_path) / "README.md"
    if not config.is_file():
        return False
    if read_json_object(config).get(RANDOM_WEIGHTS):
        return True
    # Encoders built before the key existed have the README.md only.
    return readme.is_file() and RANDOM_WEIGHTS_README in readme.read_text(encoding="utf-8", errors="replace")


def hub_commit(name_or_path: str | Path, revision: str | None = None) -> str | None:
    """The commit on the hub, or in its cache, that a branch, a tag or None, the main branch, is at; None for a folder.

    Raises as `encoder_identity` does.
    """
    return _locate(name_or_path, revision)[2]


def encoder_identity(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    max_length: int = 256,
    encoding: Encoding = "words",
    dtype: str = "float32",
) -> dict[str, str]:
    """Everything that an encoder's embeddings depend on, as strings, without loading its weights.

    encoder: name on the hub, or the last part of the folder's path (the folder may move); revision: commit on the hub,
    or sha256 of the folder's weights (reads the whole files); tokenizer: sha256 of its file; preprocessing; dtype, if
    it is not float32. Raises ValueError if the encoder is not found, ImportError if transformers is missing for a hub
    name.
    """
    name, config, commit = _locate(name_or_path, revision)
    if commit is None:
        folder = config.parent
        weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not weights:
            raise ValueError(f"text encoder folder {name} has no model*.safetensors or pytorch_model*.bin")
        commit = f"sha256:{_sha256(weights)}"
    tokenizer = _tokenizer_file(name, config, revision=commit)
    encoder = config.parent.resolve().name if Path(name).is_dir() else name
    identity = {
        "encoder": encoder,
        "revision": commit,
        "max_length": str(max_length),
        "tokenizer": f"sha256:{_sha256([tokenizer])}",
        "preprocessing": PREPROCESSING if encoding == "words" else IF_PREPROCESSING,
    }
    return identity if dtype == "float32" else identity | {"dtype": dtype}


class T5Encoder:
    """A frozen T5 encoder: a name on the Hugging Face hub, a folder, or a short name of T5_NAMES.

    dtype: float32, bfloat16 or float64; not float16, in which T5 overflows. truncated: number of captions truncated to
    max_length tokens so far; unknown: number of captions with unknown tokens. The first of each is logged. Raises
    ValueError for an encoder that is not found or not a T5, ImportError without transformers.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        max_length: int = 256,
        encoding: Encoding = "words",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"T5 overflows in {dtype}: use torch.bfloat16 or torch.float32")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, but must be at least 2: one token is </s>")
        transformers = import_for_text("transformers")
        name, config, commit = _locate(name_or_path, revision)
        if _tokenizer_file(name, config, revision=commit).suffix == ".model":
            for module in ("sentencepiece", "google.protobuf"):  # transformers converts the file with them
                import_for_text(module)
        dim = _width(config)
        self._source = (name_or_path, commit)
        self._identity: dict[str, str] | None = None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=commit)
            model, info = transformers.T5EncoderModel.from_pretrained(
                name, revision=commit, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"text encoder {name} cannot be loaded: {first_line(error)}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"the weights of text encoder {name} are incomplete, missing: {missing:.200}")
        self.model: T5EncoderModel = model.eval().requires_grad_(False).to(device)
        self.dim = dim
        self.max_length, self.encoding = max_length, encoding
        self.truncated = 0
        self.unknown = 0
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special = (added | set(self.tokenizer.all_special_ids)) - {self.tokenizer.unk_token_id}

    def identity(self) -> dict[str, str]:
        """The result of `encoder_identity`, computed once."""
        if self._identity is None:
            name, revision = self._source
            dtype = str(self.model.dtype).removeprefix("torch.")
            self._identity = encoder_identity(
                name, revision=revision, max_length=self.max_length, encoding=self.encoding, dtype=dtype
            )
        return dict(self._identity)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption with the final </s>, truncated to max_length; counts `truncated` and `unknown`.

        A literal </s>, <pad> or <extra_id_0> in a caption becomes <unk>: a caption cannot end itself.
        """
        result = []
        for text, ids in self._token_ids(captions):
            if self._has_unknown(ids):
                if not self.unknown:
                    logger.warning("text encoder: %s (further ones are not logged)", _unknown_warning(text))
                self.unknown += 1
            if len(ids) > self.max_length:
                if not self.truncated:
                    warning = _truncation_warning(text, len(ids), self.max_length)
                    logger.warning("text encoder: %s (further ones are not logged)", warning)
                self.truncated += 1
                ids = [*ids[: self.max_length - 1], ids[-1]]
            result.append(ids)
        return result

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens that `encode` gives each caption; counts nothing else."""
        if self.encoding == "if":
            return [self.max_length] * len(captions)
        return [min(len(ids), self.max_length) for _, ids in self._token_ids(captions)]

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """One line for each distinct caption that is truncated, and for each that has unknown tokens."""
        warnings = []
        for text, ids in self._token_ids(list(dict.fromkeys(captions))):
            if self._has_unknown(ids):
                warnings.append(_unknown_warning(text))
            if len(ids) > self.max_length:
                warnings.append(_truncation_warning(text, len(ids), self.max_length))
        return warnings

    def _token_ids(self, captions: Sequence[str]) -> list[tuple[str, list[int]]]:
        """The text of each caption after `preprocess`, and all its token ids with the final </s>."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions must be a list of strings, got {captions!r:.80}")
        if not captions:
            return []
        texts = [preprocess(caption) for caption in captions]
        if self.encoding == "if":
            texts = [text.lower() for text in texts]
        unk, eos = self.tokenizer.unk_token_id, self.tokenizer.eos_token_id
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # split_special_tokens=True is not enough: in T5's unigram model </s> and <pad> are ordinary pieces too.
        rows = [[unk if token in self._special else token for token in row] for row in rows]
        return [(text, [*row, eos]) for text, row in zip(texts, rows)]

    def _has_unknown(self, ids: list[int]) -> bool:
        return self.tokenizer.unk_token_id in ids

    def encode(self, captions: Sequence[str], batch_size: int = 32) -> TextEmbeddings:
        """Embeddings of captions on the encoder's device, in its dtype. Padding is zero; an empty caption is its </s>.

        With the encoding "if" there is no padding: all max_length tokens count.
        batch_size: captions of similar length per forward pass. Raises ValueError if `captions` is empty or contains
        anything but strings.
        """
        rows = self.tokenize(captions)
        if not rows:
            raise ValueError("no captions to encode")
        device = self.model.device
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        all_tokens = self.max_length if self.encoding == "if" else len(rows[order[0]])
        mask = torch.arange(all_tokens, device=device) < lengths[:, None]  # (B, L)
        embeds = torch.zeros(*mask.shape, self.dim, dtype=self.model.dtype, device=device)  # (B, L, E)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]  # b captions, of up to l tokens
            longest = self.max_length if self.encoding == "if" else len(rows[batch[0]])
            padded = [rows[i] + [0] * (longest - len(rows[i])) for i in batch]
            ids, real = torch.tensor(padded, device=device), mask[batch, :longest]  # (b, l), (b, l)
            with torch.inference_mode():  # only around the model: autograd cannot save inference tensors for backward
                hidden = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state  # (b, l, E)
                embeds[batch, :longest] = hidden if self.encoding == "if" else hidden.masked_fill(~real[..., None], 0)
        return TextEmbeddings(embeds, torch.ones_like(mask) if self.encoding == "if" else mask)


def import_for_text(module: str) -> ModuleType:
    """Import a dependency of the text encoder. Raises ImportError that says how to install it."""
    return import_extra(module, user="the T5 text encoder", extra="text")


def _unknown_warning(text: str) -> str:
    return f"caption with unknown tokens: {_quoted(text)}"


def _truncation_warning(text: str, tokens: int, max_length: int) -> str:
    return f"caption truncated from {tokens} to {max_length} tokens: {_quoted(text)}"


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:60]}..."'


def _locate(name_or_path: str | Path, revision: str | None) -> tuple[str, Path, str | None]:
    """(folder or full hub name, its config.json, hub commit or None). Raises ValueError that says what was tried."""
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise ValueError(f'revision "{revision}" is for the hub, but text encoder {name_or_path} is a folder')
        config = Path(name_or_path) / "config.json"
        if not config.is_file():
            raise ValueError(f"text encoder folder {name_or_path} has no config.json")
        return str(name_or_path), config, None
    missing = f'text encoder "{name_or_path}": there is no such folder'
    if is_path(name_or_path):
        raise ValueError(missing)
    import_for_text("transformers")
    name = T5_NAMES.get(str(name_or_path), (str(name_or_path), 0))[0]
    try:
        config = _hub_file(name, "config.json", revision)
    except OSError as error:
        at = f' at revision "{revision}"' if revision else ""
        near = difflib.get_close_matches(str(name_or_path), T5_NAMES, n=1, cutoff=0.5)
        hint = f' (did you mean "{near[0]}"?)' if near and name == name_or_path else ""
        offline = _OFFLINE.format(name=name) if _is_connection_error(error) else ""
        raise ValueError(
            f"{missing}, and {name}{at} cannot be read from the Hugging Face hub or its cache{hint}: "
            f"{first_line(error)}{offline}"
        ) from error
    return name, config, config.parent.name  # .../snapshots/COMMIT/config.json


_OFFLINE = (
    " Without a network, run `hf download {name}` on a machine that has one, copy its cache of the hub here "
    "(~/.cache/huggingface, or where HF_HOME points) and set HF_HUB_OFFLINE=1; or give the folder of a T5."
)


def _is_connection_error(error: OSError) -> bool:
    """Whether a file is not in the hub's cache and the hub was not reached, in the error of transformers."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error.__cause__, LocalEntryNotFoundError)


def _hub_file(name: str, file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    path = cached_file(name, file, revision=revision)
    assert path is not None  # cached_file raises OSError for a missing file
    return Path(path)


def _tokenizer_file(name: str, config: Path, *, revision: str | None) -> Path:
    """The file that AutoTokenizer reads: tokenizer.json where there is one, else the sentencepiece model."""
    for file in ("tokenizer.json", "spiece.model"):
        if (config.parent / file).is_file():
            return config.parent / file
        if not Path(name).is_dir():
            try:
                return _hub_file(name, file, revision)
            except OSError:
                continue  # try the other file
    raise ValueError(f"text encoder {name} has no tokenizer (tokenizer.json or spiece.model)")


def _width(config: Path) -> int:
    content = read_json_object(config)
    if content.get("model_type") != "t5":
        raise ValueError(f'{config} describes a model of type "{content.get("model_type")}", not "t5"')
    return content["d_model"]


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
