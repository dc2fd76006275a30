"""The pipeline and the model directory: what an image depends on, and what is read back from the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from fastimagen import cascade as cascade_module
from fastimagen.cascade import Cascade
from fastimagen.cli import main
from fastimagen.config_file import config_from_dict
from fastimagen.data.shards import open_shards
from fastimagen.images import to_uint8
from fastimagen.sampling.model_directory import read_cascade, read_model
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from fastimagen.train import checkpoint
from fastimagen.train.export import export
from tests.conftest import toy_cascade, write_toy_encoder, write_toy_model

CAPTIONS = [
    "a red circle",
    "a large blue star at the top of a yellow background",
    "a green square on a white background",
    "a small pink triangle",
    "a blue star above a yellow triangle on a black background",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


@pytest.fixture(scope="module")
def pipe(model: Path) -> ImagenPipeline:
    return ImagenPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def text(pipe: ImagenPipeline) -> TextEmbeddings:
    return pipe.encode(CAPTIONS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- one seed per image

SEEDS = [7, 3, 3, 12345678901, 0]


def sample_recording_noise(
    pipe: ImagenPipeline, text: TextEmbeddings, order: list[int], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, dict[tuple[int, str, int], Tensor]]:
    """Images by number, and the noise they were sampled with: {(number, stage, step): noise}."""
    noise: dict[tuple[int, str, int], Tensor] = {}
    calls: dict[tuple[str, int], int] = {}
    original = cascade_module.image_noise

    def recorded(seeds: list[int], shape: tuple[int, ...], *, stage: str, step: int, device: torch.device) -> Tensor:
        rows = original(seeds, shape, stage=stage, step=step, device=device)
        for row in rows:
            position = calls[stage, step] = calls.get((stage, step), -1) + 1
            noise[order[position], stage, step] = row
        return rows

    monkeypatch.setattr(cascade_module, "image_noise", recorded)
    images = pipe(
        text=text[order],
        seeds=[SEEDS[index] for index in order],
        batch_size=batch_size,
        steps=3,
        sampler="ddpm",
        guidance=3.0,
    ).images
    monkeypatch.undo()
    return images[torch.tensor(order).argsort()], noise


def test_an_image_depends_on_its_caption_and_seed_only(
    pipe: ImagenPipeline, text: TextEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, noise = sample_recording_noise(pipe, text, [0, 1, 2, 3, 4], 5, monkeypatch)
    # Two stages: the first noise and that of two further steps (the last adds none); and sr's augmentation.
    assert len(noise) == len(SEEDS) * (3 + 3 + 1)
    for order, batch_size in (([0, 1, 2, 3, 4], 1), ([4, 2, 0, 1, 3], 2), ([3, 1, 4, 0, 2], 32)):
        images, other_noise = sample_recording_noise(pipe, text, order, batch_size, monkeypatch)
        assert other_noise.keys() == noise.keys()
        assert all(other_noise[key].equal(noise[key]) for key in noise)
        assert (images - expected).abs().max() <= 2 / 255  # of a range of 2
    # A short caption alone is not padded to the length of the longest.
    alone = pipe(CAPTIONS[:1], seeds=SEEDS[:1], steps=3, sampler="ddpm", guidance=3.0).images
    assert (alone - expected[:1]).abs().max() <= 2 / 255
    # Same seed, other caption: same noise; same caption, other seed: other noise everywhere.
    assert noise[1, "sr", -1].equal(noise[2, "sr", -1]) and not noise[0, "sr", -1].equal(noise[1, "sr", -1])
    distinct = {noise[key].double().sum().item() for key in noise}
    assert len(distinct) == (len(SEEDS) - 1) * 7  # stages and steps never share noise
    assert torch.stack(list(noise[key].flatten()[:192] for key in noise)).std().sub(1).abs() < 0.05


def test_another_seed_or_caption_gives_another_image(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    same = text[[0, 0, 0, 1]]
    first, again, other_seed, other_caption = pipe(text=same, seeds=[1, 1, 2, 1], guidance=5.0).images
    assert (first - again).abs().max() <= 2 / 255
    assert (first - other_seed).abs().mean() > 0.05 and (first - other_caption).abs().mean() > 0.01


def test_seeds_count_up_from_zero_by_default(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    out = pipe(text=text[:3])
    assert out.seeds == [0, 1, 2]
    assert out.images.shape == (3, 3, 16, 16) and out.images.abs().max() <= 1
    assert out.images.equal(pipe(text=text[:3], seeds=[0, 1, 2]).images)


def test_precomputed_embeddings_give_the_images_of_their_captions(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    out = pipe(CAPTIONS)
    assert out.captions == CAPTIONS and (out.images - pipe(text=text).images).abs().max() <= 2 / 255
    assert pipe(CAPTIONS, text=text).images.equal(pipe(text=text).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(captions=["a"], seeds=[1, 2]), "2 seeds for 1 image: give one seed for each image"),
        (dict(captions=["a", "b"], text=4), "2 captions for 4 rows of text embeddings"),
        (dict(text=4, seeds=[1]), "1 seed for 4 images"),
        (dict(captions=[]), "nothing to sample: give captions, text embeddings or seeds"),
        (dict(), "this model is conditioned on text: give captions or text embeddings"),
        (
            dict(captions="a", seed=0, seeds=[0]),
            "give seed (of the first image) or seeds (one for each image), not both",
        ),
        (dict(captions="a", seed=0.5), "seed must be an integer, got 0.5"),
        (dict(captions="a", count=0), "count must be at least 1, got 0"),
        (dict(captions=[1]), "captions must be a list of strings, got 1"),
        (dict(seeds=[1]), "this model is conditioned on text: give captions or text embeddings"),
        (dict(text=1, seeds=1), "seeds must be a list of integers, one for each image, got 1"),
        (dict(text=1, seeds=[1.5]), "seeds must be a list of integers, one for each image, got [1.5]"),
        (dict(text=1, batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(text=1, width=32), "text embeddings are 32 wide, but the network was built for text_dim 64"),
        (dict(text=1, length=257), "text of 257 tokens, but max_text_length is 256"),
        (
            dict(text=1, steps={"base": 2, "super": 2}),
            "steps is given for unknown stage super; the cascade has base, sr",
        ),
        (dict(text=1, guidance_scale=3.0), 'unknown sampling setting "guidance_scale"; did you mean "guidance"?'),
        (dict(text=1, prompt="a"), 'unknown sampling setting "prompt"; did you mean "captions"?'),
        (dict(text=1, negative_prompt="a"), 'unknown sampling setting "negative_prompt"; did you mean "negative"?'),
        (dict(text=1, output_type="pil"), 'unknown sampling setting "output_type"; valid names: captions, text, count'),
        (dict(text=1, init_image=Image.new("L", (4, 4))), "init_image is of type Image, but must be an InitImage;"),
        (dict(text=1, lowres=Image.new("L", (4, 4))), "lowres is of type Image, but must be a tensor;"),
        (dict(captions=["a"], negative=3), "negative captions must be"),
        (dict(text=1, steps=0), "sampling of base.steps: Input should be greater than or equal to 1"),
        (dict(text=1, sampler={"sr": "euler"}), "sampling of sr.sampler: Input should be 'ddpm', 'ddim'"),
        (dict(text=1, guidance=-1.0), "sampling of base.guidance"),
        (dict(text=1, percentile=1.5), "sampling of base.percentile"),
        (dict(text=1, threshold="soft"), "sampling of base.threshold"),
    ],
)
def test_arguments_that_do_not_fit_together_are_a_one_line_error(
    arguments: dict, message: str, pipe: ImagenPipeline
) -> None:
    arguments = dict(arguments)
    width, length = arguments.pop("width", 64), arguments.pop("length", 4)
    if "text" in arguments:
        rows = arguments["text"]
        arguments["text"] = TextEmbeddings(torch.zeros(rows, length, width), torch.ones(rows, length, dtype=torch.bool))
    with pytest.raises(ValueError) as error:
        pipe(**arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_output_prints_as_one_short_line(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    assert repr(pipe(text=text[:2])) == "Output(2 images of 16x16, stages: base, sr)"
    assert repr(pipe) == f"ImagenPipeline('{pipe.source}', base 8x8, sr 16x16, device='cpu')"


# ---- settings


def test_settings_reach_the_stage_they_are_given_for(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    seen: list[tuple[str, int]] = []
    out = pipe(
        text=text[:2],
        steps={"base": 4},
        sampler={"sr": "ddim"},
        guidance={"base": 1.5},
        threshold="none",
        callback=lambda stage, step, x, x0: seen.append((stage, step)),
    )
    assert seen == [("base", 0), ("base", 1), ("base", 2), ("base", 3), ("sr", 0), ("sr", 1)]
    base, sr = out.record["stages"]["base"], out.record["stages"]["sr"]
    keys = ("steps", "sampler", "guidance", "threshold")
    assert [base[key] for key in keys] == [4, "dpmpp_2m", 1.5, "none"]
    assert [sr[key] for key in keys] == [2, "ddim", 1.0, "none"]
    assert not out.images.equal(pipe(text=text[:2]).images)


def test_the_guidance_weight_changes_the_images(pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    images = {weight: pipe(text=text[:2], guidance=weight).images for weight in (0.0, 1.0, 2.0)}
    assert (images[1.0] - images[2.0]).abs().mean() > 0.005
    assert (images[0.0] - images[1.0]).abs().mean() > 0.005
    swapped = pipe(text=text[[1, 0]], guidance=0.0).images  # weight 0 is the model without captions
    assert (images[0.0] - swapped).abs().max() <= 2 / 255


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_every_sampler_gives_finite_images(sampler: str, pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    images = pipe(text=text[:2], sampler=sampler, steps=3).images
    assert images.isfinite().all() and images.std() > 0.1


def test_bfloat16_weights_give_similar_images(model: Path, pipe: ImagenPipeline, text: TextEmbeddings) -> None:
    half = ImagenPipeline.from_pretrained(model, dtype=torch.bfloat16)
    assert next(half.cascade.parameters()).dtype == torch.bfloat16
    difference = half(text=text[:2]).images - pipe(text=text[:2]).images
    assert 0 < difference.abs().mean() < 0.1


# ---- the model directory


def test_a_saved_model_is_read_back_bit_for_bit(model: Path, pipe: ImagenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    before, after = files(model), files(tmp_path / "copy")
    for stage in ("base", "sr"):  # their headers are written in any order
        weights, copy_of_weights = (load(folder.pop(f"{stage}/model.safetensors")) for folder in (before, after))
        assert weights.keys() == copy_of_weights.keys()
        assert all(weights[name].equal(copy_of_weights[name]) for name in weights)
    assert "text_encoder/model.safetensors" in before and before == after
    copied = ImagenPipeline.from_pretrained(tmp_path / "copy")
    assert copied(CAPTIONS[:2]).images.equal(pipe(CAPTIONS[:2]).images)


def test_the_weights_file_contains_the_configuration(model: Path) -> None:
    for stage in toy_cascade().stages:
        with safe_open(model / stage.name / "model.safetensors", "pt") as file:
            header = json.loads(file.metadata()["config"])
        beside = json.loads((model / stage.name / "config.json").read_text())
        assert header == beside == stage.model_dump(mode="json")


def test_a_model_with_a_discrete_schedule_is_read_back(tmp_path: Path, text: TextEmbeddings) -> None:
    model = write_toy_model(tmp_path / "m", config=toy_cascade(schedule={"name": "linear", "timesteps": 100}))
    assert ImagenPipeline.from_pretrained(model)(text=text[:1]).images.isfinite().all()


def test_nothing_is_written_into_a_folder_that_is_not_empty(
    pipe: ImagenPipeline, text: TextEmbeddings, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note").write_text("precious")
    for write in (pipe.save_pretrained, pipe(text=text[:1]).save):
        with pytest.raises(ValueError, match="mine is not empty: choose another folder"):
            write(tmp_path / "mine")
    assert files(tmp_path) == {"mine/note": b"precious"}


def test_a_model_that_cannot_be_saved_leaves_no_files(
    pipe: ImagenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "folder", tmp_path / "gone")  # its text encoder cannot be copied
    with pytest.raises(OSError):
        pipe.save_pretrained(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


# ---- saved images


def test_saved_files_contain_the_images_captions_and_seeds(pipe: ImagenPipeline, tmp_path: Path) -> None:
    from PIL import Image

    captions = ["a red circle", "two\nlines, ünïcode"]
    out = pipe(captions, seeds=[5, 6])
    out.save(tmp_path / "out")
    pixels = [torch.tensor(list(Image.open(tmp_path / f"out/images/{i:06d}.png").tobytes())) for i in range(2)]
    assert torch.stack(pixels).equal(to_uint8(out.images).flatten(1).long())
    assert (tmp_path / "out/captions.txt").read_text(encoding="utf-8") == "a red circle\ntwo lines, ünïcode\n"
    samples = json.loads((tmp_path / "out/samples.json").read_text())["samples"]
    assert [(sample["caption"], sample["seed"]) for sample in samples] == [(captions[0], 5), (captions[1], 6)]
    assert Image.open(tmp_path / "out/grid.png").size == out.grid().size


@pytest.mark.parametrize("filetype", ["jpg", "webp"])
def test_images_are_saved_as_other_file_types(
    filetype: str, pipe: ImagenPipeline, text: TextEmbeddings, tmp_path: Path
) -> None:
    from PIL import Image

    out = pipe(text=text[:2])
    out.save(tmp_path / "out", filetype=filetype)
    samples = json.loads((tmp_path / "out/samples.json").read_text())["samples"]
    assert [sample["image"] for sample in samples] == [f"images/00000{i}.{filetype}" for i in range(2)]
    for sample, pixels in zip(samples, to_uint8(out.images)):
        with Image.open(tmp_path / "out" / sample["image"]) as image:
            assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[filetype]
            difference = torch.tensor(list(image.convert("RGB").tobytes())).float() - pixels.flatten()
        assert difference.abs().mean() < (12 if filetype == "jpg" else 1e-9)  # of 255; random weights draw noise
    with pytest.raises(ValueError, match='filetype must be one of png, jpg, webp, got "bmp"'):
        out.save(tmp_path / "other", filetype="bmp")  # type: ignore[arg-type]  # as a user may give it
    assert not (tmp_path / "other").exists()


def test_images_with_nan_are_refused_before_anything_is_written(
    pipe: ImagenPipeline, text: TextEmbeddings, tmp_path: Path
) -> None:
    out = pipe(text=text[:2])
    out.images[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        out.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- export


def write_toy_run(
    run: Path, toy_config: dict, stages: tuple[str, ...] = ("base", "sr")
) -> dict[str, dict[str, Tensor]]:
    """A run directory with two checkpoints per stage; returns the EMA weights of the newest by stage."""
    config = config_from_dict(toy_config)
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    newest: dict[str, dict[str, Tensor]] = {}
    unets = Cascade(config.fastimagen.cascade).unets
    for stage in config.fastimagen.cascade.stages:
        for step in (2, 10) if stage.name in stages else ():
            parameters = unets[stage.name].named_parameters()
            newest[stage.name] = {name: torch.randn(p.shape) for name, p in parameters}
            state = {"step": step, "stage": stage.model_dump(mode="json"), "val_loss": step / 10}
            write_checkpoint(run / "checkpoints" / stage.name, newest[stage.name], state)
    return newest


def write_checkpoint(folder: Path, average: dict[str, Tensor], state: dict[str, Any], ranks: int = 2) -> Path:
    """A checkpoint of a stage with EMA weights alone, each rank with a part of every parameter."""
    incomplete = folder / checkpoint.incomplete_name(state["step"], "token")
    for rank in range(ranks):
        fragments = {}
        for name, weight in average.items():
            first, last = (len(weight.flatten()) * part // ranks for part in (rank, rank + 1))
            fragments[f"ema/{name}/{first}"] = weight.flatten()[first:last]
        checkpoint.write_rank(incomplete, rank, fragments)
    shapes = {name: list(weight.shape) for name, weight in average.items()}
    return checkpoint.complete(incomplete, ranks, {"parameters": shapes}, state)


def test_export_takes_the_newest_ema_weights_and_the_text_encoder(
    toy_config: dict, toy_data: Path, tmp_path: Path
) -> None:
    expected = write_toy_run(tmp_path / "run", toy_config)
    (tmp_path / "run/checkpoints/base/.step-00000012.token.partial").mkdir()  # an incomplete checkpoint
    model = export(tmp_path / "run", tmp_path / "model")
    for stage, weights in expected.items():
        exported = load_file(model / stage / "model.safetensors")
        assert exported.keys() == weights.keys()
        assert all(exported[name].equal(weights[name]) for name in weights)
    assert files(model / "text_encoder") == files(toy_data / "text_encoder")
    card = (model / "README.md").read_text()
    assert "| base | 8x8 |" in card and "random" in card
    assert ImagenPipeline.from_pretrained(model)(["a red circle"], guidance=1.0).images.isfinite().all()


def test_export_misses_the_folder_of_the_text_encoder(toy_config: dict, tmp_path: Path) -> None:
    """A relative path, seen from another folder: without this check the model would not sample."""
    toy_config["fastimagen"]["text"]["encoder"] = "./encoders/t5"
    write_toy_run(tmp_path / "run", toy_config)
    with pytest.raises(ValueError, match=r"text.encoder is ./encoders/t5, but there is no such folder: run export in"):
        export(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_export_takes_a_step_or_the_best_and_the_stages_trained_so_far(toy_config: dict, tmp_path: Path) -> None:
    newest = write_toy_run(tmp_path / "run", toy_config, stages=("base",))["base"]
    lines: list[str] = []
    model = export(tmp_path / "run", tmp_path / "best", step="best", say=lines.append)
    assert lines == ["sr: not trained yet, left out", "base: step 2, val_loss 0.2"]
    older = load_file(model / "base/model.safetensors")
    assert all(
        older[name].equal(weight)
        for name, weight in checkpoint.read_average(tmp_path / "run/checkpoints/base/step-00000002").items()
    )
    assert ImagenPipeline.from_pretrained(model)("a red circle").images.shape == (1, 3, 8, 8)
    chosen = load_file(export(tmp_path / "run", tmp_path / "ten", step="base=10") / "base/model.safetensors")
    assert all(chosen[name].equal(newest[name]) and not older[name].equal(newest[name]) for name in newest)

    path = tmp_path / "run/checkpoints/base/step-00000010/rank-00000.safetensors"
    stored = path.read_bytes()
    path.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    lines.clear()
    model = export(tmp_path / "run", tmp_path / "intact", say=lines.append)
    assert "step-00000010 is damaged" in lines[0] and lines[-1] == "base: step 2, val_loss 0.2"
    assert load_file(model / "base/model.safetensors").keys() == older.keys()


def test_a_super_resolution_stage_is_exported_without_the_stage_below(toy_config: dict, tmp_path: Path) -> None:
    write_toy_run(tmp_path / "run", toy_config, stages=("sr",))
    model = export(tmp_path / "run", tmp_path / "model")
    (stage,) = read_cascade(model)[0].stages
    assert stage.name == "sr" and stage.lowres_size == 8
    pipe = ImagenPipeline.from_pretrained(model)
    assert pipe("a red circle", lowres=torch.zeros(1, 3, 8, 8), start_at="sr").images.shape == (1, 3, 16, 16)


def test_a_model_travels_with_the_local_encoder_and_its_own_example(
    toy_config: dict, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is a folder, and the data are not the built-in shapes: nothing of the run is needed any more."""
    shutil.copytree(toy_data, tmp_path / "old/data")
    toy_config["fastimagen"]["data"] = {"shards": "data/train", "validation": "data/val"}
    toy_config["fastimagen"]["text"] = {"encoder": "data/text_encoder"}
    monkeypatch.chdir(tmp_path / "old")
    write_toy_run(Path("run"), toy_config)
    Path("run/samples/sr").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save("run/samples/sr/step-00000004.png")
    export("run", "model")
    example = open_shards("data/val")[0].caption(0)
    shutil.move("model", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("old")

    card = Path("new/README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastimagen\npipeline_tag: text-to-image\n")
    assert f"--captions '{example}'" in card and "(samples.png)" in card and Path("new/samples.png").is_file()
    pipe = ImagenPipeline.from_pretrained("new")
    assert pipe("a red circle", guidance=1.0).images.isfinite().all()
    assert pipe.save_pretrained("copy").joinpath("samples.png").is_file()


def test_the_card_of_a_cascade_without_text_asks_for_no_captions(toy_config: dict, tmp_path: Path) -> None:
    for stage in toy_config["fastimagen"]["cascade"]["stages"]:
        stage["unet"] = stage["unet"] | {"text_dim": None}
        stage["sampling"] = stage["sampling"] | {"guidance": 1.0}
    write_toy_run(tmp_path / "run", toy_config)
    card = (export(tmp_path / "run", tmp_path / "model") / "README.md").read_text()
    assert "fastimagen sample --model . --count 4\n" in card and "--captions" not in card
    assert "samples.png" not in card and "text-to-image" not in card
    assert ImagenPipeline.from_pretrained(tmp_path / "model").text_encoder is None
    command = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]
    assert main(command) == 0
    half, index = read_model(tmp_path / "half")[1:]
    assert {weight.dtype for stage in half.values() for weight in stage.values()} == {torch.bfloat16}
    assert index["_class_name"] == "ImagenPipeline"
    again = ImagenPipeline.from_pretrained(tmp_path / "half").save_pretrained(tmp_path / "full", dtype="float32")
    assert {weight.dtype for weight in read_model(again)[1]["base"].values()} == {torch.float32}


def test_a_low_resolution_image_of_another_size_than_in_training_is_said(
    pipe: ImagenPipeline, text: TextEmbeddings
) -> None:
    as_trained, larger = (
        pipe(text=text, lowres=torch.zeros(1, 3, size, size), start_at="sr").warnings for size in (8, 12)
    )
    assert as_trained == []
    assert larger == ["the low-resolution image is 12 pixels wide, stage sr was trained on 8"]
