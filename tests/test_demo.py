"""The web page, served by the real command: over HTTP, and in a headless Chromium where there is one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from fastimagen import demo
from fastimagen.cli import main
from fastimagen.config import SamplingConfig
from fastimagen.images import to_uint8
from fastimagen.sampling.output import Output
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.sampling.request import SamplingRequest
from fastimagen.sampling.settings import sampling_settings
from tests.conftest import ROOT, write_toy_encoder, write_toy_model

gradio_client = pytest.importorskip("gradio_client")
CAPTION = "a small blue star on a white background"


def stage_values(**settings: Any) -> tuple[Any, ...]:
    """The controls of one stage: `settings`, and what the toy model has for the others."""
    return tuple(settings.get(setting.name, setting.default) for setting in sampling_settings())


STAGES = (
    *stage_values(sampler="dpmpp_2m", steps=2, guidance=2.0),
    *stage_values(sampler="ddim", steps=3, guidance=1.0),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


# The command, with a log of every host that it looks up or connects to.
WATCHED = """
import sys

log = open(sys.argv.pop(1), "w", buffering=1)

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        print(arguments[1][0], file=log)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(arguments[0], file=log)

sys.addaudithook(watch)
from fastimagen.cli import main
sys.exit(main())
"""


class Server(NamedTuple):
    """The page in a process of its own, its temporary folder, and the log of the hosts it contacted."""

    process: subprocess.Popen[str]
    url: str
    temporary: Path
    hosts: Path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary, hosts = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("hosts") / "hosts"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    command = [sys.executable, "-c", WATCHED, hosts, "demo", "--model", model, "--port", port]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/"), line + process.stdout.read()
        yield Server(process, line.split()[0], temporary, hosts)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return server.url


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradio_client.Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def generate(
    client: Any,
    captions: str,
    *,
    negative: str = "",
    seed: int | None = 5,
    count: int = 1,
    stages: tuple[Any, ...] = STAGES,
) -> tuple[list[np.ndarray], dict, Path]:
    """(images, settings shown, file to download) of one click on Generate."""
    job = client.submit(captions, negative, seed, count, *stages, api_name="/generate")
    gallery, _, record, download = job.result(timeout=60)
    return [np.asarray(Image.open(entry["image"])) for entry in gallery["value"]], record, Path(download["value"])


def expected(model: Path, captions: list[str], **options: Any) -> np.ndarray:
    return to_uint8(ImagenPipeline.from_pretrained(model)(captions, **options).images).numpy()


def test_the_page_names_the_model(model: Path, url: str) -> None:
    page = urlopen(url).read().decode()
    assert str(model) in page and "base 8x8" in page and "sr 16x16" in page


def test_the_images_are_those_of_the_pipeline_and_of_the_downloaded_settings(model: Path, client: Any) -> None:
    images, record, download = generate(client, f"{CAPTION}\n\na red circle", negative="a green square", count=2)
    settings = json.loads(download.read_text())
    assert settings == record and settings["negative"] == ["a green square"]
    stages = settings["stages"]
    assert (*stages["base"].values(), *stages["sr"].values()) == STAGES
    captions = [sample["caption"] for sample in settings["samples"]]
    assert captions == [CAPTION, CAPTION, "a red circle", "a red circle"]
    seeds = [sample["seed"] for sample in settings["samples"]]
    assert seeds == [5, 6, 7, 8]
    chosen = {key: {name: stage[key] for name, stage in stages.items()} for key in ("sampler", "steps", "guidance")}
    assert np.array_equal(images, expected(model, captions, seeds=seeds, negative=settings["negative"], **chosen))
    replayed = ImagenPipeline.from_pretrained(model).sample(SamplingRequest.from_record(download))
    assert np.array_equal(images, to_uint8(replayed.images).numpy())


def test_every_sampling_setting_has_a_control_for_each_stage(url: str) -> None:
    with urlopen(f"{url}config") as answer:
        components = json.load(answer)["components"]
    labels = [component["props"].get("label") for component in components]
    for name in SamplingConfig.model_fields:
        assert labels.count(name.replace("_", " ").capitalize()) == 2, name


def test_warnings_of_the_text_encoder_are_shown(client: Any) -> None:
    job = client.submit(f"{CAPTION}\na <b>象</b>", "", 5, 1, *STAGES, api_name="/generate")
    status = job.result(timeout=60)[1]
    assert status.startswith("2 images in ")
    assert status.count("Warning: ") == 1 and "&quot;a &lt;b&gt;象" in status


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(captions="  \n "), "Enter a caption first"),
        (dict(captions="a red circle\n" * 5, count=16), "80 images at once are too many: the maximum is 64"),
        (dict(captions="a red circle", seed=None), "Enter a seed: an integer of 0 or more"),
        (dict(captions="a red circle", seed=2**60), "greater than maximum"),
        (
            dict(captions="a red circle", stages=(*stage_values(steps=999), *stage_values())),
            "999 is greater than maximum value 256",
        ),
        (
            dict(captions="a red circle", stages=(*stage_values(sampler="euler"), *stage_values())),
            "Value: euler is not in the list of choices",
        ),
        (
            dict(captions="a red circle", negative="blue", stages=stage_values(steps=2, guidance=1.0) * 2),
            "guidance is 1: raise it",
        ),
    ],
)
def test_a_mistake_is_one_line_and_the_next_request_works(inputs: dict[str, Any], message: str, client: Any) -> None:
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        generate(client, **inputs)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(generate(client, CAPTION)[0]) == 1


def test_previews_are_shown_while_sampling(client: Any) -> None:
    job = client.submit(f"{CAPTION}\na red circle", "", 5, 1, *STAGES, api_name="/generate")
    job.result()
    first, *_, last = [(len(gallery["value"]), status, record) for gallery, status, record, _ in job.outputs()]
    assert first == (2, "Stage base: step 1 of 2", None)
    assert last[0] == 2 and last[1].startswith("2 images in ") and last[2] is not None


def test_concurrent_visitors_get_their_own_images(model: Path, client: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        images = list(pool.map(lambda seed: generate(client, CAPTION, seed=seed)[0], (1, 2, 3)))
    settings = {
        "steps": {"base": 2, "sr": 3},
        "guidance": {"base": 2.0, "sr": 1.0},
        "sampler": {"base": "dpmpp_2m", "sr": "ddim"},
    }
    assert np.array_equal(np.concatenate(images), expected(model, [CAPTION] * 3, seeds=[1, 2, 3], **settings))


def test_without_gradio_the_error_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastimagen.extras.find_spec", lambda name: None)
    assert main(["demo", "--model", str(model)]) == 1
    assert capsys.readouterr().err == "error: the web page needs gradio: pip install --editable '.[demo]'\n"


def test_a_model_without_text_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_model(tmp_path / "model")
    assert main(["demo", "--model", str(model)]) == 1
    expected = f"error: {model} names no text encoder: the web page needs one to read captions\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("port", "reason"), [(None, "Address already in use"), ("99999", "port must be 0-65535")])
def test_a_port_that_cannot_be_used_is_a_one_line_error(
    port: str | None, reason: str, model: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = port or url.rstrip("/").rpartition(":")[2]
    assert main(["demo", "--model", str(model), "--port", port]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ") and error.count("\n") == 1
    assert reason in error


# ---- sampling in the background

REQUEST = SamplingRequest(captions=["a"])


def sample_endlessly(request: SamplingRequest, *, callback: Any, batch_size: int) -> Output:
    for step in count():
        callback("base", step, None, torch.zeros(1, 3, 4, 4))
    raise AssertionError


def test_sampling_stops_when_its_visitor_leaves() -> None:
    worker = demo.Worker()
    items = demo.sample_in_background(worker, sample_endlessly, REQUEST)
    stage, step, pixels = next(items)
    assert (stage, step, tuple(pixels.shape), int(pixels.max())) == ("base", 0, (1, 4, 4, 3), 128)
    items.close()
    try:
        assert worker.thread.submit(lambda: "free").result(timeout=20) == "free"
    finally:
        worker.close()


def test_previews_do_not_pile_up_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(torch.zeros(1, 3, 4, 4), ["a"], [0])

    def sample(request: SamplingRequest, *, callback: Any, batch_size: int) -> Output:
        for step in range(100):
            callback("base", step, None, torch.zeros(1, 3, 4, 4))
        return output

    monkeypatch.setattr(demo, "PREVIEW_SECONDS", 0.0)
    worker = demo.Worker()
    items = demo.sample_in_background(worker, sample, REQUEST)
    next(items)
    worker.thread.shutdown()  # waits
    rest = list(items)
    assert len(rest) <= 2 and rest[-1] is output


# ---- in a browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def is_foreign(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path
        chromium = next(filter(None, map(shutil.which, (*names, own))), None)
        if chromium is None:
            pytest.skip("no Chromium is installed: no browser test")
        browser = running.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.route(lambda address: is_foreign(address, url), lambda route: route.abort())
        page.goto(url)
        yield page
        browser.close()


def test_the_page_generates_images_in_a_browser(page: Any, url: str) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.reload()
    page.fill("#captions textarea", CAPTION)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.includes('4 images in ')", timeout=30000)
    images = page.locator("#gallery .grid-wrap img")
    assert images.count() == 4
    until = time.monotonic() + 10
    sizes: list[int] = []
    while sizes != [16] * 4:
        assert time.monotonic() < until, sizes
        sizes = images.evaluate_all("all => all.map(one => one.naturalWidth)")
    assert [address for address in asked if is_foreign(address, url)] == []
    assert complaints == []


# ---- the end of the server


def test_the_server_contacts_no_other_host(client: Any, server: Server) -> None:
    generate(client, CAPTION)
    assert set(server.hosts.read_text().split()) <= {"127.0.0.1"}


def test_terminating_the_server_while_it_samples_leaves_no_files(client: Any, server: Server) -> None:
    job = client.submit(
        CAPTION, "", 0, 16, *stage_values(sampler="heun", steps=250, guidance=2.0) * 2, api_name="/generate"
    )
    until = time.monotonic() + 20
    while not job.outputs():
        assert time.monotonic() < until
        time.sleep(0.05)
    server.process.terminate()
    printed = server.process.communicate(timeout=60)[0]
    assert server.process.returncode == 0, printed
    assert list(server.temporary.iterdir()) == []
