"""The `fastimagen` command as a user meets it: what it writes, and what it says of bad input."""

from __future__ import annotations

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
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import write_toy_encoder, write_toy_model
from tests.sampling.test_pipeline import files, write_toy_run

CAPTIONS = ["a red circle on a blue background", "a small blue star", "a green square on a white background"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to damage."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail: the one line it says. Nothing on the disk has changed then."""
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


def test_sample_writes_what_it_promises(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/pictures"
    sample(
        "--model",
        model,
        "--captions",
        *CAPTIONS,
        "--out",
        out,
        "--steps",
        3,
        "--sampler",
        "ddim",
        "--guidance",
        1.5,
        "--seed",
        40,
        "--batch-size",
        2,
    )
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
    for stage in ("base", "sr"):
        settings = record["stages"][stage]
        assert (settings["steps"], settings["sampler"], settings["guidance"]) == (3, "ddim", 1.5)
    assert Image.open(out / "images/000000.png").size == (16, 16)


def test_settings_make_the_same_pictures_again(model: Path, tmp_path: Path) -> None:
    """As the demo hands them out: stages of their own settings, seeds as they come, a negative caption."""
    output = ImagenPipeline.from_pretrained(model)(
        CAPTIONS,
        seeds=[7, 3, 9],
        steps={"base": 3, "sr": 1},
        sampler={"sr": "ddim"},
        guidance={"base": 1.5},
        threshold={"base": "static"},
        negative=["a cross"],
    )
    output.save(tmp_path / "first")
    sample("--model", model, "--settings", tmp_path / "first/samples.json", "--out", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "first")


def test_settings_that_cannot_be_followed(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    sample("--model", model, "--captions", "a", "--image", picture, "--strength", 0.5, "--out", tmp_path / "out")
    (tmp_path / "other.json").write_text('{"samples": 3}')
    for arguments, complaint in (
        (("out/samples.json",), "which it does not hold"),
        (("other.json",), "other.json holds no settings of pictures"),
        (("nowhere.json",), "cannot read settings nowhere.json: No such file or directory"),
        (("other.json", "--start-at", "sr"), "--settings settles --start-at already"),
        (("other.json", "--seed", "3"), "--settings settles --seed already"),
    ):
        assert complaint in refused("sample", "--model", model, "--out", "new", "--settings", *arguments)


def test_line_i_of_a_file_is_image_i(model: Path, tmp_path: Path) -> None:
    """Each picture is the one that its caption and seed give alone. Windows line ends and a byte order mark
    are no part of the captions."""
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*CAPTIONS, ""]).encode())
    sample("--model", model, "--captions", tmp_path / "captions.txt", "--out", tmp_path / "all")
    assert (tmp_path / "all/captions.txt").read_text().splitlines() == CAPTIONS
    for index, caption in enumerate(CAPTIONS):
        alone = tmp_path / str(index)
        sample("--model", model, "--captions", caption, "--out", alone, "--seed", index)
        ours, theirs = (
            torch.tensor(list(Image.open(path).tobytes()))
            for path in (tmp_path / f"all/images/{index:06d}.png", alone / "images/000000.png")
        )
        assert (ours - theirs).abs().max() <= 1


def test_sample_from_embeddings_leaves_the_text_encoder_alone(model: Path, damaged: Path, tmp_path: Path) -> None:
    ImagenPipeline.from_pretrained(model).encode(CAPTIONS).save(tmp_path / "text.safetensors", CAPTIONS)
    shutil.rmtree(damaged / "text_encoder")
    sample("--model", damaged, "--embeddings", tmp_path / "text.safetensors", "--out", tmp_path / "out")
    assert (tmp_path / "out/captions.txt").read_text().splitlines() == CAPTIONS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read captions captions.txt: No such file or directory"),
        (b"", "captions.txt holds no captions"),
        (b"a\n\nb\n   \n", "captions.txt: caption 2, 4 is blank; line i is image i, so take it out"),
        (b"caf\xe9\n", "captions captions.txt are not UTF-8"),
    ],
)
def test_bad_caption_files(
    content: bytes | None, complaint: str, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / "captions.txt").write_bytes(content)
    assert refused("sample", "--model", model, "--captions", "captions.txt").startswith(complaint)


def test_a_blank_caption(model: Path, refused: Callable[..., str]) -> None:
    said = refused("sample", "--model", model, "--captions", "a", " ")
    assert said.startswith("--captions: caption 2 is blank")


def test_an_output_folder_with_anything_in_it_stays_as_it_is(
    model: Path, tmp_path: Path, refused: Callable[..., str], toy_config: dict
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000000.png").write_text("precious")
    write_toy_run(tmp_path / "run", toy_config)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/a.txt").write_text("black")
    for command in (
        ["sample", "--model", model, "--captions", "a"],
        ["evaluate", "--model", model, "--count", "1"],
        ["export", "--run", "run"],
        ["shards", "folder", "pictures"],
        ["shards", "shapes", "--count", "2"],
    ):
        assert refused(*command, "--out", "out").startswith(("out is", f"{tmp_path}/out is"))


MODEL_DAMAGE = {
    "there is no model_index.json in it (`fastimagen export`": lambda m: (m / "model_index.json").unlink(),
    "model_index.json is not JSON": lambda m: (m / "model_index.json").write_text('{"format": '),
    "model_index.json must hold a JSON object": lambda m: (m / "model_index.json").write_text("[]"),
    "this version reads 'fastimagen.model.1'": lambda m: change(m / "model_index.json", format="model.9"),
    "json.stages: Tuple should have at least 1 item": lambda m: change(m / "model_index.json", stages=[]),
    "stage sizes must ascend": lambda m: change(m / "model_index.json", stages=["sr", "base"]),
    "cannot read damaged/base/config.json: No such file": lambda m: (m / "base/config.json").unlink(),
    "base/config.json is not JSON": lambda m: (m / "base/config.json").write_text("{"),
    'damaged/base/config.json.sise; did you mean "size"?': lambda m: change(m / "base/config.json", sise=8),
    "weights and config.json disagree about": lambda m: change(m / "base/config.json", unet={"dim": 16}),
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


@pytest.mark.parametrize("complaint", MODEL_DAMAGE)
def test_a_damaged_model(complaint: str, damaged: Path, refused: Callable[..., str]) -> None:
    MODEL_DAMAGE[complaint](damaged)
    assert complaint in refused("sample", "--model", "damaged", "--captions", "a", "--out", "out")


def test_no_model(refused: Callable[..., str]) -> None:
    assert "nowhere is no model directory" in refused("sample", "--model", "nowhere", "--captions", "a")
    assert "nowhere is no model directory" in refused("evaluate", "--model", "nowhere")


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        (
            "--sampler",
            "euler",
            "sampling of base.sampler: Input should be 'ddpm', 'ddim', 'dpmpp_2m' or 'heun' (given: 'euler')",
        ),
        ("--steps", "0", "sampling of base.steps: Input should be greater than or equal to 1 (given: 0)"),
        ("--guidance", "-1", "sampling of base.guidance: Input should be greater than or equal to 0 (given: -1.0)"),
        ("--guidance", "nan", "sampling of base.guidance"),
        ("--batch-size", "0", "batch_size must be at least 1, got 0"),
        ("--device", "gpu", "--device gpu is not to be had here"),
        ("--device", "cuda:99", "--device cuda:99 is not to be had here"),
    ],
)
def test_option_values_that_cannot_be(
    option: str, value: str, complaint: str, model: Path, refused: Callable[..., str]
) -> None:
    assert refused("sample", "--model", model, "--captions", "a", option, value).startswith(complaint)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--model", "m"],
        ["sample", "--model", "m", "--captions", "a", "--embeddings", "e"],
        ["sample", "--model", "m", "--captions", "a", "--dtype", "float7"],
        ["sample", "--model", "m", "--captions", "a", "--steps", "many"],
        ["evaluate", "--model", "m", "--data", "coco"],
        ["shards", "website", "x"],
        ["trian"],
        [],
    ],
)
def test_what_argparse_does_not_understand_is_usage_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("usage: fastimagen") and "error: " in error.splitlines()[-1]


def test_embeddings_of_another_width(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    TextEmbeddings(torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)).save(tmp_path / "narrow.safetensors")
    complaint = refused("sample", "--model", model, "--embeddings", "narrow.safetensors")
    assert complaint == "text embeddings are 32 wide, but the U-Net was built for text_dim 64"
    assert "cannot read text embeddings" in refused("sample", "--model", model, "--embeddings", "nothing.safetensors")


# ---- evaluate


def test_evaluate_reports_both_splits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastimagen.evaluation.shape_reader")
    arguments = ["evaluate", "--model", str(model), "--count", "4", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "seen single" in printed and "unseen" in printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    for split in ("seen", "unseen"):
        figures = report["accuracy"][split]
        assert sum(kind["count"] for kind in figures.values()) == 4
        assert all(
            0 <= value["mean"] <= 1 for kind in figures.values() for value in kind.values() if isinstance(value, dict)
        )
        assert (tmp_path / f"out/{split}.png").exists()
    assert report["count"] == 4 and report["versions"]["fastimagen"] == __version__


def test_evaluate_of_nothing(model: Path, refused: Callable[..., str]) -> None:
    said = refused("evaluate", "--model", model, "--count", "0", "--out", "out")
    assert said == "count must be at least 1, got 0"


# ---- export, shards, embed


def test_export_and_sample(toy_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy_run(tmp_path / "run", toy_config)
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    sample("--model", tmp_path / "model", "--captions", "a red circle", "--out", tmp_path / "out", "--guidance", 1)
    assert (tmp_path / "out/images/000000.png").exists()


def test_export_of_a_run_that_is_not_there_or_not_trained(
    toy_config: dict, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert (
        refused("export", "--run", "run", "--out", "model") == "run is no run directory: there is no config.json in it"
    )
    write_toy_run(tmp_path / "run", toy_config, stages=("base",))
    assert refused("export", "--run", "run", "--out", "model") == "run: stage sr has no checkpoint yet; train it first"
    cut(tmp_path / "run/checkpoints/base/step-00000010/ema.safetensors")
    assert refused("export", "--run", "run", "--out", "model").startswith(
        "cannot read weights run/checkpoints/base/step-00000010/ema.safetensors"
    )


def test_shards_of_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused("shards", "folder", "pictures", "--out", "out") == "pictures is no folder of pictures"
    assert refused("shards", "folder", "list.jsonl", "--out", "out") == "there is no manifest list.jsonl"
    (tmp_path / "pictures").mkdir()
    assert "nothing to pack for out" in refused("shards", "folder", "pictures", "--out", "out")
    (tmp_path / "pictures/a.txt").write_text("a caption of nothing")
    assert "1 caption without picture" in refused("shards", "folder", "pictures", "--out", "out")
    said = refused("shards", "folder", "pictures", "--out", "out", "--shard-size", "0")
    assert "at least one sample" in said
    assert "size >= 16" in refused("shards", "shapes", "--out", "out", "--size", "8")


def test_import_of_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "nowhere" in refused("import-minimagen", "nowhere", "--out", "out")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("import-minimagen", "empty", "--out", "out")


@pytest.mark.parametrize(
    ("content", "overrides", "complaint"),
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
            [],
            "no shards: nowhere is no tar, folder",
        ),
    ],
)
def test_embed_with_a_broken_configuration(
    content: str | None, overrides: list[str], complaint: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    options = [word for override in overrides for word in ("--set", override)]
    assert refused("embed", "--config", "ds.json", *options).startswith(complaint)


def test_embed_fills_the_cache_once(
    toy_config: dict, write_config: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "--config", str(write_config(toy_config))]) == 0
    assert "0 shards written, 2 kept" in capsys.readouterr().out


# ---- the end of the command


def test_errors_of_many_lines_and_of_the_disk_are_one_line(
    toy_config: dict, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy_run(tmp_path / "run", toy_config)
    (tmp_path / "note").write_text("a file, where a folder should be")
    assert "note" in refused("export", "--run", "run", "--out", "note/model")
    monkeypatch.setattr("fastimagen.info.report", lambda: raising(ValueError("two\n  lines")))
    assert refused("info") == "two lines"


def raising(error: BaseException) -> None:
    raise error


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastimagen.info.report", lambda: raising(KeyboardInterrupt()))
    assert main(["info"]) == 130 and capsys.readouterr().err == "interrupted\n"
