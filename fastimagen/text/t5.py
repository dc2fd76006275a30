"""Captions -> embeddings of a frozen text encoder (Imagen, section 2.1): T5, or another encoder of transformers.

The tokens of a caption include the special ones, such as T5's </s>.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from ..extras import import_extra
from ..files import first_line, read_json_object
from .checksums import remembered_sha256, sha256_of
from .embeddings import TextEmbeddings
from .tokens import CaptionTokens

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

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json")
"""What defines a tokenizer: the first one that a text encoder has."""

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
    or sha256 of the folder's weights (checksums.py); tokenizer: sha256 of its file; preprocessing; dtype, if
    it is not float32. Raises ValueError if the encoder is not found, ImportError if transformers is missing for a hub
    name.
    """
    name, config, commit = _locate(name_or_path, revision)
    if commit is None:
        folder = config.parent
        weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not weights:
            raise ValueError(f"text encoder folder {name} has no model*.safetensors or pytorch_model*.bin")
        commit = f"sha256:{remembered_sha256(weights)}"
    tokenizer = _tokenizer_file(name, config, revision=commit)
    encoder = config.parent.resolve().name if Path(name).is_dir() else name
    identity = {
        "encoder": encoder,
        "revision": commit,
        "max_length": str(max_length),
        "tokenizer": f"sha256:{sha256_of([tokenizer])}",
        "preprocessing": PREPROCESSING if encoding == "words" else IF_PREPROCESSING,
    }
    return identity if dtype == "float32" else identity | {"dtype": dtype}


class T5Encoder:
    """A frozen text encoder: a T5 by its name on the Hugging Face hub, as a folder, or by a short name of T5_NAMES; or
    any other encoder that transformers knows as one (ByT5, umT5, T5Gemma, BERT, ...), with its own tokenizer.

    dtype: float32, bfloat16 or float64; not float16, in which T5 overflows. truncated: number of captions truncated to
    max_length tokens so far; unknown: number of captions with unknown tokens. The first of each is logged. Raises
    ValueError for an encoder that is not found or not a text encoder, ImportError without transformers.
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
        self.tokens = load_tokens(name_or_path, revision=revision, max_length=max_length, encoding=encoding)
        name, config, commit = _locate(name_or_path, revision)
        dim = _width(config)
        self._source = (name_or_path, commit)
        self._identity: dict[str, str] | None = None
        self.model = _load_model(name, config, commit, dtype, max_length).to(device)
        self.dim = dim
        self.max_length, self.encoding = max_length, encoding

    @property
    def truncated(self) -> int:
        """Captions truncated so far."""
        return self.tokens.truncated

    @property
    def unknown(self) -> int:
        """Captions with unknown tokens so far."""
        return self.tokens.unknown

    def identity(self) -> dict[str, str]:
        """The result of `encoder_identity`, computed once."""
        if self._identity is None:
            name, revision = self._source
            dtype = str(self.model.dtype).removeprefix("torch.")
            self._identity = encoder_identity(
                name, revision=revision, max_length=self.max_length, encoding=self.encoding, dtype=dtype
            )
        return dict(self._identity)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens that `encode` gives each caption; counts nothing else."""
        if self.encoding == "if":
            return [self.max_length] * len(captions)
        return [min(length, self.max_length) for length in self.tokens.lengths(captions)]

    def caption_warnings(self, captions: Sequence[str]) -> list[str]:
        """One line for each distinct caption that is truncated, and for each that has unknown tokens."""
        return self.tokens.warnings(captions)

    def encode(self, captions: Sequence[str], batch_size: int = 32) -> TextEmbeddings:
        """Embeddings of captions on the encoder's device, in its dtype. Padding is zero; an empty caption is its
        special tokens.

        With the encoding "if" there is no padding: all max_length tokens count.
        batch_size: captions of similar length per forward pass. Raises ValueError if `captions` is empty or contains
        anything but strings.
        """
        rows = self.tokens.rows(captions)
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
            padded = [rows[i] + [self.tokens.padding] * (longest - len(rows[i])) for i in batch]
            ids, real = torch.tensor(padded, device=device), mask[batch, :longest]  # (b, l), (b, l)
            with torch.inference_mode():  # only around the model: autograd cannot save inference tensors for backward
                hidden = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state  # (b, l, E)
                embeds[batch, :longest] = hidden if self.encoding == "if" else hidden.masked_fill(~real[..., None], 0)
        return TextEmbeddings(embeds, torch.ones_like(mask) if self.encoding == "if" else mask)


def load_tokens(
    name_or_path: str | Path, *, revision: str | None = None, max_length: int = 256, encoding: Encoding = "words"
) -> CaptionTokens:
    """The tokenizer of a text encoder, without its weights. Raises ValueError and ImportError as T5Encoder."""
    transformers = import_for_text("transformers")
    name, config, commit = _locate(name_or_path, revision)
    if _tokenizer_file(name, config, revision=commit).suffix == ".model":
        for module in ("sentencepiece", "google.protobuf"):  # transformers converts the file with them
            import_for_text(module)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=commit)
    except (OSError, ValueError) as error:
        raise ValueError(f"text encoder {name} cannot be loaded: {first_line(error)}") from error
    return CaptionTokens(tokenizer, max_length, lower=encoding == "if")


def _load_model(name: str, config_file: Path, commit: str | None, dtype: torch.dtype, max_length: int) -> Any:
    """The encoder of transformers, frozen. Raises ValueError for a model of another kind and for missing weights."""
    transformers = import_for_text("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=commit)
        config.is_encoder_decoder = False  # of an encoder-decoder the encoder alone is read
        if type(config) not in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            kinds = ", ".join(sorted(kind.model_type for kind in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING))
            raise ValueError(f'{config_file} describes a model of type "{config.model_type}", not one of {kinds}')
        longest = getattr(config, "max_position_embeddings", None) or max_length
        if max_length > longest:
            raise ValueError(f"it reads at most {longest} tokens, but fastimagen.text.max_length is {max_length}")
        with bars_in_terminals_only():
            model, info = transformers.AutoModelForTextEncoding.from_pretrained(
                name, revision=commit, config=config, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"text encoder {name} cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # it is not used
    if missing:
        raise ValueError(f"the weights of text encoder {name} are incomplete, missing: {', '.join(missing):.200}")
    return model.eval().requires_grad_(False)


def import_for_text(module: str) -> ModuleType:
    """Import a dependency of the text encoder. Raises ImportError that says how to install it."""
    return import_extra(module, user="the text encoder", extra="text")


@contextmanager
def bars_in_terminals_only() -> Iterator[None]:
    """Within, transformers draws its loading bars only if stderr is a terminal: in a log file a bar is a page of lines.

    Whoever has disabled them sees none in a terminal either.
    """
    bars = import_for_text("transformers").utils.logging
    hide = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


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
    """The file that AutoTokenizer reads: tokenizer.json where there is one, else the sentencepiece model or a list of
    words. ByT5 reads bytes, and has its settings alone."""
    for file in (*TOKENIZER_FILES, "tokenizer_config.json"):
        path = config.parent / file
        if not path.is_file():
            if Path(name).is_dir():
                continue
            try:
                path = _hub_file(name, file, revision)
            except OSError:
                continue  # try the next file
        if file in TOKENIZER_FILES or read_json_object(path).get("tokenizer_class") == "ByT5Tokenizer":
            return path
    raise ValueError(f"text encoder {name} has no tokenizer ({' or '.join(TOKENIZER_FILES)})")


def _width(config: Path) -> int:
    """Width of the embeddings, by the name that models of this type have for it."""
    content = read_json_object(config)
    encoder = content.get("encoder")  # T5Gemma has a section for each half
    for section in (content, encoder if isinstance(encoder, dict) else {}):
        for key in ("d_model", "hidden_size", "dim"):
            if isinstance(section.get(key), int):
                return section[key]
    raise ValueError(f'{config} describes a model of type "{content.get("model_type")}", which is not a text encoder')
