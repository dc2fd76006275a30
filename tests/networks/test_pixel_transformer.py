"""The pixel transformer: its contract as a network, its positions, and how it reads text and the low-res image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fastimagen.network_config import PixelTransformerConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.parameters import muon_parameters
from fastimagen.networks.pixel_transformer import PixelTransformer
from fastimagen.networks.rotary import rotate, rotation
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import TOY_TRANSFORMER
from tests.networks.test_unet import LENGTHS, TIME, B, captions, inputs, padded

# Each optional part of the network is in at least one of these.
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-attention": dict(positional_encoding=True, cond_dim=16, time_dim=24),
    "tokens": dict(text_reading="tokens", text_from=1, bottleneck=8, hidden=40),
    "lowres": dict(lowres=True, text_from=1, depth=3),
    "lowres tokens": dict(lowres=True, text_reading="tokens"),
    "without text": dict(text_dim=None, channels=1),
}
WITH_TEXT = [name for name in VARIANTS if name != "without text"]


def network(seed: int = 0, **changes: Any) -> PixelTransformer:
    """A toy transformer with an output other than zero: all parameters are random."""
    torch.manual_seed(seed)
    model = build_network(PixelTransformerConfig(**{**TOY_TRANSFORMER, **changes}))
    assert isinstance(model, PixelTransformer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---- text


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_padding_of_the_batch_does_not_change_the_output(name: str) -> None:
    model, text = network(**VARIANTS[name]).double(), captions(dtype=torch.float64)
    given = inputs(model, torch.float64)
    exact = model(**given, text=text)
    for filler in (1e3, math.nan):
        torch.testing.assert_close(model(**given, text=padded(text, 9, filler)), exact, rtol=0, atol=1e-12)
    one = {key: value[1:2] for key, value in given.items()}
    alone = model(**one, text=TextEmbeddings.from_list([text.unpadded()[1]]))
    torch.testing.assert_close(alone, exact[1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_a_dropped_caption_is_null_text_whatever_it_said(name: str) -> None:
    model = network(**VARIANTS[name]).double()
    given, keep = inputs(model, torch.float64), torch.tensor([True, False, False])
    text, other = (captions(lengths, seed, torch.float64) for lengths, seed in ((LENGTHS, 1), (LENGTHS + 2, 7)))
    kept, dropped = model(**given, text=text), model(**given, text=other, keep_text=torch.zeros(B, dtype=torch.bool))
    mixed = model(**given, text=text, keep_text=keep)
    torch.testing.assert_close(mixed, torch.where(keep[:, None, None, None], kept, dropped), rtol=0, atol=1e-12)
    assert (kept - dropped).abs().amax((1, 2, 3)).min() > 1e-3
    assert not torch.allclose(model(**given), dropped)  # no text at all is something else


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_encoding_text_in_advance_gives_the_same_bits(name: str) -> None:
    model, keep = network(**VARIANTS[name]), torch.tensor([True, False, True])
    state = model.encode_text(captions(), keep)
    assert torch.equal(model(**inputs(model), text=state), model(**inputs(model), text=captions(), keep_text=keep))


@torch.inference_mode()
def test_blocks_before_text_from_read_no_text() -> None:
    """Pooled text moves every block; the tokens themselves reach only blocks from text_from on."""
    for name in ("tokens", "lowres"):
        model = network(**VARIANTS[name])
        outputs: list[Tensor] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, output: outputs.append(output[:, -16:]))
        state = model.encode_text(captions())
        changed = type(state)(
            state.vector,
            state.lengths,
            tuple((k + 1, v + 1) for k, v in state.kv),
            None if state.tokens is None else state.tokens.flip(-1),
        )
        model(**inputs(model), text=state)
        model(**inputs(model), text=changed)
        first, second = outputs[: len(model.blocks)], outputs[len(model.blocks) :]
        assert [torch.equal(a, b) for a, b in zip(first, second)] == [True] + [False] * (len(model.blocks) - 1)


# ---- positions


def test_scores_depend_on_the_distance_of_patches_alone_and_not_on_the_size_of_the_image() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(height: int, width: int, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
        turn = rotation(height, width, 16, 4, q.device).double().unflatten(0, (height, width))
        at_first, at_second = (turn[row, column][None] for row, column in (first, second))
        return (rotate(q, at_first) * rotate(k, at_second)).sum()

    exact = score(4, 4, (1, 0), (2, 3))
    for larger in (score(4, 4, (0, 0), (1, 3)), score(9, 7, (5, 3), (6, 6)), score(16, 16, (12, 8), (13, 11))):
        torch.testing.assert_close(larger, exact, rtol=0, atol=1e-5)
    assert (score(4, 4, (0, 0), (3, 1)) - exact).abs() > 0.1  # rows and columns differ
    assert (score(4, 4, (2, 3), (1, 0)) - exact).abs() > 0.1  # and so do directions


def test_rotation_in_one_pass_is_the_formula_and_turns_by_the_angle() -> None:
    x, turn = torch.randn(2, 6, 3, 16), rotation(2, 3, 16, 8, torch.device("cpu"))
    torch.testing.assert_close(rotate(x, turn), rotate(x.double(), turn.double()).float())
    assert torch.equal(rotate(x, turn)[:, 0], x[:, 0])  # the first patch is the origin
    ones = torch.ones(1, 6, 1, 16, dtype=torch.float64)
    angle = math.pi / 8  # the slowest frequency, one column further
    torch.testing.assert_close(
        rotate(ones, turn.double())[0, 1, 0, -2:],
        torch.tensor([math.cos(angle) - math.sin(angle), math.cos(angle) + math.sin(angle)], dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


@torch.inference_mode()
def test_any_multiples_of_the_patch_run_and_rows_are_told_from_columns() -> None:
    model = network(**VARIANTS["tokens"])
    for height, width in ((8, 24), (32, 4)):
        x = torch.randn(B, 3, height, width)
        assert model(x, TIME, text=captions()).shape == x.shape
    model = network(text_dim=None)
    beside = torch.randn(1, 3, 4, 16)
    below = rearrange(beside, "b c h (n w) -> b c (n h) w", n=4)
    outputs = model(beside, TIME[:1]), model(below, TIME[:1])
    assert not torch.allclose(rearrange(outputs[0], "b c h (n w) -> b c (n h) w", n=4), outputs[1])


# ---- images


@torch.inference_mode()
def test_a_patch_is_cut_out_and_put_back_in_place() -> None:
    model = network(text_dim=None, dim=48, heads=3)
    model.patch_embedding = torch.nn.Identity()
    model.to_patch.weight.copy_(torch.eye(48))
    model.to_patch.bias.zero_()
    model.blocks = torch.nn.ModuleList()
    model.embedding_to_film.weight.zero_()
    model.embedding_to_film.bias.zero_()
    x = torch.randn(1, 3, 8, 12)
    out = model(x, TIME[:1])
    for top, left in ((0, 0), (4, 8)):
        patch = x[..., top : top + 4, left : left + 4]
        expected = F.layer_norm(patch, patch.shape[1:])
        torch.testing.assert_close(out[..., top : top + 4, left : left + 4], expected)


@torch.inference_mode()
def test_output_depends_on_the_lowres_image_and_its_time() -> None:
    model = network(**VARIANTS["lowres"])
    given = inputs(model)
    out = model(**given, text=captions())
    for name in ("lowres", "lowres_time"):
        assert not torch.allclose(model(**{**given, name: given[name] + 1}, text=captions()), out)


# ---- training


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_the_gradient_of_float64(name: str) -> None:
    model = network(**VARIANTS[name])
    exact = network(**VARIANTS[name]).double()
    keep = torch.tensor([True, False, True])
    for net, dtype in ((model, torch.float32), (exact, torch.float64)):
        text = {} if net.config.text_dim is None else {"text": captions(dtype=dtype), "keep_text": keep}
        given = {key: value.to(dtype) if key != "time" else value for key, value in inputs(model).items()}
        out = net(**given, text=text.get("text"), keep_text=text.get("keep_text"))
        out.square().sum().backward()
    for (parameter_name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.any(), parameter_name
        error = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert error < 2e-4, f"{parameter_name}: {error}"


def test_zero_init_outputs_zero_and_trains_all_parameters() -> None:
    model = build_network(
        PixelTransformerConfig(**{**TOY_TRANSFORMER, **VARIANTS["cross-attention"], "zero_init": True})
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given, keep = inputs(model), torch.tensor([True, False, True])
    assert not model(**given, text=captions()).any()
    for _ in range(4):  # each step trains one more of the zero layers in a row
        optimizer.zero_grad()
        F.mse_loss(model(**given, text=captions(), keep_text=keep), given["x"]).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_x0_is_recovered_from_noise_and_caption() -> None:
    """A network that predicts x0 learns one image for each of two captions, whatever noise it sees."""
    model = build_network(PixelTransformerConfig(**{**TOY_TRANSFORMER, "zero_init": True, "positional_encoding": True}))
    torch.manual_seed(0)
    images, text = torch.rand(2, 3, 8, 8) * 2 - 1, captions(torch.tensor([3, 5]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(torch.randn(2, 3, 8, 8), torch.full((2,), 900.0), text=text), images)
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * images.square().mean()


@pytest.mark.parametrize("name", ["cross-attention", "lowres tokens"])
def test_activation_checkpointing_keeps_gradients_and_is_off_in_eval_mode(name: str) -> None:
    gradients, runs = {}, {}
    for blocks in ((), (1,), (0, 1)):
        model = network(**VARIANTS[name], checkpoint_levels=blocks).train()
        runs[blocks] = [0, 0]
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(
                lambda module, args, index=index: runs[blocks].__setitem__(index, runs[blocks][index] + 1)
            )
        model(**inputs(model), text=captions()).square().mean().backward()
        gradients[blocks] = [p.grad for p in model.parameters()]
    assert runs == {(): [1, 1], (1,): [1, 2], (0, 1): [2, 2]}
    for blocks in ((1,), (0, 1)):
        assert all(torch.equal(a, b) for a, b in zip(gradients[blocks], gradients[()], strict=True))
    model.eval()(**inputs(model), text=captions()).sum().backward()
    assert runs[(0, 1)] == [3, 3]


def test_muon_updates_the_matrices_on_tokens_only() -> None:
    for changes in VARIANTS.values():
        model = network(**changes)
        muon = muon_parameters(model)
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
        expected_out = ("time_embedding.", "embedding_to_film.", "pooled_embedding.", "null_vector", "pool.query")
        assert muon == {name for name in matrices if not any(part in name for part in expected_out)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3), "channels per head, must be a multiple of 8"),
        (dict(checkpoint_levels=(2,)), "blocks from 0 to 1"),
        (dict(text_from=2), "leaves no block of 2"),
        (dict(text_reading="tokens", cond_dim=16), '"cond_dim" is only for'),
        (dict(text_dim=None, text_from=1), '"text_from" needs text_dim'),
    ],
)
def test_contradictions_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelTransformerConfig(**{**TOY_TRANSFORMER, **changes})


def test_inputs_that_do_not_fit_are_errors() -> None:
    model = network()
    with pytest.raises(ValueError, match="multiples of 4"):
        model(torch.zeros(1, 3, 8, 10), TIME[:1])
    with pytest.raises(ValueError, match="64"):
        model(torch.zeros(1, 3, 8, 8), TIME[:1], text=TextEmbeddings.from_list([torch.zeros(2, 5)]))
