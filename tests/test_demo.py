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
from fastimagen.images import to_uint8
from fastimagen.sampling.pipeline import ImagenPipeline
from tests.conftest import ROOT, write_toy_encoder, write_toy_model

gradio_client = pytest.importorskip("gradio_client")
CAPTION = "a small blue star on a white background"
STAGES = ("dpmpp_2m", 2, 2.0, "ddim", 3, 1.0)  # sampler, steps, guidance of base and of sr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return write_toy_model(folder / "model", write_toy_encoder(folder / "encoder"))


# The command, with a list of all hosts that it looks up or connects to.
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
    """The page in a process of its own, where it keeps its files, and whom it called."""

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


def draw(
    client: Any, captions: str, *, negative: str = "", seed: int | None = 5, count: int = 1, stages: tuple = STAGES
) -> tuple[list[np.ndarray], dict, Path]:
    job = client.submit(captions, negative, seed, count, *stages, api_name="/draw")
    gallery, _, record, download = job.result(timeout=60)
    return [np.asarray(Image.open(entry["image"])) for entry in gallery["value"]], record, Path(download["value"])


def expected(model: Path, captions: list[str], **options: Any) -> np.ndarray:
    return to_uint8(ImagenPipeline.from_pretrained(model)(captions, **options).images).numpy()


def test_the_page_names_the_model(model: Path, url: str) -> None:
    page = urlopen(url).read().decode()
    assert str(model) in page and "base 8x8" in page and "sr 16x16" in page


def test_pictures_are_those_of_the_pipeline_and_settings_make_them_again(model: Path, client: Any) -> None:
    pictures, record, download = draw(client, f"{CAPTION}\n\na red circle", negative="a green square", count=2)
    settings = json.loads(download.read_text())
    assert settings == record and settings["negative"] == ["a green square"]
    stages = settings["stages"]
    chosen = [tuple(stages[name][key] for key in ("sampler", "steps", "guidance")) for name in ("base", "sr")]
    assert chosen == [STAGES[:3], STAGES[3:]]
    wanted = [sample["caption"] for sample in settings["samples"]]
    assert wanted == [CAPTION, CAPTION, "a red circle", "a red circle"]
    seeds = [sample["seed"] for sample in settings["samples"]]
    assert seeds == [5, 6, 7, 8]
    again = expected(
        model,
        wanted,
        seeds=seeds,
        negative=settings["negative"],
        **{key: {name: stage[key] for name, stage in stages.items()} for key in ("sampler", "steps", "guidance")},
    )
    assert np.array_equal(pictures, again)


def test_what_the_text_encoder_cannot_read_is_said(client: Any) -> None:
    job = client.submit(f"{CAPTION}\na <b>象</b>", "", 5, 1, *STAGES, api_name="/draw")
    status = job.result(timeout=60)[1]
    assert status.startswith("2 pictures in ")
    assert status.count("Mind: ") == 1 and "does not know all of &quot;a &lt;b&gt;象" in status


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (dict(captions="  \n "), "Write a caption first"),
        (dict(captions="a red circle\n" * 5, count=16), "80 pictures at once are too many: at most 64"),
        (dict(captions="a red circle", seed=None), "Give a seed: any whole number from 0 on"),
        (dict(captions="a red circle", seed=2**60), "greater than maximum"),
        (dict(captions="a red circle", stages=("ddim", 999, *STAGES[2:])), "999 is greater than maximum value 250"),
        (dict(captions="a red circle", stages=("euler", *STAGES[1:])), "Value: euler is not in the list of choices"),
        (dict(captions="a red circle", negative="blue", stages=("ddim", 2, 1.0) * 2), "raise it"),
    ],
)
def test_a_mistake_is_one_line_and_the_server_goes_on(given: dict[str, Any], complaint: str, client: Any) -> None:
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        draw(client, **given)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert len(draw(client, CAPTION)[0]) == 1


def test_pictures_are_shown_while_they_come_to_be(client: Any) -> None:
    job = client.submit(f"{CAPTION}\na red circle", "", 5, 1, *STAGES, api_name="/draw")
    job.result()
    first, *_, last = [(len(gallery["value"]), status, record) for gallery, status, record, _ in job.outputs()]
    assert first == (2, "Stage base: step 1 of 2", None)
    assert last[0] == 2 and last[1].startswith("2 pictures in ") and last[2] is not None


def test_visitors_wait_for_each_other(model: Path, client: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda seed: draw(client, CAPTION, seed=seed)[0], (1, 2, 3)))
    steps, guidance = {"base": 2, "sr": 3}, {"base": 2.0, "sr": 1.0}
    again = expected(
        model,
        [CAPTION] * 3,
        seeds=[1, 2, 3],
        steps=steps,
        guidance=guidance,
        sampler={"base": "dpmpp_2m", "sr": "ddim"},
    )
    assert np.array_equal(np.concatenate(drawn), again)


def test_without_gradio_it_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert main(["demo", "--model", str(model)]) == 1
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install fastimagen[demo]\n"


def test_a_model_without_text_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_model(tmp_path / "model")
    assert main(["demo", "--model", str(model)]) == 1
    assert capsys.readouterr().err == (f"error: {model} names no text encoder: the page draws pictures for captions\n")


@pytest.mark.parametrize(("port", "reason"), [(None, "Address already in use"), ("99999", "port must be 0-65535")])
def test_a_port_that_cannot_be_had_is_one_line(
    port: str | None, reason: str, model: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = port or url.rstrip("/").rpartition(":")[2]
    assert main(["demo", "--model", str(model), "--port", port]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot listen at 127.0.0.1, port {port}: ") and said.count("\n") == 1
    assert reason in said


# ---- drawing beside the page


def endless(captions: list[str], *, callback: Any, batch_size: int) -> None:
    for step in count():
        callback("base", step, None, torch.zeros(1, 3, 4, 4))


def test_a_drawing_ends_when_its_visitor_leaves() -> None:
    studio = demo.Studio()
    drawing = demo.in_background(studio, endless, ["a"])
    stage, step, pixels = next(drawing)
    assert (stage, step, tuple(pixels.shape), int(pixels.max())) == ("base", 0, (1, 4, 4, 3), 128)
    drawing.close()
    try:
        assert studio.thread.submit(lambda: "free").result(timeout=20) == "free"
    finally:
        studio.close()


def test_a_slow_reader_keeps_no_heap_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(captions: list[str], *, callback: Any, batch_size: int) -> str:
        for step in range(100):
            callback("base", step, None, torch.zeros(1, 3, 4, 4))
        return "done"

    monkeypatch.setattr(demo, "SHOW_EVERY", 0.0)
    studio = demo.Studio()
    drawing = demo.in_background(studio, quick, ["a"])
    next(drawing)
    studio.thread.shutdown()  # waits
    rest = list(drawing)
    assert len(rest) <= 2 and rest[-1] == "done"


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


def test_in_a_browser(page: Any, url: str) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.reload()
    page.fill("#captions textarea", CAPTION)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.includes('4 pictures in ')", timeout=30000)
    pictures = page.locator("#gallery .grid-wrap img")
    assert pictures.count() == 4
    until = time.monotonic() + 10
    while not (sizes := pictures.evaluate_all("all => all.map(one => one.naturalWidth)")) == [16] * 4:
        assert time.monotonic() < until, sizes
    assert [address for address in asked if is_foreign(address, url)] == []
    assert complaints == []


# ---- at last


def test_the_server_asks_no_other_host(client: Any, server: Server) -> None:
    draw(client, CAPTION)
    assert set(server.hosts.read_text().split()) <= {"127.0.0.1"}


def test_terminated_amid_a_drawing_it_leaves_nothing(client: Any, server: Server) -> None:
    job = client.submit(CAPTION, "", 0, 16, "heun", 250, 2.0, "heun", 250, 2.0, api_name="/draw")
    until = time.monotonic() + 20
    while not job.outputs():
        assert time.monotonic() < until
        time.sleep(0.05)
    server.process.terminate()
    said = server.process.communicate(timeout=60)[0]
    assert server.process.returncode == 0, said
    assert list(server.temporary.iterdir()) == []
