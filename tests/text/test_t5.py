from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.text.t5 import T5Encoder, encoder_identity, text_width
from fastimagen.text.tiny_t5 import build_tiny_t5

ROOT = Path(__file__).resolve().parents[2]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["circle", "square", "triangle", "star", "ring"]
PLACES = ["in the center", "at the top left", "at the top right", "at the bottom left", "at the bottom right"]
COMBINATIONS = list(itertools.product(["small", "large"], range(8), SHAPES, PLACES, range(8)))
CAPTIONS = [
    f"a {size} {COLORS[color]} {shape} {place} of a {COLORS[back]} background"
    for size, color, shape, place, back in COMBINATIONS
]
FEW = ["a red circle", "", "a small blue square at the top left of a white background", "circle red", "star"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_t5(tmp_path_factory.mktemp("text") / "tiny", CAPTIONS)


@pytest.fixture(scope="module")
def encoder(tiny) -> T5Encoder:
    return T5Encoder(tiny)


# ---- TextEmbeddings


@pytest.mark.parametrize(
    "embeds, mask, message",
    [
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), r"\(B, L, E\)"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), "floating point"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"bool \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), r"must be bool"),
        (torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [True, False, True]]), "found a gap"),
    ],
)
def test_embeddings_refuse_wrong_shapes_and_masks(embeds, mask, message):
    with pytest.raises(ValueError, match=message):
        TextEmbeddings(embeds, mask)


def test_from_list_pads_with_zeros_and_unpadded_gives_the_list_back():
    parts = [torch.randn(n, 4) for n in (3, 0, 5)]
    embeddings = TextEmbeddings.from_list(parts)
    assert embeddings.embeds.shape == (3, 5, 4) and len(embeddings) == 3
    assert embeddings.lengths.tolist() == [3, 0, 5] and embeddings.lengths.dtype == torch.int64
    assert embeddings.embeds[~embeddings.mask].abs().sum() == 0
    assert all(torch.equal(a, b) for a, b in zip(embeddings.unpadded(), parts))
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        TextEmbeddings.from_list([torch.zeros(2, 4), torch.zeros(3, 5)])
    with pytest.raises(ValueError, match="no captions"):
        TextEmbeddings.from_list([])


def test_indexing_joining_and_moving():
    short, long = (TextEmbeddings.from_list([torch.randn(n, 4) for n in lengths]) for lengths in ((2, 1), (5, 3, 4)))
    joined = TextEmbeddings.cat([short, long])
    assert joined.embeds.shape == (5, 5, 4) and joined.lengths.tolist() == [2, 1, 5, 3, 4]
    assert torch.equal(joined.embeds[1, :1], short.embeds[1, :1])
    chosen = torch.tensor([False, True, False, True, False])
    for index in (slice(1, 4, 2), [1, 3], torch.tensor([1, 3]), chosen):
        assert joined[index].lengths.tolist() == [1, 3]
        assert torch.equal(joined[index].embeds, joined.embeds[[1, 3]])
    for index in (1, torch.tensor(1)):
        with pytest.raises(TypeError, match=r"\[i:i\+1\]"):
            joined[index]
    moved = joined.to(dtype=torch.bfloat16, device="meta")
    assert (moved.embeds.dtype, moved.mask.dtype) == (torch.bfloat16, torch.bool)
    assert moved.embeds.device.type == moved.mask.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_embeddings_come_back_bit_for_bit_and_without_padding(tmp_path, dtype):
    embeddings = TextEmbeddings.from_list([torch.randn(n, 8).to(dtype) for n in (1, 200, 3)])
    path = tmp_path / "new" / "text.safetensors"
    embeddings.save(path, ["a", "ü", ""])
    loaded = TextEmbeddings.load(path)
    assert loaded.embeds.dtype == dtype and torch.equal(loaded.embeds, embeddings.embeds)
    assert torch.equal(loaded.mask, embeddings.mask)
    assert TextEmbeddings.load_captions(path) == ["a", "ü", ""]
    assert path.stat().st_size < 204 * 8 * dtype.itemsize + 1000
    embeddings.save(path)
    assert TextEmbeddings.load_captions(path) is None
    with pytest.raises(ValueError, match="2 captions for 3"):
        embeddings.save(path, ["a", "b"])


def test_loading_a_wrong_file_is_one_clear_line(tmp_path, tiny):
    (tmp_path / "half").write_bytes((tiny / "model.safetensors").read_bytes()[:-9])
    for path, message in (
        (tmp_path / "none", "cannot read"),
        (tmp_path / "half", "cannot read"),
        (tiny / "model.safetensors", "was not written by TextEmbeddings.save"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TextEmbeddings.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# ---- T5Encoder


def test_a_batch_equals_plain_transformers_one_caption_at_a_time(tiny, encoder):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = T5EncoderModel.from_pretrained(tiny).double().eval()
    encoded = encoder.encode(FEW, batch_size=2)
    assert encoded.embeds.dtype == torch.float32 and encoder.dim == encoded.embeds.shape[2] == 64
    for i, caption in enumerate(FEW):
        expected = model(torch.tensor([tokenizer(caption).input_ids])).last_hidden_state[0]
        length = int(encoded.lengths[i])
        assert length == len(expected)
        torch.testing.assert_close(encoded.embeds[i, :length].double(), expected, rtol=1e-5, atol=1e-5)
        assert encoded.embeds[i, length:].abs().sum() == 0


def test_embeddings_can_be_trained_on(encoder):
    layer = torch.nn.Linear(64, 2)
    layer(encoder.encode(FEW).embeds).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_bfloat16_stays_close_and_float16_is_refused(tiny, encoder):
    half = T5Encoder(tiny, dtype=torch.bfloat16).encode(FEW)
    assert half.embeds.dtype == torch.bfloat16
    exact = encoder.encode(FEW).embeds
    assert (half.embeds.float() - exact).norm() / exact.norm() < 0.05
    with pytest.raises(ValueError, match="overflows"):
        T5Encoder(tiny, dtype=torch.float16)


def test_long_captions_are_cut_counted_and_reported_once(tiny, caplog):
    encoder = T5Encoder(tiny, max_length=6)
    with caplog.at_level(logging.WARNING):
        encoded = encoder.encode(["a red circle", CAPTIONS[0], "a red circle of white", CAPTIONS[1]])
    assert encoded.lengths.tolist() == [4, 6, 6, 6]
    assert encoder.truncated == 2
    assert len(caplog.records) == 1 and CAPTIONS[0][:30] in caplog.text and "cut to 6" in caplog.text
    eos = encoder.tokenizer.eos_token_id
    assert [row[-1] for row in encoder.tokenize(CAPTIONS[:2])] == [eos, eos]
    with pytest.raises(ValueError, match="at least 2"):
        T5Encoder(tiny, max_length=1)


@pytest.mark.parametrize("caption", ["</s>", "a red</s> circle", "<pad> circle", "a </s></s><pad>", "</s"])
def test_a_caption_cannot_inject_special_tokens(encoder, caption):
    row = encoder.tokenize([caption])[0]
    assert row[-1] == 1 and not {0, 1} & set(row[:-1])


def test_unknown_parts_are_counted_and_reported(tiny, caplog):
    encoder = T5Encoder(tiny)
    encoder.encode(["a Zebra, 7 years old!", "a red circle"])
    assert encoder.unknown == 0 and not caplog.records
    encoder.encode(["a red circle", "a 象 circle", "象"])
    assert encoder.unknown == 2 and len(caplog.records) == 1 and "a 象 circle" in caplog.text


def test_what_is_not_read_is_said_of_each_caption(tiny):
    encoder = T5Encoder(tiny, max_length=6)
    long = "a " * 40 + "circle"
    assert encoder.unread(["a red circle", long, "a 象 circle", long]) == [
        f'the text encoder reads 6 of the 42 tokens of "{long[:60]}..."',
        'the text encoder does not know all words of "a 象 circle"',
    ]
    assert encoder.truncated == encoder.unknown == 0  # nothing has been encoded


def test_white_space_and_unicode_form_do_not_matter(encoder):
    decomposed, composed = "caf\u0065\u0301", "caf\u00e9"
    assert encoder.tokenize([f"  {decomposed} \n"]) == encoder.tokenize([composed])
    assert encoder.tokenize(["\t a red circle\n"]) == encoder.tokenize(["a red circle"])


@pytest.mark.parametrize("captions", ["a red circle", [], [None], ["a", 3]])
def test_anything_but_a_list_of_strings_is_refused(encoder, captions):
    with pytest.raises(ValueError, match="captions"):
        encoder.encode(captions)


def test_the_identity_names_everything_that_changes_embeddings(tiny, tmp_path):
    first = T5Encoder(tiny, max_length=64).identity()
    assert set(first) == {"encoder", "revision", "max_length", "tokenizer", "preprocessing"}
    assert all(isinstance(value, str) for value in first.values()) and first["max_length"] == "64"
    moved = Path(shutil.copytree(tiny, tmp_path / "elsewhere" / tiny.name))
    assert encoder_identity(moved, max_length=64) == first
    assert encoder_identity(moved, max_length=65) == first | {"max_length": "65"}
    for file, entry in (("model.safetensors", "revision"), ("tokenizer.json", "tokenizer")):
        with open(moved / file, "ab") as changed:
            changed.write(b" ")
        second = encoder_identity(moved, max_length=64)
        assert {name for name in first if first[name] != second[name]} == {entry}
        shutil.copy(tiny / file, moved / file)


def test_what_is_missing_is_said_in_one_line(tiny, tmp_path, monkeypatch):
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (tmp_path / "empty").mkdir()
    cases = [("./no/such/folder", "no such folder"), (tmp_path / "empty", "no config.json")]
    (broken / "tokenizer.json").unlink()
    cases.append((broken, "no tokenizer"))
    bert = Path(shutil.copytree(tiny, tmp_path / "bert"))
    (bert / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    cases.append((bert, 'type "bert"'))
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            T5Encoder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is a folder"):
        T5Encoder(tiny, revision="main")
    (broken / "spiece.model").write_bytes(b"")
    for module, folder in (("sentencepiece", broken), ("transformers", tiny)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"needs {module}: pip install --editable '\.\[text\]'"):
                T5Encoder(folder)


def test_weights_that_do_not_fill_the_model_are_refused(tiny, tmp_path):
    deeper = Path(shutil.copytree(tiny, tmp_path / "deeper"))
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"are incomplete, missing: encoder.block.2"):
        T5Encoder(deeper)


def test_widths_of_known_encoders_need_no_network(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    widths = dict(t5_small=512, t5_base=768, t5_large=1024, t5_3b=1024, t5_11b=1024) | {
        "small1.1": 512,
        "base1.1": 768,
        "large1.1": 1024,
        "xl1.1": 2048,
        "xxl1.1": 4096,
        "google/t5-v1_1-xxl": 4096,
        "google-t5/t5-base": 768,
        "t5-base": 768,
        tiny: 64,
        str(tiny): 64,
    }
    assert {name: text_width(name) for name in widths} == widths


# ---- imports and the hub, in a fresh process

IN_A_FRESH_PROCESS = """
import json, sys
import fastimagen.text.t5 as text
imported_by_text = [name for name in ("transformers", "sentencepiece", "deepspeed") if name in sys.modules]
encoder = text.T5Encoder("t5_small", max_length=32)
errors = []
for name, revision in (("google/t5-v1_1-small", None), ("t5_small", "v9")):
    try:
        text.T5Encoder(name, revision=revision)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps({
    "imported_by_text": imported_by_text, "kernels": getattr(sys.modules.get("kernels"), "__file__", None),
    "identity": encoder.identity(),
    "without_weights": text.encoder_identity("google-t5/t5-small", max_length=32),
    "errors": errors, "embeds": encoder.encode(["a red circle"]).embeds.tolist()}))
"""


@pytest.fixture(scope="module")
def fresh(tiny, tmp_path_factory) -> dict:
    """Run from the repository root, with a hub cache that holds the tiny encoder as t5_small."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--google-t5--t5-small"
    shutil.copytree(tiny, repository / "snapshots" / ("c0ffee" + 34 * "0"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee" + 34 * "0")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_hub_encoder_is_pinned_to_its_commit(fresh, tiny, encoder):
    local = encoder_identity(tiny, max_length=32)
    assert fresh["identity"] == local | {"encoder": "google-t5/t5-small", "revision": "c0ffee" + 34 * "0"}
    assert fresh["without_weights"] == fresh["identity"]
    assert fresh["embeds"] == encoder.encode(["a red circle"]).embeds.tolist()


def test_an_encoder_that_is_nowhere_says_what_was_tried(fresh):
    unknown, revision = fresh["errors"]
    assert "no such folder" in unknown and "hub gave no google/t5-v1_1-small" in unknown
    assert "\n" not in unknown + revision
    assert 'at revision "v9"' in revision


def test_transformers_does_not_import_our_kernels_folder(fresh):
    assert fresh["kernels"] is None or not Path(fresh["kernels"]).is_relative_to(ROOT)


def test_importing_text_does_not_import_transformers(fresh):
    assert fresh["imported_by_text"] == []


# ---- the built-in encoder


def test_tiny_t5_tells_object_colour_from_background_colour(encoder):
    """Least squares on mean-pooled embeddings, captions held out: a bag of words is right half the time."""
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    encoded = encoder.encode(CAPTIONS, batch_size=256)
    pooled = (encoded.embeds.sum(1) / encoded.lengths[:, None])[order]  # (B, D)
    inputs = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1).double()  # (B, D + 1)
    for column in (1, 4):
        target = torch.tensor([combination[column] for combination in COMBINATIONS])[order]
        weight = torch.linalg.lstsq(inputs[:2400], one_hot(target[:2400], 8).double()).solution  # (D + 1, 8)
        assert ((inputs[2400:] @ weight).argmax(1) == target[2400:]).double().mean() > 0.99


def test_tiny_t5_makes_every_word_one_token_and_spells_the_others(encoder):
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    assert [len(row) for row in encoder.tokenize(words)] == [2] * len(words)
    ids = encoder.tokenize(["a Reddish circle, large"])[0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == [
        "▁a",
        "▁",
        "R",
        "e",
        "d",
        "d",
        "i",
        "s",
        "h",
        "▁circle",
        ",",
        "▁large",
        "</s>",
    ]


def test_tiny_t5_is_reproducible_and_leaves_the_random_state_alone(tiny, tmp_path):
    before = torch.get_rng_state()
    again = build_tiny_t5(tmp_path / "tiny", CAPTIONS)
    other = build_tiny_t5(tmp_path / "other", CAPTIONS[:200], dim=32, layers=1, seed=1, vocab_size=120)
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder_identity(again) == encoder_identity(tiny)
    assert text_width(other) == 32 and len(T5Encoder(other).tokenizer) <= 120
    assert "never trained" in (other / "README.md").read_text()


def test_tiny_t5_refuses_what_it_cannot_build_and_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    for arguments, message in (
        ({"captions": ["", " "]}, "no captions"),
        ({"dim": 12}, "multiple of 8"),
        ({"vocab_size": 50}, "too small"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tiny_t5(**{"folder": tmp_path / "new", "captions": CAPTIONS[:9]} | arguments)
    with pytest.raises(ValueError, match="is not empty"):
        build_tiny_t5(tiny, CAPTIONS)
    monkeypatch.setattr("fastimagen.text.tiny_t5.TINY_README", "{no_such_value}")
    with pytest.raises(KeyError):
        build_tiny_t5(tmp_path / "new", CAPTIONS[:9])
    assert list(tmp_path.iterdir()) == []
