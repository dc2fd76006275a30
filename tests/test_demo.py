"""The web page, served by the real command: over HTTP, and in a headless Chromium where there is one."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from fastimagen.cli import main
from fastimagen.config import SamplingConfig
from fastimagen.demo import drawing
from fastimagen.demo.inputs import MAX_BODY, MAX_CHARACTERS, MAX_UPLOAD
from fastimagen.demo.results import MAX_RESULTS, Results
from fastimagen.demo.server import serve
from fastimagen.images import to_uint8
from fastimagen.sampling.output import Output
from fastimagen.sampling.pipeline import ImagenPipeline
from fastimagen.sampling.request import SamplingRequest
from fastimagen.sampling.settings import sampling_settings
from tests.conftest import ROOT, write_toy_encoder, write_toy_model

gradio_client = pytest.importorskip("gradio_client")
CAPTION = "a small blue star on a white background"
NO_IMAGE = (None, None, 1.0, 5)


def stage_values(**settings: Any) -> tuple[Any, ...]:
    """The controls of one stage: `settings`, and what the toy model has for the others; empty for None."""
    values = (settings.get(setting.name, setting.default) for setting in sampling_settings())
    return tuple("" if value is None else value for value in values)


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
    image: Path | None = None,
    mask: Path | None = None,
    strength: float = 1.0,
    stages: tuple[Any, ...] = STAGES,
) -> tuple[list[np.ndarray], dict, Path]:
    """(images, settings shown, file to download) of one click on Draw."""
    files = [None if path is None else gradio_client.handle_file(path) for path in (image, mask)]
    job = client.submit(captions, negative, seed, count, *files, strength, 2, *stages, api_name="/draw")
    gallery, _, record, download = job.result(timeout=60)[:4]
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
    assert tuple("" if value is None else value for stage in stages.values() for value in stage.values()) == STAGES
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
    job = client.submit(f"{CAPTION}\na <b>象</b>", "", 5, 1, *NO_IMAGE, *STAGES, api_name="/draw")
    status = job.result(timeout=60)[1]
    assert status.startswith("2 images in ")
    assert status.count("Warning: ") == 1 and "&quot;a &lt;b&gt;象" in status


def test_an_image_is_inpainted_where_the_mask_is_white(model: Path, client: Any, tmp_path: Path) -> None:
    """The files are not square: their central squares are used."""
    image, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    white = np.zeros((16, 20), np.uint8)
    white[:8] = 255
    Image.fromarray(white).save(mask)
    (drawn,), record, _ = generate(client, CAPTION, image=image, mask=mask, strength=0.5)
    difference = np.abs(drawn.astype(int) - pixels[:, 2:18])
    assert difference[8:].max() <= 1 < difference[:8].mean()
    assert record["init_image"]["strength"] == 0.5 and record["init_image"]["num_resamples"] == 2
    with pytest.raises(gradio_client.exceptions.AppError, match=r"A mask needs an init image"):
        generate(client, CAPTION, mask=mask)
    Image.fromarray(white[:, :9]).save(mask)
    with pytest.raises(gradio_client.exceptions.AppError, match=r"the mask is 9x16, the init image is 20x16"):
        generate(client, CAPTION, image=image, mask=mask)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(captions="  \n "), "Enter a caption first"),
        (dict(captions="a red circle\n" * 5, count=16), "80 images at once are too many: the maximum is 64"),
        (dict(captions="a red circle", seed=None), "Enter a seed: an integer of 0 or more"),
        (dict(captions="a red circle", seed=2**60), "greater than maximum"),
        (dict(captions="a" * (MAX_CHARACTERS + 1)), f"{MAX_CHARACTERS + 1} characters of captions are too many"),
        (dict(captions="a red circle", image=Path(__file__)), "cannot identify image file"),
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
    job = client.submit(f"{CAPTION}\na red circle", "", 5, 1, *NO_IMAGE, *STAGES, api_name="/draw")
    job.result()
    first, *_, last = [(len(gallery["value"]), status, record) for gallery, status, record, *_ in job.outputs()]
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


# ---- who is served


def status_of(url: str, path: str = "", *, body: int | None = None, **headers: str) -> int:
    """The status of a request: a GET, or the beginning of a POST that announces `body` bytes."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    connection.putrequest("GET" if body is None else "POST", f"/{path}", skip_host="Host" in headers)
    if body is not None and "Transfer_Encoding" not in headers:
        headers = {"Content_Length": str(body), **headers}
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    return connection.getresponse().status


def test_only_its_own_names_are_served(url: str) -> None:
    port = urlsplit(url).port
    for host in (
        "127.0.0.1",
        f"localhost:{port}",
        f"127.0.0.1:{port}",
        f"10.1.2.3:{port}",
        "[::1]",
        socket.gethostname(),
    ):
        assert status_of(url, Host=host) == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
        assert status_of(url, Host=host) == 421, host


def test_a_body_that_is_too_large_is_refused_before_it_is_read(url: str) -> None:
    join = "gradio_api/queue/join"
    assert status_of(url, join, body=MAX_BODY + 1) == 413
    assert status_of(url, "gradio_api/upload", body=MAX_UPLOAD + MAX_BODY + 1) == 413
    assert status_of(url, join, body=0, Transfer_Encoding="chunked") == 411


@pytest.mark.parametrize("auth", [None, "me:a:word"])
def test_a_password_is_handed_to_the_server(
    auth: str | None, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradio as gr

    passed: dict[str, Any] = {}

    def launch(self: gr.Blocks, **settings: Any) -> tuple[None, str, None]:
        passed.update(settings)
        return None, "http://here/", None

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(
        "fastimagen.demo.server.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupt))
    )
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    serve(ImagenPipeline.from_pretrained(model), host="0.0.0.0", port=0, auth=auth)
    assert passed["auth"] == (auth and ("me", "a:word"))
    assert ("Everyone who reaches this address" in capsys.readouterr().out) == (auth is None)


@pytest.mark.parametrize("auth", ["me", "me:", ":word"])
def test_a_password_without_user_is_refused(auth: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(model), "--auth", auth]) == 1
    assert capsys.readouterr().err == "error: --auth must be USER:PASSWORD\n"


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
    worker = drawing.Worker()
    items = drawing.sample_in_background(worker, sample_endlessly, REQUEST)
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

    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 0.0)
    worker = drawing.Worker()
    items = drawing.sample_in_background(worker, sample, REQUEST)
    next(items)
    worker.thread.shutdown()  # waits
    rest = list(items)
    assert len(rest) <= 2 and rest[-1] is output


def test_stop_ends_with_a_preview_of_the_last_step() -> None:
    worker, stop = drawing.Worker(), threading.Event()
    items = drawing.sample_in_background(worker, sample_endlessly, REQUEST, stop)
    next(items)
    stop.set()
    rest = list(items)
    assert 1 <= len(rest) <= 2 and all(item[0] == "base" for item in rest)
    assert list(drawing.sample_in_background(worker, sample_endlessly, REQUEST, stop)) == []  # stopped while it waited
    worker.close()


def test_a_stop_belongs_to_one_request_of_one_visitor() -> None:
    visits = drawing.Visits()
    visits.begin("a")
    visits.begin("b")
    visits.stop("a")
    assert visits.signal("a").is_set() and not visits.signal("b").is_set()
    visits.begin("a")
    assert not visits.signal("a").is_set()


def test_results_are_found_by_their_key_alone_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "results")
    output = Output(torch.zeros(2, 3, 4, 4), ["a", "b"], [0, 1], {"model": "m"})
    key = results.add(output, "2 images")
    found = results.get(key)
    assert found is not None and (found.status, found.record) == ("2 images", {"model": "m"})
    assert [(Path(path).name, caption) for path, caption in found.images] == [("000000.png", "a"), ("000001.png", "b")]
    shutil.copytree(tmp_path / "results" / key, tmp_path / ("x" * 22))
    for other in (None, "", 5, "..", f"../{'x' * 22}", key[:-1] + ("a" if key[-1] != "a" else "b")):
        assert results.get(other) is None
    monkeypatch.setattr("fastimagen.demo.results.MAX_RESULTS", 2)
    os.utime(tmp_path / "results" / key, (0, 0))
    newer = [results.add(output, "2 images") for _ in range(2)]
    assert results.get(key) is None and all(results.get(name) for name in newer) and MAX_RESULTS > 2


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path
        chromium = next(filter(None, map(shutil.which, (*names, own))), None)
        if chromium is None:
            pytest.skip("no Chromium is installed: no browser test")
        browser = running.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


RECORD_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) window.shifts.push(shift.value);
}).observe({type: "layout-shift"});
"""
READY = "#status[role=status]"  # set by the script that runs when the page has loaded
IS_IN_VIEW = """
(box => box.top >= 0 && box.top < 0.25 * window.innerHeight)(document.querySelector("#gallery").getBoundingClientRect())
"""


class Page(NamedTuple):
    """The page in a browser: what it asked for, and its complaints."""

    tab: Any
    asked: list[str]
    complaints: list[str]

    def wait_for_status(self, text: str) -> None:
        self.tab.wait_for_function(f"document.querySelector('#status')?.innerText.includes({text!r})", timeout=60000)

    @property
    def sizes(self) -> list[int]:
        """Widths of the images in the gallery, in their own pixels."""
        return self.tab.locator("#gallery .grid-wrap img").evaluate_all("all => all.map(one => one.naturalWidth)")

    def wait_for_sizes(self, expected: list[int]) -> None:
        until = time.monotonic() + 10
        while self.sizes != expected:
            assert time.monotonic() < until, self.sizes
            time.sleep(0.05)


def open_page(browser: Any, url: str, width: int, height: int) -> Page:
    tab = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page = Page(tab, [], [])
    tab.route(lambda address: is_foreign(address, url), lambda route: route.abort())
    tab.on("request", lambda request: page.asked.append(request.url))
    tab.on("pageerror", lambda error: page.complaints.append(str(error)))
    tab.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    tab.add_init_script(RECORD_SHIFTS)
    tab.goto(url)
    tab.wait_for_selector(READY)
    return page


def serious_barriers(tab: Any) -> list[Any]:
    """What axe finds of serious or critical impact, with everything on the page unfolded."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    for accordion in tab.locator("button.label-wrap").all():
        accordion.click()
    tab.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    violations = tab.evaluate("axe.run()")["violations"]
    return [
        (violation["id"], node["target"])
        for violation in violations
        for node in violation["nodes"]
        if violation["impact"] in ("serious", "critical")
    ]


def test_the_page_draws_keeps_and_shows_again(browser: Any, url: str) -> None:
    page = open_page(browser, url, 1280, 860)
    page.tab.fill("#captions textarea", " ")
    page.tab.click("#draw")
    page.tab.get_by_text("Enter a caption first").wait_for()
    page.wait_for_status("Nothing was drawn")
    page.tab.fill("#captions textarea", CAPTION)
    page.tab.evaluate("window.shifts = []")
    page.tab.keyboard.press("Control+Enter")
    page.wait_for_status("4 images in ")
    page.wait_for_sizes([16] * 4)
    assert sum(page.tab.evaluate("window.shifts")) < 0.01, "the layout moves when images come"

    for scheme in ("light", "dark"):
        page.tab.emulate_media(color_scheme=scheme)
        page.tab.reload()
        page.wait_for_status("4 images in ")
        page.wait_for_sizes([16] * 4)
        assert serious_barriers(page.tab) == [], scheme
    assert [address for address in page.asked if is_foreign(address, url)] == []
    assert page.complaints == []


def test_on_a_phone_the_images_come_into_view_and_stop_keeps_them(browser: Any, url: str) -> None:
    page = open_page(browser, url, 390, 664)
    assert not page.tab.evaluate(IS_IN_VIEW)
    page.tab.fill("#captions textarea", CAPTION)
    page.tab.get_by_role("button", name="Stage base").click()
    page.tab.get_by_label("number input for Steps").first.fill("256")
    page.tab.click("#draw")
    page.wait_for_status("Stage base: step ")
    page.tab.wait_for_function(IS_IN_VIEW, timeout=10000)
    page.tab.click("#stop")
    page.wait_for_status("Stopped at stage base, step ")
    page.wait_for_sizes([8] * 4)
    assert page.tab.get_by_text("Error", exact=True).count() == 0
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 390
    assert page.complaints == []


def test_a_visitor_logs_in_with_the_right_password_only(
    browser: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradio as gr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving, leave = threading.Event(), threading.Event()

    def wait() -> None:
        serving.set()
        leave.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastimagen.demo.server.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=wait)))
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # only the main thread may
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    pipe = ImagenPipeline.from_pretrained(model)
    server = threading.Thread(target=serve, args=(pipe,), kwargs={"port": port, "auth": "me:a:word"})
    server.start()
    try:
        assert serving.wait(timeout=60)
        url = f"http://127.0.0.1:{port}/"
        assert status_of(url, "config") == 401, "what the page consists of is for those who have logged in"
        tab = browser.new_context(viewport={"width": 390, "height": 664}).new_page()
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(url)

        def log_in(password: str) -> None:
            tab.get_by_label("username").fill("me")
            tab.get_by_label("password").fill(password)
            tab.get_by_role("button", name="Login").click()

        tab.get_by_label("username").wait_for()
        log_in("a")
        tab.get_by_text("Incorrect Credentials").wait_for()
        assert tab.locator("#draw").count() == 0
        log_in("a:word")
        tab.wait_for_selector(READY)
        assert tab.locator("#draw").count() == 1
        assert [address for address in asked if is_foreign(address, url)] == []
    finally:
        leave.set()
        server.join(timeout=60)
        gr.close_all()


# ---- the end of the server


def test_the_server_contacts_no_other_host(client: Any, server: Server) -> None:
    generate(client, CAPTION)
    assert set(server.hosts.read_text().split()) <= {"127.0.0.1"}


def test_terminating_the_server_while_it_samples_leaves_no_files(client: Any, server: Server) -> None:
    with pytest.raises(gradio_client.exceptions.AppError):
        generate(client, " ")
    job = client.submit(
        CAPTION, "", 0, 16, *NO_IMAGE, *stage_values(sampler="heun", steps=250, guidance=2.0) * 2, api_name="/draw"
    )
    until = time.monotonic() + 20
    while not job.outputs():
        assert time.monotonic() < until
        time.sleep(0.05)
    server.process.terminate()
    printed = server.process.communicate(timeout=60)[0]
    assert server.process.returncode == 0, printed
    assert "page: Enter a caption first\n" in printed and "Traceback" not in printed
    assert list(server.temporary.iterdir()) == []
