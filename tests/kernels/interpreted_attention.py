"""The kernels of attention in Triton's interpreter, against float64. test_attention.py runs this file."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastimagen import ops
from fastimagen_kernels import attention as kernels
from fastimagen_kernels import attention_tiles
from tests.kernels.attention_cases import Case, assert_close, errors, exact, make, results
from tests.kernels.interpreting import guarded

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]

TEXT = Case(queries=9, heads=4, width=24, keys=9, context=20, lengths=(20, 3))
CASES = [
    TEXT,
    Case(queries=40, heads=4, width=16, keys=37, context=33, lengths=(0, 32)),
    Case(queries=33, heads=3, width=40, keys=16, key_heads=3, null="heads", context=5, lengths=(5, 0)),
    Case(queries=17, heads=2, width=64, context=21, lengths=(21, 7), null=""),  # cross-attention, text alone
    Case(queries=16, heads=2, width=64, keys=4, key_heads=2, context=18),  # cross-attention, all text counts
    Case(queries=1, heads=3, width=32, key_heads=3, context=35, lengths=(35, 1), null=""),  # attention pooling
    Case(queries=20, heads=8, width=72, keys=20, batch=1),
    Case(queries=7, heads=1, width=128, keys=50, null="", batch=1),
    Case(queries=5, heads=2, width=48),  # the null key alone
    Case(queries=3, heads=2, width=56, keys=1, key_heads=2, null="shared", context=1, lengths=(1, 0)),
]


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    with guarded(kernels):
        yield


@pytest.fixture(autouse=True)
def plans_of_one_test() -> Iterator[None]:
    """Tests change what plans are made of."""
    yield
    kernels.PLANS.clear()


@pytest.fixture
def unguarded(guard: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guarded tensor has margins, which a fake one has not."""
    monkeypatch.setattr(kernels, "torch", torch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_SPLIT_TILES", 1)
    tensors = make(case)
    assert_close(results(ops.attention, tensors), exact(tensors))


@pytest.mark.parametrize("programs", [0, 12], ids=["no splits", "splits of several tiles"])
def test_result_does_not_depend_on_the_row_splits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_SPLIT_TILES", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    tensors = make(Case(queries=25, heads=4, width=24, keys=5, context=18, lengths=(17,), batch=1))
    assert_close(results(ops.attention, tensors), exact(tensors))


@pytest.mark.parametrize("programs", [0, 12], ids=["no splits", "splits of several tiles"])
def test_gradients_of_keys_and_values_are_joined_without_a_copy(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_SPLIT_TILES", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    tensors = make(Case(queries=25, heads=4, width=24, keys=5, context=18, lengths=(17,), batch=1))
    true = exact(tensors)
    pairs = [("k", "v"), ("null_k", "null_v"), ("context_k", "context_v")]
    joined = [torch.cat([tensors[k], tensors[v]], dim=-1).requires_grad_() for k, v in pairs]
    keys = {name: half for pair, both in zip(pairs, joined) for name, half in zip(pair, ops.halves(both, dim=-1))}
    out = ops.attention(tensors["q"], context_lengths=tensors["context_lengths"], **keys)
    monkeypatch.setattr(torch, "cat", lambda *unused: pytest.fail("a copy"))
    for pair, grad in zip(pairs, torch.autograd.grad(out, joined, tensors["dout"])):
        names = [f"d{name}" for name in pair]
        assert_close(dict(zip(names, grad.chunk(2, dim=-1))), {name: true[name] for name in names})


@pytest.mark.parametrize("short", [0, 1024], ids=["many rows", "few rows"])
def test_sm_90_tiles_err_at_most_twice_as_much_as_pytorch(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(attention_tiles, "FEW_ROWS", short)
    tensors = make(Case(queries=33, heads=8, width=64, keys=140, context=77, lengths=(70,), batch=1), torch.float16)
    ours, theirs = both_errors(tensors)
    assert all(ours[name] <= 2 * theirs[name] for name in ours), (ours, theirs)


def test_scale_and_qk_normalization() -> None:
    tensors = make(TEXT)
    assert_close(results(ops.attention, tensors, scale=0.7), exact(tensors, scale=0.7))
    scales = torch.rand(2, TEXT.width) + 0.5
    normalise = {"qk_scales": tuple(scales), "scale": 8.0}
    got = results(ops.attention, tensors, **normalise)
    ops.set_backend("torch")
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    assert_close(got, results(ops.attention, doubles, qk_scales=tuple(scales.double()), scale=8.0))


def test_mixed_key_heads_and_dtypes() -> None:
    """One image key head and a text key head each; null in fp32 beside half-precision queries."""
    tensors = make(Case(queries=12, heads=2, width=16, keys=12, key_heads=1, context=9, lengths=(4, 9)))
    tensors |= {name: torch.cat([tensors[name], -tensors[name]], dim=2) for name in ("context_k", "context_v")}
    assert_close(results(ops.attention, tensors), exact(tensors))
    mixed = {name: x.half() if x.dim() == 4 else x for name, x in tensors.items()}
    got = results(ops.attention, mixed)
    assert got["dnull_k"].dtype == torch.float32 and got["out"].dtype == torch.float16
    assert_close(got, exact(mixed), 2e-3)


def both_errors(tensors: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Ours, and those of plain PyTorch in the same dtype."""
    true = exact(tensors)
    got = results(ops.attention, tensors)
    ops.set_backend("torch")
    theirs = results(ops.attention, tensors)
    assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in theirs.items()}
    return errors(got, true), errors(theirs, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    ours, theirs = both_errors(make(Case(queries=24, heads=4, width=24, keys=24, context=20, lengths=(20, 3)), dtype))
    assert all(ours[name] <= 2 * theirs[name] for name in ours), (ours, theirs)


def test_query_without_any_key_gives_zeros() -> None:
    tensors = make(Case(queries=9, heads=2, width=16, key_heads=2, null="", context=6, lengths=(0, 4)))
    got = results(ops.attention, tensors)
    assert_close(got, exact(tensors))
    assert all((got[name][0] == 0).all() for name in ("out", "dq", "dcontext_k", "dcontext_v"))


def test_padded_text_tokens_are_never_read() -> None:
    tensors = make(Case(queries=9, heads=4, width=24, keys=9, context=40, lengths=(33, 0)))
    true = exact(tensors)
    for name in ("context_k", "context_v"):
        tensors[name][0, 33:] = tensors[name][1] = math.nan
    got = results(ops.attention, tensors)
    assert_close(got, true)
    assert all((got[name][0, 33:] == 0).all() and (got[name][1] == 0).all() for name in ("dcontext_k", "dcontext_v"))


def test_logits_far_below_zero_stay_accurate() -> None:
    """What a masked key would have scored, 0, is then far above all that count: lse is near -1500."""
    tensors = make(Case(queries=24, heads=2, width=16, keys=21, null="", context=20, lengths=(19, 2)))
    tensors["q"] += 16
    for name in ("k", "context_k"):
        tensors[name] -= 16
    assert results(ops.attention, tensors)["out"].isfinite().all()
    # fp32 rounds logits of 1000 at 6e-5, and every probability with them.
    assert_close(results(ops.attention, tensors), exact(tensors), 2e-4)


def test_result_is_bitwise_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_SPLIT_TILES", 1)
    tensors = make(TEXT._replace(queries=40))
    first, *others = (results(ops.attention, tensors) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_inputs_and_output_gradients_may_have_any_strides() -> None:
    tensors = make(Case(queries=10, heads=2, width=24, keys=10, key_heads=2, null="heads", context=6, lengths=(6, 2)))
    true = exact(tensors)

    def as_stored(name: str, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        if name in ("q", "dout"):
            return x.transpose(1, 2).contiguous().transpose(1, 2)  # heads outside
        if name in ("k", "v"):
            return torch.stack([x, x], dim=2)[:, :, 0]  # one of a fused projection's outputs
        return torch.cat([x, x[..., :3]], dim=-1)[..., :24]  # strides of 27, no multiple of 8

    assert_close(results(ops.attention, {name: as_stored(name, x) for name, x in tensors.items()}), true)
    channels_outside = {
        name: x.transpose(1, -1).contiguous().transpose(1, -1) if x.dim() == 4 else x for name, x in tensors.items()
    }
    assert_close(results(ops.attention, channels_outside), true)
    expanded = tensors | {"q": tensors["q"][:1].expand(2, -1, -1, -1), "dout": torch.ones(()).expand_as(tensors["q"])}
    assert_close(results(ops.attention, expanded), exact(expanded))


@pytest.mark.usefixtures("unguarded")
def test_offsets_of_2_to_the_31_elements() -> None:
    """The third sample lies 2^31 elements behind the first; untouched pages of the buffer take no memory."""
    tensors = make(Case(queries=6, heads=2, width=16, keys=6, context=5, lengths=(5, 0, 3), batch=3))
    far = {}
    for name, x in tensors.items():
        far[name] = x
        if x.dim() == 4:
            try:
                buffer = torch.empty(2**31 + x[0].numel(), dtype=torch.float16)
            except RuntimeError as error:
                pytest.skip(f"no 4 GiB of address space: {error}")
            far[name] = buffer.as_strided(x.shape, (2**30, *x.stride()[1:]))
            far[name].copy_(x)
    assert_close(results(ops.attention, far), exact(far), 2e-3)


def test_only_inputs_output_and_lse_are_saved_for_backward() -> None:
    tensors = make(TEXT)
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in tensors.items() if name != "dout"}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = ops.attention(**leaves)
    own = [x for x in kept if all(x.data_ptr() != leaf.data_ptr() for leaf in (*leaves.values(), out))]
    assert [tuple(x.shape) for x in own] == [(2, 1, 36)]


@pytest.mark.usefixtures("unguarded")
def test_operator_passes_opcheck() -> None:
    tensors = make(Case(queries=3, heads=2, width=16, keys=3, context=4, lengths=(4, 0)))
    names = ("q", "k", "v", "null_k", "null_v", "context_k", "context_v")
    leaves = [tensors[name].requires_grad_() for name in names]
    torch.library.opcheck(torch.ops.fastimagen.attention, (*leaves, tensors["context_lengths"], 0.25))


@pytest.mark.usefixtures("unguarded")
def test_compiles_into_one_graph() -> None:
    tensors = make(Case(queries=6, heads=2, width=16, keys=6, context=5, lengths=(5, 2)))

    def network(q: Tensor, **keys: Tensor) -> Tensor:
        return ops.attention(q * 1.5, **keys) + 1

    torch._dynamo.reset()
    compiled = results(torch.compile(network, fullgraph=True, backend="aot_eager"), tensors)
    assert_close(compiled, results(network, tensors), 1e-6)


def test_autocast_gives_bf16_output_and_fp32_gradients() -> None:
    tensors = make(Case(queries=6, heads=2, width=16, keys=6, context=5, lengths=(5, 2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(ops.attention, tensors)
    assert got["out"].dtype == torch.bfloat16 and got["dq"].dtype == got["dnull_k"].dtype == torch.float32
    assert_close(got, exact(tensors), 2e-2)


@pytest.mark.usefixtures("unguarded")
def test_unet_gives_the_output_and_gradients_of_the_torch_backend() -> None:
    from fastimagen.network_config import UNetConfig
    from fastimagen.networks.unet import UNet
    from fastimagen.text.embeddings import TextEmbeddings
    from tests.conftest import TOY_UNET

    torch.manual_seed(0)
    unet = UNet(UNetConfig(**TOY_UNET, zero_init=False))
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([500])
    text = TextEmbeddings(torch.randn(1, 5, 64), torch.arange(5)[None] < 3)
    outcomes = {}
    for backend in ("triton", "torch"):
        ops.set_backend(backend)
        unet.zero_grad()
        out = unet(x, time, text=text)
        out.square().mean().backward()
        outcomes[backend] = {"out": out.detach()} | {
            name: p.grad for name, p in unet.named_parameters() if p.grad is not None
        }
    assert_close(outcomes["triton"], {name: t.double() for name, t in outcomes["torch"].items()}, 1e-5)
