"""Captions -> T5 embeddings (Imagen, section 2.1: a frozen text encoder), with or without precomputation.

Letters: B captions, L tokens (padded), D text width. A caption of n tokens includes T5's closing </s>.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import string
import unicodedata
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import T5EncoderModel

log = logging.getLogger(__name__)

PREPROCESSING = "nfc-strip-1"
"""Name of what `preprocess` does and of how special tokens are refused; part of every encoder's identity."""

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


# ---------------------------------------------------------------- embeddings


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embedded captions: embeds (B, L, D) floating point, mask (B, L) bool, real tokens first in every row.

    Raises ValueError on other shapes or dtypes and on a mask with a gap. Padded embeds may hold anything.
    """

    embeds: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.embeds.shape)
        if len(shape) != 3 or not self.embeds.is_floating_point():
            raise ValueError(f"text embeddings are floating point (B, L, D), not {self.embeds.dtype} {shape}")
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape[:2]:
            raise ValueError(f"the mask of text embeddings {shape} must be bool {shape[:2]}, "
                             f"got {self.mask.dtype} {tuple(self.mask.shape)}")
        if self.mask.device != self.embeds.device:
            raise ValueError(f"text embeddings on {self.embeds.device}, their mask on {self.mask.device}")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise ValueError("the mask of text embeddings must begin with the real tokens: found a gap")

    @staticmethod
    def _derive(embeds: Tensor, mask: Tensor) -> TextEmbeddings:
        """From checked parts: no second look at the mask, which would wait for the GPU."""
        derived = object.__new__(TextEmbeddings)
        object.__setattr__(derived, "embeds", embeds)
        object.__setattr__(derived, "mask", mask)
        return derived

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each caption, (B,) int64."""
        return self.mask.sum(dim=1)  # (B,)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbeddings:
        """Some of the captions, by slice, index tensor, bool tensor or list; L stays as it is."""
        if not isinstance(index, (slice, Tensor, list)) or (isinstance(index, Tensor) and index.ndim != 1):
            raise TypeError(f"index with a slice, list or 1-d tensor (one caption: [i:i+1]), not {index!r}")
        return self._derive(self.embeds[index], self.mask[index])

    def to(self, *, device: torch.device | str | None = None,
           dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same captions on another device, in another floating point dtype."""
        return self._derive(self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device))

    @classmethod
    def from_list(cls, captions: Sequence[Tensor]) -> TextEmbeddings:
        """Pads one (L_i, D) per caption with zeros to the longest. Raises ValueError if D or dtype differ."""
        if not captions:
            raise ValueError("no captions to make text embeddings of")
        first = captions[0]
        for tokens in captions:
            if tokens.ndim != 2 or tokens.shape[1] != first.shape[-1] or tokens.dtype != first.dtype:
                raise ValueError(f"captions must be (L, D) with one D and dtype, got {tokens.dtype} "
                                 f"{tuple(tokens.shape)} beside {first.dtype} {tuple(first.shape)}")
        embeds = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)  # (B, L, D)
        lengths = torch.tensor([len(tokens) for tokens in captions], device=embeds.device)
        mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]  # (B, L)
        return cls(embeds, mask)

    @classmethod
    def cat(cls, parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All captions of `parts` in order; L is the largest, D and dtype must agree (ValueError)."""
        return cls.from_list([tokens for part in parts for tokens in part.unpadded()])

    def unpadded(self) -> list[Tensor]:
        """One (L_i, D) tensor per caption."""
        return [row[:length] for row, length in zip(self.embeds, self.lengths.tolist())]

    def save(self, path: str | Path, captions: Sequence[str] | None = None) -> None:
        """Writes safetensors without padding: tokens (sum of L_i, D), offsets (B + 1,), captions."""
        if captions is not None and len(captions) != len(self):
            raise ValueError(f"{len(captions)} captions for {len(self)} text embeddings")
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cpu().cumsum(0)])  # (B + 1,)
        metadata = {"format": "fastimagen.text"}
        if captions is not None:
            metadata["captions"] = json.dumps(list(captions))
        write_safetensors(path, {"tokens": self.embeds[self.mask], "offsets": offsets}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> TextEmbeddings:
        """Reads what `save` wrote, onto the CPU. Raises ValueError for a missing, damaged or foreign file."""
        with _open_saved(path) as file:
            tokens, offsets = file.get_tensor("tokens"), file.get_tensor("offsets")
        return cls.from_list(tokens.split(offsets.diff().tolist()))

    @staticmethod
    def load_captions(path: str | Path) -> list[str] | None:
        """The captions stored by `save`, None if it was given none. Raises ValueError as `load` does."""
        with _open_saved(path) as file:
            captions = file.metadata().get("captions")
        return None if captions is None else json.loads(captions)


def _open_saved(path: str | Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(os.fspath(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read text embeddings {path}: {_first_line(error)}") from error
    if (file.metadata() or {}).get("format") != "fastimagen.text":
        raise ValueError(f"{path} holds no text embeddings of TextEmbeddings.save")
    return file


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file so that `path` is at any time absent, the old file or the whole new one.

    tensors: any device, any shape; metadata: strings for the header. Creates the folder.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- encoder


def preprocess(caption: str) -> str:
    """What the tokenizer sees of a caption: Unicode NFC, without white space at its ends."""
    return unicodedata.normalize("NFC", caption).strip()


def text_width(name_or_path: str | Path) -> int:
    """Width D of an encoder's embeddings; no network for folders and for the encoders of T5_NAMES.

    Raises ValueError if the encoder is not found, ImportError if asking the hub needs transformers.
    """
    if not Path(name_or_path).is_dir():
        for short, (hub, width) in T5_NAMES.items():
            if str(name_or_path) in (short, hub, hub.removeprefix("google-t5/")):
                return width
    return _width(_locate(name_or_path, None)[1])


def encoder_identity(name_or_path: str | Path, *, revision: str | None = None,
                     max_length: int = 256) -> dict[str, str]:
    """Everything that decides what an encoder makes of a caption, as strings, without loading its weights.

    encoder: name on the hub, or the last part of the folder's path (the folder may move); revision: commit on
    the hub, or sha256 of the folder's weights (read in full); tokenizer: sha256 of its file; preprocessing.
    Raises ValueError if the encoder is not found, ImportError if transformers is missing for a hub name.
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
    return {"encoder": encoder, "revision": commit, "max_length": str(max_length),
            "tokenizer": f"sha256:{_sha256([tokenizer])}", "preprocessing": PREPROCESSING}


class T5Encoder:
    """Any T5 encoder of the Hugging Face hub, of a folder, or one of the short names of T5_NAMES; frozen.

    dtype: float32, bfloat16 or float64; float16 is refused since T5 overflows in it.
    truncated: captions cut to max_length tokens so far; unknown: captions so far with a part that became
    <unk>. The first of each is logged.
    Raises ValueError for an encoder that is not found or not a T5, ImportError without transformers.
    """

    def __init__(self, name_or_path: str | Path, *, revision: str | None = None, max_length: int = 256,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"T5 overflows in {dtype}: use torch.bfloat16 or torch.float32")
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for words beside </s>: give at least 2")
        transformers = _need("transformers")
        name, config, commit = _locate(name_or_path, revision)
        if _tokenizer_file(name, config, revision=commit).suffix == ".model":
            for module in ("sentencepiece", "google.protobuf"):  # transformers converts the file with them
                _need(module)
        dim = _width(config)
        self._source = (name_or_path, commit)
        self._identity: dict[str, str] | None = None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=commit)
            model, info = transformers.T5EncoderModel.from_pretrained(name, revision=commit, dtype=dtype,
                                                                      output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"text encoder {name} cannot be loaded: {_first_line(error)}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"text encoder {name} lacks weights: {missing:.200}")
        self.model: T5EncoderModel = model.eval().requires_grad_(False).to(device)
        self.dim = dim
        self.max_length = max_length
        self.truncated = 0
        self.unknown = 0
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special = (added | set(self.tokenizer.all_special_ids)) - {self.tokenizer.unk_token_id}

    def identity(self) -> dict[str, str]:
        """See `encoder_identity`; computed once."""
        if self._identity is None:
            name, revision = self._source
            self._identity = encoder_identity(name, revision=revision, max_length=self.max_length)
        return dict(self._identity)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption with its closing </s>, cut to max_length; counts `truncated`, `unknown`.

        Literal </s>, <pad> or <extra_id_0> in a caption becomes <unk>: only we may end a caption.
        """
        result = []
        for text, row, unknown in self._rows(captions):
            if unknown:
                if not self.unknown:
                    log.warning("text encoder: parts of a caption are unknown to the tokenizer: %.60s", text)
                self.unknown += 1
            if len(row) > self.max_length:
                if not self.truncated:
                    log.warning("text encoder: a caption of %d tokens is cut to %d: %.60s...",
                                len(row), self.max_length, text)
                self.truncated += 1
                row = [*row[:self.max_length - 1], row[-1]]
            result.append(row)
        return result

    def unread(self, captions: Sequence[str]) -> list[str]:
        """What `tokenize` cannot pass on of these captions: a line for each that is cut or has unknown parts."""
        lines = []
        for text, row, unknown in self._rows(list(dict.fromkeys(captions))):
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            if unknown:
                lines.append(f'the text encoder does not know all of "{shown}"')
            if len(row) > self.max_length:
                lines.append(f'the text encoder reads {self.max_length} of the {len(row)} tokens of "{shown}"')
        return lines

    def _rows(self, captions: Sequence[str]) -> list[tuple[str, list[int], bool]]:
        """Of each caption its text, all its ids with the closing </s>, and whether some are <unk>."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions must be a list of strings, got {captions!r:.80}")
        if not captions:
            return []
        texts = [preprocess(caption) for caption in captions]
        unk, eos = self.tokenizer.unk_token_id, self.tokenizer.eos_token_id
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # split_special_tokens=True does not do it: T5's unigram model has </s> and <pad> as plain pieces
        rows = [[unk if token in self._special else token for token in row] for row in rows]
        return [(text, [*row, eos], unk in row) for text, row in zip(texts, rows)]

    def encode(self, captions: Sequence[str], batch_size: int = 32) -> TextEmbeddings:
        """Embeds captions on the encoder's device, in its dtype; padding is zero, an empty caption its </s>.

        batch_size: captions of like length at once. Raises ValueError for no captions or other than strings.
        """
        rows = self.tokenize(captions)
        if not rows:
            raise ValueError("no captions to encode")
        device = self.model.device
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(len(rows[order[0]]), device=device) < lengths[:, None]  # (B, L)
        embeds = torch.zeros(*mask.shape, self.dim, dtype=self.model.dtype, device=device)  # (B, L, D)
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            longest = len(rows[batch[0]])
            padded = [rows[i] + [0] * (longest - len(rows[i])) for i in batch]
            ids, real = torch.tensor(padded, device=device), mask[batch, :longest]  # (b, l) both
            with torch.inference_mode():  # around the model only: training could not use what is made inside
                hidden = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state  # (b, l, D)
                embeds[batch, :longest] = hidden.masked_fill(~real[..., None], 0)
        return TextEmbeddings(embeds, mask)


def _need(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, but something that it needs is not
        name = module.rpartition(".")[2]
        raise ImportError(f"the T5 text encoder needs {name}: pip install fastimagen[text]") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _locate(name_or_path: str | Path, revision: str | None) -> tuple[str, Path, str | None]:
    """(folder or full hub name, its config.json, hub commit or None); ValueError says what was tried."""
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise ValueError(f'revision "{revision}" is for the hub; text encoder {name_or_path} is a folder')
        config = Path(name_or_path) / "config.json"
        if not config.is_file():
            raise ValueError(f"text encoder folder {name_or_path} has no config.json")
        return str(name_or_path), config, None
    name = T5_NAMES[str(name_or_path)][0] if str(name_or_path) in T5_NAMES else str(name_or_path)
    missing = f'text encoder "{name_or_path}": no such folder here'
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(missing)
    _need("transformers")
    try:
        config = _hub_file(name, "config.json", revision)
    except OSError as error:
        at = f' at revision "{revision}"' if revision else ""
        reason = _first_line(error)
        raise ValueError(f"{missing}, and the Hugging Face hub gave no {name}{at}: {reason}") from error
    return name, config, config.parent.name  # .../snapshots/COMMIT/config.json


def _hub_file(name: str, file: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    return Path(cached_file(name, file, revision=revision))


def _tokenizer_file(name: str, config: Path, *, revision: str | None) -> Path:
    """The file that AutoTokenizer reads: tokenizer.json where there is one, else the sentencepiece model."""
    for file in ("tokenizer.json", "spiece.model"):
        if (config.parent / file).is_file():
            return config.parent / file
        if not Path(name).is_dir():
            try:
                return _hub_file(name, file, revision)
            except OSError:
                continue  # the hub has the other one; if it has neither, the line below says so
    raise ValueError(f"text encoder {name} has no tokenizer (tokenizer.json or spiece.model)")


def _width(config: Path) -> int:
    content = json.loads(config.read_text())
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


# ---------------------------------------------------------------- the built-in encoder

HEADS = 8
HEAD_OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)
"""Which neighbour each attention head of the built-in encoder looks at, in tokens."""

TINY_README = """# A tiny random text encoder

A T5 encoder in Hugging Face's format: {layers} layers of width {dim}, {vocabulary} pieces (words of
{captions} captions, and single characters).
**Its weights are random (seed {seed}): it was never trained and knows nothing.**
Captions of those words get distinct embeddings that depend on word order: enough for the built-in captioned
shapes and for a first run without a download. For other pictures use a real T5 (`t5_small` ... `xxl1.1`).
Made by fastimagen's `build_tiny_t5`.
"""


def build_tiny_t5(folder: str | Path, captions: Sequence[str], *, dim: int = 64, layers: int = 2,
                  vocab_size: int = 1024, seed: int = 0) -> Path:
    """Makes a small random T5 encoder with tokenizer in `folder`; leaves the global random state alone.

    The most frequent words are one token each, up to vocab_size pieces in all; other words are spelled. The
    same arguments give the same encoder. Raises ValueError for a folder that is not empty, captions without
    text, dim not a multiple of 8, vocab_size too small for the characters; ImportError without transformers.
    """
    folder, texts = Path(folder), [text for text in map(preprocess, captions) if text]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is already there: give a new folder for the text encoder")
    if not texts:
        raise ValueError("no captions to build a text encoder from")
    if dim % HEADS:
        raise ValueError(f"dim {dim} of the text encoder is not a multiple of {HEADS}")
    transformers = _need("transformers")
    pieces = _vocabulary(texts, vocab_size)
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)  # vocab_file= would be ignored in silence
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=dim, d_kv=dim // HEADS, num_heads=HEADS, d_ff=4 * dim,
        num_layers=layers, feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False,
        use_cache=False)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own
        model = transformers.T5EncoderModel(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(TINY_README.format(
            layers=layers, dim=dim, vocabulary=len(pieces), captions=len(texts), seed=seed))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    frequent = sorted(words, key=lambda word: (-words[word], word))[:max(size - len(pieces), 0)]
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
            weight.mul_(config.d_kv ** -0.5)  # T5 has no scale on its logits
