"""Adapters put on a model as it is loaded: what it then computes, what its files stay, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastimagen.cli import main
from fastimagen.config import CascadeConfig
from fastimagen.network_config import LoraConfig
from fastimagen.networks.build import build_network
from fastimagen.networks.network import Network
from fastimagen.sampling.adapters import ADAPTER_FILE, parse_adapters
from fastimagen.sampling.load import Lora
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.text.embeddings import TextEmbeddings
from tests.conftest import toy_cascade, write_toy_model
from tests.networks.test_lora import NETWORKS, output

RANK = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of one stage for every kind of network, and of two stages."""
    folder, config, found = tmp_path_factory.mktemp("models"), toy_cascade(), {}
    for kind, unet in NETWORKS.items():
        stage = config.stages[1 if unet.lowres else 0].model_copy(update={"unet": unet, "name": kind, "size": 8})
        found[kind] = write_toy_model(folder / kind, config=CascadeConfig(stages=(stage,)))
    return {**found, "cascade": write_toy_model(folder / "cascade")}


def network(model: Path, stage: str, lora: Lora | None = None) -> Network:
    unet = ImagenPipeline.from_pretrained(model, lora=lora).cascade.unets[stage]
    assert isinstance(unet, Network)
    return unet


def adapters(model: Path, stage: str, seed: int) -> tuple[Network, dict[str, Tensor]]:
    """The network of a stage with random adapters beside its layers, and the adapters."""
    torch.manual_seed(seed)
    plain = network(model, stage)
    adapted = build_network(plain.config, LoraConfig(rank=RANK))
    adapted.load_state_dict(plain.state_dict(), strict=False)
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in trained.items():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return adapted, {name: weight.detach() for name, weight in trained.items()}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_model_with_adapters_computes_what_trained_and_its_files_stay(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two adapters: beside the layers as in training, and added up with their scales as the model is loaded."""
    model = models[kind]
    before = (model / kind / "model.safetensors").read_bytes()
    (adapted, first), (_, second) = (adapters(model, kind, seed) for seed in (0, 1))
    one = write(tmp_path / "one" / ADAPTER_FILE, {f"unet.{name}": weight for name, weight in first.items()})
    expected, plain = output(adapted), output(network(model, kind))
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (output(network(model, kind, one.parent)) - expected).abs().max() <= 1e-5 * expected.abs().max()

    other = write(tmp_path / "two" / kind / ADAPTER_FILE, second)
    for name, weight in first.items():  # scale * B A, of both: the matrices side by side
        layer = adapted.get_submodule(name.rpartition(".lora_")[0])
        if ".lora_A." in name:
            layer.lora_A.weight = torch.nn.Parameter(torch.cat([weight, second[name]]))
        else:
            layer.lora_B.weight = torch.nn.Parameter(torch.cat([0.5 * weight, -2.0 * second[name]], dim=1))
    expected = output(adapted)
    both = network(model, kind, {str(one): 0.5, str(other.parents[1]): -2.0})
    assert (output(both) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model / kind / "model.safetensors").read_bytes() == before
    assert torch.equal(output(network(model, kind)), plain)


def test_the_command_puts_adapters_on_and_records_them(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And its samples.json is not reproduced without them."""
    model = models["cascade"]
    _, weights = adapters(model, "base", 0)
    folder = write(tmp_path / "adapters/base" / ADAPTER_FILE, weights).parents[1]
    text = TextEmbeddings(torch.randn(1, 5, 64), torch.ones(1, 5, dtype=torch.bool))
    text.save(tmp_path / "text.safetensors", ["a word"])
    arguments = ["sample", "--model", str(model), "--embeddings", str(tmp_path / "text.safetensors"), "--device", "cpu"]
    for name, given in (("plain", []), ("with", ["--lora", f"{folder}:0.5"])):
        main([*arguments, *given, "--out", str(tmp_path / name)])
    images = [(tmp_path / name / "images/000000.png").read_bytes() for name in ("plain", "with")]
    records = [json.loads((tmp_path / name / "samples.json").read_text())["lora"] for name in ("plain", "with")]
    assert images[0] != images[1] and records == [{}, {str(folder): 0.5}]

    again = ["sample", "--model", str(model), "--device", "cpu", "--settings"]
    assert main([*again, str(tmp_path / "with/samples.json")]) != 0
    assert f"was sampled with adapters: give --lora {folder}:0.5" in capsys.readouterr().err
    assert main([*again, str(tmp_path / "plain/samples.json"), "--lora", str(folder)]) != 0
    assert "was sampled without adapters: leave out --lora" in capsys.readouterr().err


def test_scales_are_behind_a_colon(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert parse_adapters(["fox", "style:0.5", "./x:-1"]) == {"fox": 1.0, "style": 0.5, "./x": -1.0}
    assert parse_adapters([str(odd)]) == {str(odd): 1.0} and parse_adapters([f"{odd}:2"]) == {str(odd): 2.0}
    with pytest.raises(ValueError, match=r"--lora fox:much: 'much' is not a number; give PATH or PATH:SCALE"):
        parse_adapters(["fox:much"])
    with pytest.raises(ValueError, match="--lora fox is given twice"):
        parse_adapters(["fox:1", "fox:2"])


def broken(weights: dict[str, Tensor], case: str) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Adapters of the base stage with one fault, the file's metadata, and the message."""
    layer = next(name for name in weights if ".lora_A." in name).removesuffix(".lora_A.weight")
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    cases: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
        "half": ({down: weights[down]}, {}, f"{down} is there, but not {up}"),
        "rank": ({down: weights[down], up: weights[up][:, :1].contiguous()}, {}, r"has rank 2, and .*lora_B.weight 1"),
        "shape": (
            {down: weights[down][:, 1:].contiguous(), up: weights[up]},
            {},
            f"does not fit stage base: {layer} has .* inputs and .* outputs, its adapter",
        ),
        "layer": ({f"x.{down}": weights[down], f"x.{up}": weights[up]}, {}, f"it has no linear layer x.{layer}"),
        "key": ({f"text_encoder.{layer}.weight": weights[down]}, {}, "is not the adapter of a linear layer: LAYER"),
        "convolution": ({down: weights[down][..., None, None]}, {}, "is not the adapter of a linear layer: LAYER"),
        "empty": ({}, {}, "holds no adapters"),
        "settings": (
            {down: weights[down], up: weights[up]},
            {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True})},
            "was trained with PEFT's use_dora, which is not read",
        ),
        "metadata": (
            {down: weights[down], up: weights[up]},
            {"lora_adapter_metadata": "[]"},
            "does not have r and lora_alpha",
        ),
    }
    return cases[case]


@pytest.mark.parametrize(
    "case", ["half", "rank", "shape", "layer", "key", "convolution", "empty", "settings", "metadata"]
)
def test_adapters_that_do_not_fit_are_one_line(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    tensors, metadata, message = broken(adapters(models["cascade"], "base", 0)[1], case)
    file = write(tmp_path / "base" / ADAPTER_FILE, tensors, **metadata)
    with pytest.raises(ValueError, match=message) as error:
        network(models["cascade"], "base", tmp_path)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_the_stage_of_a_file_is_the_one_that_it_fits(models: dict[str, Path], tmp_path: Path) -> None:
    """Where both fit, a folder has to say which."""
    model = models["cascade"]
    weights = adapters(model, "sr", 0)[1]
    file = write(tmp_path / "any.safetensors", weights)
    for name, changes in (("base", False), ("sr", True)):
        plain, adapted = (network(model, name, lora).state_dict() for lora in (None, file))
        assert any(not torch.equal(adapted[key], weight) for key, weight in plain.items()) == changes
    alike = {name: weight for name, weight in weights.items() if name.startswith("middle1")}
    both = write(tmp_path / "both.safetensors", alike)
    with pytest.raises(ValueError, match=r"both.safetensors fits the stages base, sr: put it into a folder as STAGE/"):
        network(model, "sr", both)
    folder = write(tmp_path / "adapters/sr" / ADAPTER_FILE, alike).parents[1]
    plain = network(model, "base").state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in network(model, "base", folder).state_dict().items())


def test_paths_without_adapters_of_the_model_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["cascade"]
    file = write(tmp_path / "adapters/sr1024" / ADAPTER_FILE, adapters(model, "sr", 0)[1])
    for lora, message in (
        (file.parents[1], "is of stage sr1024, but the model has base, sr"),
        (tmp_path / "nowhere", r"--lora: .*nowhere does not exist"),
        (tmp_path, "has neither pytorch_lora_weights.safetensors nor STAGE/"),
        ({str(file): float("nan")}, "its scale is nan, but must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            network(model, "sr", lora)
    with pytest.raises(ValueError, match=r"fits no stage of the model \(if: it has no linear layer"):
        network(models["if"], "if", file)
