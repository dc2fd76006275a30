"""T5 encoders: embeddings, tokens, identity, errors, and encoders on the hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastimagen.text.t5 import T5Encoder, encoder_identity, is_path, text_width
from fastimagen.text.tiny_t5 import build_tiny_t5
from tests.conftest import ROOT
from tests.text.conftest import CAPTIONS

FEW = ["a red circle", "", "a small blue square at the top left of a white background", "circle red", "star"]


def test_a_batch_equals_transformers_one_caption_at_a_time(tiny, encoder):
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


def test_loading_and_writing_an_encoder_draw_no_bars_into_a_log(tiny, tmp_path, capsys):
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()  # as in a process without the command line's settings
    capsys.readouterr()
    try:
        T5Encoder(tiny)
        build_tiny_t5(tmp_path / "encoder", FEW)
        assert capsys.readouterr().err == "" and bars.is_progress_bar_enabled()
    finally:
        if not shown:
            bars.disable_progress_bar()


def test_embeddings_can_be_trained_on(encoder):
    layer = torch.nn.Linear(64, 2)
    layer(encoder.encode(FEW).embeds).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_bfloat16_is_close_to_float32_and_float16_is_refused(tiny, encoder):
    half = T5Encoder(tiny, dtype=torch.bfloat16).encode(FEW)
    assert half.embeds.dtype == torch.bfloat16
    exact = encoder.encode(FEW).embeds
    assert (half.embeds.float() - exact).norm() / exact.norm() < 0.05
    with pytest.raises(ValueError, match="overflows"):
        T5Encoder(tiny, dtype=torch.float16)


def test_truncated_captions_are_counted_and_the_first_is_logged(tiny, caplog):
    encoder = T5Encoder(tiny, max_length=6)
    with caplog.at_level(logging.WARNING):
        encoded = encoder.encode(["a red circle", CAPTIONS[0], "a red circle of white", CAPTIONS[1]])
    assert encoded.lengths.tolist() == [4, 6, 6, 6]
    assert encoder.truncated == 2
    assert len(caplog.records) == 1
    assert f'caption truncated from 12 to 6 tokens: "{CAPTIONS[0]}"' in caplog.text
    eos = encoder.tokens.tokenizer.eos_token_id
    assert [row[-1] for row in encoder.tokens.rows(CAPTIONS[:2])] == [eos, eos]
    with pytest.raises(ValueError, match="at least 2"):
        T5Encoder(tiny, max_length=1)


@pytest.mark.parametrize("caption", ["</s>", "a red</s> circle", "<pad> circle", "a </s></s><pad>", "</s"])
def test_a_caption_cannot_inject_special_tokens(encoder, caption):
    row = encoder.tokens.rows([caption])[0]
    assert row[-1] == 1 and not {0, 1} & set(row[:-1])


def test_captions_with_unknown_tokens_are_counted_and_the_first_is_logged(tiny, caplog):
    encoder = T5Encoder(tiny)
    encoder.encode(["a Zebra, 7 years old!", "a red circle"])
    assert encoder.unknown == 0 and not caplog.records
    encoder.encode(["a red circle", "a 象 circle", "象"])
    assert encoder.unknown == 2 and len(caplog.records) == 1 and "a 象 circle" in caplog.text


def test_each_truncated_caption_and_each_with_unknown_tokens_has_a_warning(tiny):
    encoder = T5Encoder(tiny, max_length=6)
    long = "a " * 40 + "circle"
    assert encoder.caption_warnings(["a red circle", long, "a 象 circle", long]) == [
        f'caption truncated from 42 to 6 tokens: "{long[:60]}..."',
        'caption with unknown tokens: "a 象 circle"',
    ]
    assert encoder.truncated == encoder.unknown == 0  # nothing has been encoded


def test_captions_are_stripped_and_normalized_to_nfc(encoder):
    decomposed, composed = "caf\u0065\u0301", "caf\u00e9"
    assert encoder.tokens.rows([f"  {decomposed} \n"]) == encoder.tokens.rows([composed])
    assert encoder.tokens.rows(["\t a red circle\n"]) == encoder.tokens.rows(["a red circle"])


@pytest.mark.parametrize("captions", ["a red circle", [], [None], ["a", 3]])
def test_anything_but_a_list_of_strings_is_refused(encoder, captions):
    with pytest.raises(ValueError, match="captions"):
        encoder.encode(captions)


def test_the_identity_changes_with_everything_that_changes_embeddings(tiny, tmp_path):
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


def test_a_missing_file_or_package_is_a_one_line_error(tiny, tmp_path, monkeypatch):
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (tmp_path / "empty").mkdir()
    cases = [("./no/such/folder", "no such folder"), (tmp_path / "empty", "no config.json")]
    (broken / "tokenizer.json").unlink()
    cases.append((broken, "no tokenizer"))
    resnet = Path(shutil.copytree(tiny, tmp_path / "resnet"))
    (resnet / "config.json").write_text('{"model_type": "resnet", "hidden_sizes": [64]}')
    shutil.copy(tiny / "tokenizer.json", resnet)
    cases.append((resnet, 'type "resnet"'))
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


def test_folders_and_names_on_the_hub_are_told_apart(tiny):
    assert all(map(is_path, (tiny, str(tiny), "./t5", "../t5", "/t5", "~/t5", "data/shapes/text_encoder")))
    assert not any(map(is_path, ("t5_small", "xxl1.1", "google/t5-v1_1-small")))


def test_incomplete_weights_are_refused(tiny, tmp_path):
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


# ---- imports and the hub, in a new process

IN_A_NEW_PROCESS = """
import json, sys
import fastimagen.text.t5 as text
imported_with_text = [name for name in ("transformers", "sentencepiece", "deepspeed") if name in sys.modules]
encoder = text.T5Encoder("t5_small", max_length=32)
errors = []
for name, revision in (("google/t5-v1_1-small", None), ("t5_small", "v9")):
    try:
        text.T5Encoder(name, revision=revision)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps({
    "imported_with_text": imported_with_text, "kernels": getattr(sys.modules.get("kernels"), "__file__", None),
    "identity": encoder.identity(),
    "without_weights": text.encoder_identity("google-t5/t5-small", max_length=32),
    "errors": errors, "embeds": encoder.encode(["a red circle"]).embeds.tolist()}))
"""


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory) -> dict:
    """Run from the repository root, with a hub cache that holds the tiny encoder as t5_small."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--google-t5--t5-small"
    shutil.copytree(tiny, repository / "snapshots" / ("c0ffee" + 34 * "0"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee" + 34 * "0")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_hub_encoder_is_pinned_to_its_commit(report, tiny, encoder):
    local = encoder_identity(tiny, max_length=32)
    assert report["identity"] == local | {"encoder": "google-t5/t5-small", "revision": "c0ffee" + 34 * "0"}
    assert report["without_weights"] == report["identity"]
    assert report["embeds"] == encoder.encode(["a red circle"]).embeds.tolist()


def test_an_encoder_that_is_not_found_names_folder_and_hub(report):
    unknown, revision = report["errors"]
    assert "there is no such folder" in unknown
    assert "google/t5-v1_1-small cannot be read from the Hugging Face hub" in unknown
    assert "run `hf download google/t5-v1_1-small`" in unknown and "HF_HUB_OFFLINE=1" in unknown
    assert "\n" not in unknown + revision
    assert 'at revision "v9"' in revision


def test_transformers_does_not_import_the_kernels_folder_of_the_repository(report):
    assert report["kernels"] is None or not Path(report["kernels"]).is_relative_to(ROOT)


def test_importing_text_does_not_import_transformers(report):
    assert report["imported_with_text"] == []
