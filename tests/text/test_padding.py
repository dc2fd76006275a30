"""Padding of text to few lengths: a compiled network has a graph for each of them, and results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagen.cascade import Stage
from fastimagen.config import CompileMode
from fastimagen.data.batch import Batch
from fastimagen.network_config import UNetConfig
from fastimagen.networks.unet import UNet
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import LENGTH_MULTIPLE, PackedEmbeddings, TextEmbeddings
from tests.conftest import TOY_UNET, toy_cascade, write_toy_model

META, CPU = torch.device("meta"), torch.device("cpu")
WIDTH = 64
SMALL_UNET = {**TOY_UNET, "dim_mults": [1], "num_blocks": 0, "self_attention": False, "cross_attention": True}


def captions(*lengths: int) -> TextEmbeddings:
    generator = torch.Generator().manual_seed(sum(lengths))
    return TextEmbeddings.from_list([torch.randn(length, WIDTH, generator=generator) for length in lengths])


def batch(text: TextEmbeddings) -> Batch:
    count = len(text)
    packed = PackedEmbeddings.from_list(text.unpadded())
    return Batch(torch.zeros(count, 3, 8, 8), packed, torch.arange(count), [str(index) for index in range(count)])


# ---- lengths


@pytest.mark.parametrize(
    ("length", "max_length", "expected"),
    [(1, 256, 64), (64, 256, 64), (65, 256, 128), (200, 256, 256), (5, 32, 32), (65, 100, 100), (300, 256, 300)],
)
def test_text_is_padded_to_the_next_multiple_but_not_beyond_the_limit(
    length: int, max_length: int, expected: int
) -> None:
    text = captions(length, 1)
    padded = text.padded(max_length)
    assert padded.embeds.shape == (2, expected, WIDTH) and padded.lengths.tolist() == [length, 1]
    assert all(torch.equal(a, b) for a, b in zip(padded.unpadded(), text.unpadded()))


def test_an_accelerator_sees_few_lengths_and_a_cpu_no_padding() -> None:
    unet = UNetConfig(**TOY_UNET)
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(200):
        lengths = torch.randint(1, unet.max_text_length + 1, (3,), generator=generator)
        ragged = batch(captions(*(int(length * length / unet.max_text_length) + 1 for length in lengths - 1)))
        assert ragged.text is not None
        on_cpu, elsewhere = ragged.text_for(unet, CPU), ragged.text_for(unet, META)
        assert on_cpu is not None and elsewhere is not None
        assert on_cpu.embeds.shape == ragged.text.embeds.shape
        seen.add(elsewhere.embeds.shape[1])
    assert seen == {64, 128, 192, 256} and unet.max_text_length // LENGTH_MULTIPLE == 4


# ---- results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_pooling": "mean"},
        {"text_in_self_attention": True, "cross_attention": False, "qk_norm": True},
        {"text_padding": "null", "text_pooling": "mean", "max_text_length": 64},
    ],
    ids=str,
)
def test_padding_changes_neither_loss_nor_gradients(changes: dict[str, Any]) -> None:
    config = toy_cascade(unet={**TOY_UNET, "zero_init": False, **changes}).stages[0]
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"caption_dropout": 0.5})})
    torch.manual_seed(0)
    unet = UNet(config.unet).double()
    images, text = torch.randn(4, 3, 8, 8, dtype=torch.float64).clamp(-1, 1), captions(5, 1, 12, 3)
    found: list[list[Tensor]] = []
    for given in (text, text.padded(config.unet.max_text_length)):
        unet.zero_grad()
        stage = Stage(config)
        loss = stage.training_loss(unet, images, given, stage.draw(1, range(4), images))
        loss.sum().backward()
        found.append([loss.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)])
    tight, padded = found
    assert len(tight) == len(padded) > 50
    for expected, values in zip(tight, padded):
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)


# ---- graphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that `nn.Module.compile` makes, one for each shape, as CUDA graphs are."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile(self, backend=backend, dynamic=False))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.slow
def test_training_compiles_one_graph_for_short_captions(graphs: list[torch.fx.GraphModule]) -> None:
    config = toy_cascade(unet=SMALL_UNET).stages[0]
    stage, unet, images = Stage(config), UNet(config.unet), torch.zeros(2, 3, 8, 8)
    unet.compile()
    for lengths in ((5, 2), (9, 64), (12, 1), (63, 63)):
        text = captions(*lengths).padded(config.unet.max_text_length)
        stage.training_loss(unet, images, text, stage.draw(0, range(2), images)).sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("compile", [None, "default"])
def test_sampling_pads_only_for_the_compiler(
    compile: CompileMode | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    pipe = ImagenPipeline.from_pretrained(write_toy_model(tmp_path / "model"), compile=compile)
    plain = ImagenPipeline.from_pretrained(pipe.source)
    seen: list[int] = []
    for unet in pipe.cascade.unets.values():
        unet.register_forward_pre_hook(lambda *call: seen.append(call[2]["text"].kv[0][0].shape[1]), with_kwargs=True)
    for lengths in ((5, 2), (30, 9), (64, 1)):
        options: dict[str, Any] = dict(text=captions(*lengths), negative=captions(3, lengths[1]), steps=1)
        expected = plain(**options).images
        torch.testing.assert_close(pipe(**options).images, expected, rtol=0, atol=1e-4)
    assert set(seen) == ({64} if compile else {5, 30, 64})
