"""TextEmbeddings: shapes and masks, padding, indexing, files."""

from __future__ import annotations

import pytest
import torch

from fastimagen.text.embeddings import PackedEmbeddings, TextEmbeddings


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
def test_wrong_shapes_and_masks_are_refused(embeds, mask, message):
    with pytest.raises(ValueError, match=message):
        TextEmbeddings(embeds, mask)


def test_unpadded_reverses_from_list():
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


def test_embeddings_are_concatenated_indexed_and_converted():
    short, long = (TextEmbeddings.from_list([torch.randn(n, 4) for n in lengths]) for lengths in ((2, 1), (5, 3, 4)))
    joined = TextEmbeddings.cat([short, long])
    assert joined.embeds.shape == (5, 5, 4) and joined.lengths.tolist() == [2, 1, 5, 3, 4]
    assert torch.equal(joined.embeds[1, :1], short.embeds[1, :1])
    with pytest.raises(ValueError, match=r"torch.bfloat16 of width 4, torch.float32 of width 4"):
        TextEmbeddings.cat([short, long.to(dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="got none"):
        TextEmbeddings.cat([])
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
def test_saved_embeddings_load_bit_for_bit_and_are_stored_without_padding(tmp_path, dtype):
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


def test_loading_another_file_is_a_one_line_error_that_names_it(tmp_path, tiny):
    (tmp_path / "half").write_bytes((tiny / "model.safetensors").read_bytes()[:-9])
    for path, message in (
        (tmp_path / "none", "cannot read"),
        (tmp_path / "half", "cannot read"),
        (tiny / "model.safetensors", "was not written by TextEmbeddings.save"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TextEmbeddings.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_packed_captions_are_those_of_from_list_padded_where_they_are_needed():
    rows = [torch.randn(length, 8).bfloat16() for length in (3, 1, 70, 70, 2)]
    packed, padded = PackedEmbeddings.from_list(rows), TextEmbeddings.from_list(rows)
    assert len(packed) == 5 and packed.tokens.shape == (146, 8)
    for max_length, expected in ((None, padded), (256, padded.padded(256)), (100, padded.padded(100))):
        found = packed.unpacked(torch.device("cpu"), max_length)
        assert torch.equal(found.embeds, expected.embeds) and torch.equal(found.mask, expected.mask)
