"""Offloading, compilation and tiling: they save memory or time without changing the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastimagen.cascade import Cascade
from fastimagen.cli import main
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import one_level_cascade, toy_cascade, write_toy_encoder, write_toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


@pytest.fixture(scope="module")
def text() -> TextEmbeddings:
    generator = torch.Generator().manual_seed(0)
    return TextEmbeddings(torch.randn(3, 5, 64, generator=generator), torch.arange(5) < torch.tensor([[5], [2], [4]]))


def test_offloading_moves_a_stage_to_the_device_only_while_it_runs(
    model: Path, text: TextEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ImagenPipeline.from_pretrained(model)(text=text).images
    pipe = ImagenPipeline.from_pretrained(model, offload="always")
    names = {id(unet): name for name, unet in pipe.cascade.unets.items()}
    events: list[str] = []
    to = nn.Module.to

    def recorded(self: nn.Module, *arguments: object, **options: object) -> nn.Module:
        if id(self) in names:
            events.append(f"{names[id(self)]} moves")
        return to(self, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", recorded)

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        events.append(f"{stage} runs")

    assert pipe(text=text, callback=callback, steps=1).images.shape == expected.shape
    assert events == [f"{name} {does}" for name in ("base", "sr") for does in ("moves", "runs", "moves")]
    monkeypatch.undo()
    assert torch.equal(pipe(text=text).images, expected)


def test_an_offloaded_stage_is_moved_back_when_sampling_fails(
    model: Path, text: TextEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ImagenPipeline.from_pretrained(model, offload="always")
    moves = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(str(device)))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(text=text, callback=stop)
    assert len(moves) == 2


def test_the_unet_compiles_to_one_graph_without_breaks(text: TextEmbeddings) -> None:
    """A graph break would add Python overhead and kernel launches to every step."""
    torch.manual_seed(0)
    cascade = Cascade(one_level_cascade()).eval()
    settings = cascade.settings(steps=2)
    expected = cascade.sample(text, [0, 1, 2], settings=settings)
    torch._dynamo.reset()
    for unet in cascade.unets.values():
        unet.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(cascade.sample(text, [0, 1, 2], settings=settings), expected, rtol=1e-5, atol=1e-5)


def test_the_compile_mode_reaches_every_unet(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append(mode))
    ImagenPipeline.from_pretrained(model, compile="reduce-overhead")
    assert modes == ["reduce-overhead"] * 2
    with pytest.raises(ValueError, match=r"compile must be one of None, default, .*, got fast"):
        ImagenPipeline.from_pretrained(model, compile="fast")
    with pytest.raises(ValueError, match="offload must be one of auto, always, never, got maybe"):
        ImagenPipeline.from_pretrained(model, offload="maybe")


# ---- tiles


def large(size: int = 32) -> Cascade:
    config = toy_cascade()
    stages = [config.stages[0], config.stages[1].model_copy(update={"size": size})]
    torch.manual_seed(0)
    return Cascade(config.model_copy(update={"stages": tuple(stages)})).eval()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tiling_gives_the_unet_tiles_of_the_image_and_its_low_resolution_input(
    guidance: float, text: TextEmbeddings
) -> None:
    """Both tiles are of the same region, and a tile as large as the stage changes nothing."""
    cascade = large()
    lowres = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs_seen: list[tuple[Tensor, Tensor]] = []
    cascade.unets["sr"].register_forward_pre_hook(
        lambda module, inputs, keywords: inputs_seen.append((inputs[0], keywords["lowres"])), with_kwargs=True
    )

    def sample(tile: int | None) -> Tensor:
        inputs_seen.clear()
        settings = cascade.settings(tile=tile, steps=2, guidance=guidance)
        return cascade.sample(text, [0, 1, 2], settings=settings, lowres=lowres, start_at="sr")

    whole = sample(None)
    assert {tuple(x.shape[2:]) for x, _ in inputs_seen} == {(32, 32)}
    (x, low), *_ = inputs_seen
    tiled = sample(16)
    assert {tuple(x.shape[2:]) for x, _ in inputs_seen} == {(16, 16)}
    assert torch.equal(inputs_seen[0][0], x[..., :16, :16]) and torch.equal(inputs_seen[0][1], low[..., :16, :16])
    assert tiled.shape == whole.shape and tiled.isfinite().all()
    assert torch.equal(sample(32), whole) and torch.equal(sample(64), whole)
    assert 0 < (tiled - whole).abs().mean() < (whole - whole.flip(0)).abs().mean()


def test_tile_sizes_that_do_not_fit_the_unet_are_refused(text: TextEmbeddings) -> None:
    with pytest.raises(ValueError, match='stage "sr": tile 18 must be a multiple of 4, the stride of its U-Net'):
        large().settings(tile=18)
    config = toy_cascade()
    unet = config.stages[1].unet.model_copy(update={"positional_encoding": True})
    stages = config.stages[0], config.stages[1].model_copy(update={"size": 32, "unet": unet})
    with pytest.raises(
        ValueError, match='stage "sr" has a positional encoding of the whole image: it cannot use tiles'
    ):
        Cascade(config.model_copy(update={"stages": stages})).settings(tile=16)


# ---- terminal


def test_a_terminal_shows_progress(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "--model", str(model), "--captions", "a red circle", "a small blue star", "--steps", "3"]
    assert main([*arguments, "--out", str(tmp_path / "silent")]) == 0
    assert "step" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main([*arguments, "--out", str(tmp_path / "shown")]) == 0
    lines = capsys.readouterr().err.replace("\n", "\r").split("\r")
    shown = [line.strip() for line in lines if "step" in line]  # loading the text encoder shows its own bar
    assert shown == [f"2 images, {stage}: step {step} of 3" for stage in ("base", "sr") for step in (1, 2, 3)]


def test_out_of_memory_is_a_one_line_error_with_advice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")

    monkeypatch.setattr(Cascade, "sample", fails)
    assert main(["sample", "--model", str(model), "--captions", "a red circle", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.rpartition("error: ")[2] == (
        "CUDA out of memory: reduce --batch-size, or use --dtype bfloat16, --offload always or --tile\n"
    )
