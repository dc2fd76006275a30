"""The `fastimagen` command: what it writes, and its one-line errors."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastimagen import __version__
from fastimagen.cli import main
from fastimagen.config import CascadeConfig
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import TOY_STAGES, toy_tree, write_toy_encoder, write_toy_model
from tests.sampling.test_pipeline import files, write_toy_run

CAPTIONS = ["a red circle on a blue background", "a small blue star", "a green square on a white background"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


@pytest.fixture
def unconditional(tmp_path: Path) -> Path:
    """A model directory of a cascade that reads no captions."""
    stages = copy.deepcopy(TOY_STAGES)
    for stage in stages:
        stage["unet"] |= {"text_dim": None}
        stage["sampling"] |= {"guidance": 1.0}
    return write_toy_model(tmp_path / "unconditional", config=CascadeConfig.model_validate({"stages": stages}))


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to damage."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail and return its one-line error; checks that it changed no file."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = files(tmp_path), sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        output, error = capsys.readouterr()
        assert output == "" and error.startswith("error: ") and error.count("\n") == 1, (output, error)
        assert (files(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return error.removeprefix("error: ").removesuffix("\n")

    return run


def sample(*arguments: object) -> None:
    assert main(["sample", *(str(argument) for argument in arguments)]) == 0


# ---- sample


def test_sample_writes_images_captions_and_settings(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/samples"
    settings = ["--steps", 3, "--sampler", "ddim", "--guidance", "base=1.5,sr=2", "--seed", 40, "--batch-size", 2]
    sample("--model", model, "--captions", *CAPTIONS, "--out", out, *settings)
    assert capsys.readouterr().out.strip() == str(out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "captions.txt",
        "grid.png",
        "images/000000.png",
        "images/000001.png",
        "images/000002.png",
        "samples.json",
    ]
    assert (out / "captions.txt").read_text().splitlines() == CAPTIONS
    record = json.loads((out / "samples.json").read_text())
    assert record["model"] == str(model) and record["version"] == __version__
    assert record["samples"] == [
        {"image": f"images/{i:06d}.png", "caption": caption, "seed": 40 + i} for i, caption in enumerate(CAPTIONS)
    ]
    for stage, guidance in (("base", 1.5), ("sr", 2.0)):
        settings = record["stages"][stage]
        assert (settings["steps"], settings["sampler"], settings["guidance"]) == (3, "ddim", guidance)
    assert Image.open(out / "images/000000.png").size == (16, 16)


def test_settings_reproduce_the_same_files(model: Path, tmp_path: Path) -> None:
    """As the web page writes them: settings of each stage, seeds in any order, a negative caption."""
    output = ImagenPipeline.from_pretrained(model)(
        CAPTIONS,
        seeds=[7, 3, 9],
        steps={"base": 3, "sr": 1},
        sampler={"sr": "ddim"},
        guidance={"base": 1.5},
        threshold={"base": "static"},
        negative=["a cross"],
    )
    output.save(tmp_path / "first", filetype="webp")
    sample("--model", model, "--settings", tmp_path / "first/samples.json", "--out", tmp_path / "second")
    assert files(tmp_path / "second") == files(tmp_path / "first")


def test_settings_that_cannot_be_reproduced_are_refused(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "init.png")
    arguments = ["--image", tmp_path / "init.png", "--strength", 0.5, "--out", tmp_path / "out"]
    sample("--model", model, "--captions", "a", *arguments)
    (tmp_path / "other.json").write_text('{"samples": 3}')
    for arguments, message in (
        (("out/samples.json",), "out/samples.json does not hold all inputs"),
        (("other.json",), "other.json does not hold the settings of sampled images"),
        (("nowhere.json",), "cannot read nowhere.json: No such file or directory"),
        (("other.json", "--start-at", "sr"), "--settings already sets --start-at"),
        (("other.json", "--seed", "0"), "--settings already sets --seed"),
        (("other.json", "--percentile", "0.9"), "--settings already sets --percentile"),
    ):
        assert message in refused("sample", "--model", model, "--out", "new", "--settings", *arguments)


def test_line_i_of_a_caption_file_is_image_i(model: Path, tmp_path: Path) -> None:
    """Each image depends on its caption and seed only. Windows line ends and a byte order mark are removed."""
    (tmp_path / "captions.TXT").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*CAPTIONS, ""]).encode())
    sample("--model", model, "--captions", tmp_path / "captions.TXT", "--out", tmp_path / "all")
    assert (tmp_path / "all/captions.txt").read_text().splitlines() == CAPTIONS
    for index, caption in enumerate(CAPTIONS):
        alone = tmp_path / str(index)
        sample("--model", model, "--captions", caption, "--out", alone, "--seed", index)
        paths = tmp_path / f"all/images/{index:06d}.png", alone / "images/000000.png"
        in_batch, by_itself = (torch.tensor(list(Image.open(path).tobytes())) for path in paths)
        assert (in_batch - by_itself).abs().max() <= 1


def test_several_caption_files_are_one_list(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(CAPTIONS[:2]))
    (tmp_path / "b.txt").write_text(f"{CAPTIONS[2]}\n")
    sample("--model", model, "--captions", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out")
    assert (tmp_path / "out/captions.txt").read_text().splitlines() == CAPTIONS


def test_a_caption_file_needs_no_suffix(model: Path, tmp_path: Path) -> None:
    (tmp_path / "list.captions").write_text("\n".join(CAPTIONS))
    sample("--model", model, "--captions", tmp_path / "list.captions", "--out", tmp_path / "out", "--steps", 1)
    assert (tmp_path / "out/captions.txt").read_text().splitlines() == CAPTIONS


def test_count_gives_several_images_of_each_caption(model: Path, tmp_path: Path) -> None:
    sample("--model", model, "--captions", *CAPTIONS[:2], "--count", 2, "--seed", 5, "--out", tmp_path, "--steps", 1)
    record = json.loads((tmp_path / "samples.json").read_text())
    found = [(item["caption"], item["seed"]) for item in record["samples"]]
    assert found == [(CAPTIONS[0], 5), (CAPTIONS[0], 6), (CAPTIONS[1], 7), (CAPTIONS[1], 8)]


def test_a_cascade_without_text_needs_no_captions(
    model: Path, tmp_path: Path, unconditional: Path, refused: Callable[..., str]
) -> None:
    sample("--model", unconditional, "--count", 3, "--out", "out", "--steps", 1)
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    assert "give captions or text embeddings" in refused("sample", "--model", model, "--count", 3)


def test_the_default_folder_is_a_new_one_for_every_call(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        sample("--model", model, "--captions", "a", "--steps", 1)
    assert capsys.readouterr().out.split() == ["samples", "samples-2", "samples-3"]
    assert files(tmp_path / "samples") == files(tmp_path / "samples-3")


def test_init_image_and_mask_are_cropped_to_the_central_square(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 50)
    mask = Image.new("L", (24, 16))
    mask.paste(255, (10, 4, 20, 9))
    for name, image in (("image", wide), ("mask", mask)):
        image.save(tmp_path / f"wide_{name}.png")
        image.crop((4, 0, 20, 16)).save(tmp_path / f"square_{name}.png")
    for kind in ("wide", "square"):
        inputs = ["--image", tmp_path / f"{kind}_image.png", "--mask", tmp_path / f"{kind}_mask.png"]
        sample("--model", model, "--captions", "a", *inputs, "--steps", 2, "--out", tmp_path / kind)
        notice = f"{tmp_path}/wide_image.png is 24x16: only its central 16x16 is used\n"
        assert (notice in capsys.readouterr().err) == (kind == "wide")
    assert files(tmp_path / "wide") == files(tmp_path / "square")


def test_embeddings_from_encode_give_the_images_of_the_captions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "text.safetensors"
    assert main(["encode", "--model", str(model), "--captions", *CAPTIONS, "--out", str(saved)]) == 0
    assert f"{saved}: 3 captions, " in capsys.readouterr().out
    sample("--model", model, "--embeddings", saved, "--steps", 1, "--out", tmp_path / "embeddings")
    sample("--model", model, "--captions", *CAPTIONS, "--steps", 1, "--out", tmp_path / "captions")
    for index in range(3):
        name = f"images/{index:06d}.png"
        assert (tmp_path / "embeddings" / name).read_bytes() == (tmp_path / "captions" / name).read_bytes()


def test_encode_overwrites_no_file(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.safetensors").write_text("precious")
    error = refused("encode", "--model", model, "--captions", "a", "--out", "text.safetensors")
    assert error == "text.safetensors exists: choose another file, or remove it first"


def test_an_empty_negative_caption_is_none(model: Path, tmp_path: Path) -> None:
    sample("--model", model, "--captions", "a", "--negative", "", "--guidance", 1, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/samples.json").read_text())["negative"] is None


def test_sampling_from_embeddings_needs_no_text_encoder(model: Path, damaged: Path, tmp_path: Path) -> None:
    ImagenPipeline.from_pretrained(model).encode(CAPTIONS).save(tmp_path / "text.safetensors", CAPTIONS)
    shutil.rmtree(damaged / "text_encoder")
    sample("--model", damaged, "--embeddings", tmp_path / "text.safetensors", "--out", tmp_path / "out")
    assert (tmp_path / "out/captions.txt").read_text().splitlines() == CAPTIONS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read captions captions.txt: No such file or directory"),
        (b"", "captions.txt contains no captions"),
        (b"a\n\nb\n   \n", "captions.txt: blank line 2, 4; each line is the caption of one image"),
        (b"caf\xe9\n", "captions captions.txt are not UTF-8"),
    ],
)
def test_unusable_caption_files_are_refused(
    content: bytes | None, message: str, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / "captions.txt").write_bytes(content)
    assert refused("sample", "--model", model, "--captions", "captions.txt").startswith(message)


def test_a_blank_caption_is_refused(model: Path, refused: Callable[..., str]) -> None:
    error = refused("sample", "--model", model, "--captions", "a", " ")
    assert error == "--captions: caption 2 is blank"


def test_an_output_folder_that_is_not_empty_is_left_unchanged(
    model: Path, tmp_path: Path, refused: Callable[..., str], toy_config: dict
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000000.png").write_text("precious")
    write_toy_run(tmp_path / "run", toy_config)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("black")
    for command in (
        ["sample", "--model", model, "--captions", "a"],
        ["evaluate", "--model", model, "--count", "1"],
        ["export", "--run", "run"],
        ["shards", "folder", "images"],
        ["shards", "shapes", "--count", "2"],
    ):
        assert refused(*command, "--out", "out").startswith(("out is", f"{tmp_path}/out is"))


MODEL_DAMAGE = {
    "is not a model directory: it has no model_index.json; `fastimagen export`": lambda m: (
        m / "model_index.json"
    ).unlink(),
    "model_index.json is not JSON": lambda m: (m / "model_index.json").write_text('{"format": '),
    "model_index.json must hold a JSON object": lambda m: (m / "model_index.json").write_text("[]"),
    "this version reads 'fastimagen.model.1'": lambda m: change(m / "model_index.json", format="model.9"),
    "json.stages: Tuple should have at least 1 item": lambda m: change(m / "model_index.json", stages=[]),
    "stage sizes must ascend": lambda m: change(m / "model_index.json", stages=["sr", "base"]),
    "cannot read damaged/base/config.json: No such file": lambda m: (m / "base/config.json").unlink(),
    "base/config.json is not JSON": lambda m: (m / "base/config.json").write_text("{"),
    'damaged/base/config.json.sise; did you mean "size"?': lambda m: change(m / "base/config.json", sise=8),
    "damaged/base: weights and configuration do not match: ": lambda m: change(
        m / "base/config.json", unet={"dim": 16}
    ),
    "cannot read weights damaged/sr/model.safetensors": lambda m: (m / "sr/model.safetensors").unlink(),
    "cannot read weights damaged/base/model.safetensors": lambda m: cut(m / "base/model.safetensors"),
    "damaged/sr/model.safetensors": lambda m: (m / "sr/model.safetensors").write_bytes(b""),
    "text encoder damaged/text_encoder is missing": lambda m: shutil.rmtree(m / "text_encoder"),
    "weights of text encoder damaged/text_encoder": lambda m: cut(m / "text_encoder/model.safetensors"),
}


def change(path: Path, **values: object) -> None:
    tree = json.loads(path.read_text())
    for key, value in values.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(tree))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("message", MODEL_DAMAGE)
def test_a_damaged_model_is_refused(message: str, damaged: Path, refused: Callable[..., str]) -> None:
    MODEL_DAMAGE[message](damaged)
    assert message in refused("sample", "--model", "damaged", "--captions", "a", "--out", "out")


def test_a_folder_that_is_not_a_model_is_refused(refused: Callable[..., str]) -> None:
    assert "nowhere is not a model directory" in refused("sample", "--model", "nowhere", "--captions", "a")
    assert "nowhere is not a model directory" in refused("evaluate", "--model", "nowhere")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sampler", "euler", "--sampler: Input should be 'ddpm', 'ddim', 'dpmpp_2m' or 'heun' (given: 'euler')"),
        ("--steps", "0", "--steps: Input should be greater than or equal to 1 (given: '0')"),
        ("--steps", "many", "--steps: Input should be a valid integer"),
        ("--steps", "base=3,top=4", "steps is given for unknown stage top; the cascade has base, sr"),
        ("--guidance", "-1", "--guidance: Input should be greater than or equal to 0 (given: '-1')"),
        ("--guidance", "nan", "--guidance: "),
        ("--batch-size", "0", "batch_size must be at least 1, got 0"),
        ("--device", "gpu", 'device gpu is not available, use "cpu": '),
        ("--device", "cuda:99", 'device cuda:99 is not available, use "cpu": '),
    ],
)
def test_option_values_out_of_range_are_refused(
    option: str, value: str, message: str, model: Path, refused: Callable[..., str]
) -> None:
    assert refused("sample", "--model", model, "--captions", "a", option, value).startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--model", "m", "--captions", "a", "--embeddings", "e"],
        ["sample", "--model", "m", "--captions", "a", "--dtype", "float7"],
        ["sample", "--model", "m", "--captions", "a", "--batch-size", "many"],
        ["evaluate", "--model", "m", "--data", "coco"],
        ["shards", "website", "x"],
        ["trian"],
        [],
    ],
)
def test_arguments_that_argparse_refuses_give_usage_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("usage: fastimagen") and "error: " in error.splitlines()[-1]


def test_embeddings_of_the_wrong_width_are_refused(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    TextEmbeddings(torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)).save(tmp_path / "narrow.safetensors")
    message = refused("sample", "--model", model, "--embeddings", "narrow.safetensors")
    assert message == "text embeddings are 32 wide, but the network was built for text_dim 64"
    assert "cannot read text embeddings" in refused("sample", "--model", model, "--embeddings", "nothing.safetensors")


# ---- evaluate


def test_evaluate_reports_all_splits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastimagen.evaluation.shape_reader")
    arguments = ["evaluate", "--model", str(model), "--count", "4", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "open diversity: two seeds differ by" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    for split in ("seen", "unseen", "open"):
        assert f"{split} single" in printed and f"{split} appearance: contrast" in printed
        assert report["appearance"][split]["contrast"]["mean"] > 0
        figures = report["accuracy"][split]
        assert sum(kind["count"] for kind in figures.values()) == 4
        assert all(
            0 <= value["mean"] <= 1 for kind in figures.values() for value in kind.values() if isinstance(value, dict)
        )
        assert (tmp_path / f"out/{split}.png").exists()
    assert report["count"] == 4 and report["versions"]["fastimagen"] == __version__


def test_evaluating_no_captions_is_refused(model: Path, refused: Callable[..., str]) -> None:
    error = refused("evaluate", "--model", model, "--count", "0", "--out", "out")
    assert error == "count must be at least 1, got 0"


# ---- export, shards, embed


def test_an_exported_model_can_be_sampled(toy_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy_run(tmp_path / "run", toy_config)
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    sample("--model", tmp_path / "model", "--captions", "a red circle", "--out", tmp_path / "out", "--guidance", 1)
    assert (tmp_path / "out/images/000000.png").exists()


def test_exporting_a_run_without_checkpoints_is_refused(
    toy_config: dict, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert refused("export", "--run", "run", "--out", "model") == "run is not a run directory: it has no config.json"
    write_toy_run(tmp_path / "run", toy_config, stages=("base",))
    shutil.move(tmp_path / "run/checkpoints/base", tmp_path / "base")
    assert refused("export", "--run", "run", "--out", "model") == "run: no stage has a checkpoint yet; train it first"
    shutil.move(tmp_path / "base", tmp_path / "run/checkpoints/base")
    error = refused("export", "--run", "run", "--out", "model", "--step", "5")
    assert error == "run/checkpoints/base has no checkpoint of step 5: it has 2, 10"
    assert "number" in refused("export", "--run", "run", "--out", "model", "--step", "last")
    assert "the stages are base, sr" in refused("export", "--run", "run", "--out", "model", "--step", "bse=2")
    cut(tmp_path / "run/checkpoints/base/step-00000010/rank-00001.safetensors")
    error = refused("export", "--run", "run", "--out", "model", "--step", "10")
    assert "step-00000010 is damaged" in error and "rank-00001.safetensors" in error


def test_packing_no_images_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused("shards", "folder", "images", "--out", "out") == "images is not a folder of images"
    assert refused("shards", "table", "list.jsonl", "--out", "out") == "there is no table list.jsonl"
    (tmp_path / "list.jsonl").write_text("{}")
    assert "pack it with fastimagen shards table" in refused("shards", "folder", "list.jsonl", "--out", "out")
    (tmp_path / "images").mkdir()
    assert "nothing to pack for out" in refused("shards", "folder", "images", "--out", "out")
    (tmp_path / "images/a.txt").write_text("a caption of nothing")
    assert "caption without image: 1 (a.txt)" in refused("shards", "folder", "images", "--out", "out")
    error = refused("shards", "folder", "images", "--out", "out", "--shard-size", "0")
    assert "at least one sample" in error
    assert "size >= 16" in refused("shards", "shapes", "--out", "out", "--size", "8")


def test_importing_an_empty_folder_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "nowhere" in refused("import-minimagen", "nowhere", "--out", "out")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("import-minimagen", "empty", "--out", "out")


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, [], "cannot read ds.json: No such file or directory"),
        ('{"fastimagen": {', [], "ds.json is not JSON: line 1"),
        ('{"fastimagen": {"dat": {}}}', [], 'unknown key fastimagen.dat; did you mean "data"?'),
        ('{"fastimagen": {"text": {"max_length": 0}}}', [], "fastimagen.text.max_length: Input should be greater than"),
        (
            '{"fastimagen": {}}',
            ["fastimagen.text.batchsize=3"],
            'unknown key fastimagen.text.batchsize; did you mean "batch_size"?',
        ),
        ('{"fastimagen": {}}', ["fastimagen"], "--set takes KEY=VALUE, got 'fastimagen'"),
        (
            '{"fastimagen": {"data": {"shards": "nowhere", "validation": null}}}',
            ["fastimagen.text.encoder=t5_small"],
            "fastimagen.data.shards: no shards: nowhere is not a tar, folder",
        ),
    ],
)
def test_embed_refuses_a_broken_configuration(
    content: str | None, overrides: list[str], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    options = [word for override in overrides for word in ("--set", override)]
    assert refused("embed", "--config", "ds.json", *options).startswith(message)


@pytest.mark.parametrize("shapes", [True, False])
def test_embed_makes_its_data_and_its_encoder_on_one_process_only(
    shapes: bool, tmp_path: Path, toy_data: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of a launcher would read them half written."""
    tree = toy_tree(toy_data)
    tree["fastimagen"]["text"] = {"encoder": str(tmp_path / "new"), "random_weights": True}
    if not shapes:
        tree["fastimagen"]["data"]["shapes"] = None
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert refused("embed", "--config", "ds.json").endswith("run fastimagen embed on one process")
    assert not (tmp_path / "new").exists()


def test_embed_fills_the_cache_once(
    toy_config: dict, write_config: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "--config", str(write_config(toy_config))]) == 0
    assert "0 shards written, 2 kept" in capsys.readouterr().out


# ---- exit status


def test_multi_line_and_file_system_errors_are_one_line(
    toy_config: dict, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy_run(tmp_path / "run", toy_config)
    (tmp_path / "note").write_text("a file, where a folder should be")
    assert "note" in refused("export", "--run", "run", "--out", "note/model")
    monkeypatch.setattr("fastimagen.info.report", lambda: raising(ValueError("two\n  lines")))
    assert refused("info") == "two lines"


def raising(error: BaseException) -> None:
    raise error


def test_an_interrupt_gives_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastimagen.info.report", lambda: raising(KeyboardInterrupt()))
    assert main(["info"]) == 130 and capsys.readouterr().err == "interrupted\n"
