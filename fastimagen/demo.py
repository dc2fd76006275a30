"""A web page for a model: captions in, images and the settings that reproduce them out. Needs the `demo` extra."""

from __future__ import annotations

import os
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .cascade import Callback
from .config import SamplingConfig
from .files import write_json
from .images import from_pixels, to_uint8
from .sampling.output import Output
from .sampling.pipeline import ImagenPipeline
from .sampling.request import SamplingRequest
from .sampling.settings import Setting, sampling_settings
from .text.t5 import is_random_encoder

if TYPE_CHECKING:
    import gradio as gr

EXAMPLES = (
    "a large blue star at the top of a black background",
    "a large red triangle on the right of a white background",
    "a pink circle to the left of a blue triangle on a black background",
)  # of the built-in shapes
MAX_IMAGES = 64  # of one request
MAX_SEED = 2**53 - MAX_IMAGES  # a browser's numbers are exact up to 2^53, and the seeds of a request count up
PREVIEW_SECONDS = 0.3  # between two previews
PREVIEW_SIZE = 256  # pixels
CACHE_SECONDS = 24 * 3600  # how long an image stays on the disk while the page is served
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#gallery img {image-rendering: pixelated}
#gallery .grid-container {grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto}
#gallery .thumbnail-lg {aspect-ratio: auto; height: auto}
#gallery .thumbnail-lg img {aspect-ratio: 1}
#gallery .thumbnail-lg .caption-label {
    position: static; max-width: none; border: none; padding: 0; margin: 2px 6px 4px; font-size: 11px;
    line-height: 1.25; white-space: normal; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3}
"""


# ---- the page


def serve(pipe: ImagenPipeline, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until interrupted or terminated, then remove its temporary files.

    Raises ValueError if the model names no text encoder, or if the server cannot listen on host and port.
    """
    if pipe.text_encoder is None:
        raise ValueError(f"{pipe.source} names no text encoder: the web page needs one to read captions")
    _check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="fastimagen-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        import gradio as gr

        theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no download
        worker = Worker()
        app = build(pipe, worker, Path(folder))
        _, url, _ = app.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            prevent_thread_lock=True,
        )
        print(f"{url}  (stop with Ctrl-C)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            worker.close()


def _check_address(host: str, port: int) -> None:
    """Raise ValueError if nobody can listen on host and port; Gradio's own message is long."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot listen on {host}, port {port}: {reason}; change --host or --port") from None


def build(pipe: ImagenPipeline, worker: Worker, folder: Path) -> gr.Blocks:
    """The page. It samples for one visitor at a time, the others queue. Settings to download are written to folder."""
    import gradio as gr

    sizes = " → ".join(f"{stage.name} {stage.size}x{stage.size}" for stage in pipe.cascade.config.stages)
    with gr.Blocks(
        title=f"fastimagen: {Path(pipe.source).name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(CACHE_SECONDS // 24, CACHE_SECONDS),
    ) as app:
        gr.Markdown(f"# fastimagen\n`{pipe.source}` on {pipe.device}: {sizes} pixels")
        with gr.Row():
            with gr.Column(scale=2):
                inputs, start, stop = _inputs(pipe)
            with gr.Column(scale=3):
                outputs = _outputs()
        sampling = start.click(
            _generate(pipe, worker, folder), inputs, outputs, api_name="generate", concurrency_limit=1
        )
        stop.click(None, cancels=[sampling])
    return app


def _inputs(pipe: ImagenPipeline) -> tuple[list[gr.components.Component], gr.Button, gr.Button]:
    """(captions, negative, seed, count, and the settings of every stage), the start and the stop button."""
    import gradio as gr

    assert pipe.text_encoder is not None  # serve checks it
    encoder = Path(pipe.source) / pipe.text_encoder["name"]
    shapes = is_random_encoder(encoder)  # the built-in encoder only suits the built-in shapes
    captions = gr.Textbox(
        label="Captions, one per line",
        lines=6,
        autofocus=True,
        elem_id="captions",
        value="\n".join(EXAMPLES) if shapes else "",
        info="This model was trained on captions like these." if shapes else None,
    )
    with gr.Row():
        count = gr.Slider(label="Images per caption", value=4, minimum=1, maximum=16, step=1, scale=3, buttons=[])
        seed = gr.Number(label="First seed", value=0, precision=0, minimum=0, maximum=MAX_SEED, scale=2)
    with gr.Row():
        start = gr.Button("Generate", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", elem_id="stop")
    negative = gr.Textbox(label="Negative caption (optional)", lines=1)
    controls = []
    for stage, config in pipe.cascade.settings().items():
        with gr.Accordion(f"Stage {stage}", open=False):
            controls += [control(setting, getattr(config, setting.name)) for setting in sampling_settings()]
    return [captions, negative, seed, count, *controls], start, stop


def _outputs() -> list[gr.components.Component]:
    """Gallery, status line, settings and their download."""
    import gradio as gr

    gallery = gr.Gallery(
        show_label=False,
        columns=4,
        height=560,
        format="png",
        elem_id="gallery",
        object_fit="contain",
        buttons=["download", "fullscreen"],
    )
    status = gr.Markdown("", elem_id="status")
    with gr.Accordion("Settings that reproduce these images", open=False):
        record = gr.JSON(show_label=False)
    download = gr.DownloadButton("Download settings", interactive=False)
    return [gallery, status, record, download]


def control(setting: Setting, value: Any) -> gr.components.Component:
    """The control of one sampling setting: a list of choices, a slider, a checkbox, or a field that may be empty."""
    import gradio as gr

    label = setting.name.replace("_", " ").capitalize()
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, label=label, info=setting.help)
    if setting.kind is bool:
        return gr.Checkbox(value=value, label=label, info=setting.help)
    if setting.kind is str:
        return gr.Textbox(value=value, label=label, info=setting.help)
    whole = setting.kind is int
    if setting.optional:
        return gr.Number(
            value=value,
            label=label,
            info=setting.help,
            precision=0 if whole else None,
            minimum=setting.minimum,
            maximum=setting.maximum,
        )
    minimum = setting.minimum or 0
    maximum = setting.maximum
    if maximum is None:
        maximum = max(8 * setting.default, value, 1)  # a slider needs an end
    step: float = 1 if whole else 0.1 if maximum - minimum > 1 else 0.001
    if setting.excludes_minimum:
        minimum += step
    return gr.Slider(label=label, info=setting.help, value=value, minimum=minimum, maximum=maximum, step=step)


# ---- what the button does


def _generate(pipe: ImagenPipeline, worker: Worker, folder: Path) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """The handler of the button: yields (gallery, status, record, download), previews first."""
    import gradio as gr

    def generate(captions: str, negative: str, seed: int | None, count: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        began = time.monotonic()
        try:
            request = page_request(list(pipe.cascade.unets), captions, negative, seed, int(count), values)
            settings = pipe.cascade.settings(**request.settings)
            for item in sample_in_background(worker, pipe.sample, request):
                if isinstance(item, Output):
                    yield _finished(item, int(count), time.monotonic() - began, folder)
                else:
                    yield _preview(item, request, settings, int(count))
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise gr.Error("CUDA out of memory: generate fewer images at once", print_exception=False) from None

    return generate


def page_request(
    stages: list[str], captions: str, negative: str, seed: int | None, count: int, values: tuple[Any, ...]
) -> SamplingRequest:
    """The request that the page's controls describe. values: those of all settings, stage by stage."""
    lines = [line.strip() for line in (captions or "").splitlines() if line.strip()]
    if not lines:
        raise ValueError("Enter a caption first")
    if seed is None:
        raise ValueError("Enter a seed: an integer of 0 or more")
    repeated = [line for line in lines for _ in range(count)]
    if len(repeated) > MAX_IMAGES:
        raise ValueError(f"{len(repeated)} images at once are too many: the maximum is {MAX_IMAGES}")
    settings: dict[str, dict[str, Any]] = {}
    remaining = iter(values)
    for stage in stages:
        for setting in sampling_settings():
            value = next(remaining)
            if value is not None:
                settings.setdefault(setting.name, {})[stage] = setting.check(value, f"Stage {stage}, {setting.name}")
    return SamplingRequest(
        captions=repeated,
        seeds=list(range(int(seed), int(seed) + len(repeated))),
        negative=[negative.strip()] if negative and negative.strip() else None,
        settings=settings,
    )


def _preview(
    item: Preview, request: SamplingRequest, settings: dict[str, SamplingConfig], count: int
) -> tuple[Any, ...]:
    """Outputs of the page after a step."""
    import gradio as gr

    stage, step, pixels = item
    status = f"Stage {stage}: step {step + 1} of {settings[stage].steps}"
    gallery = _gallery(pixels, request.labels, count, max_size=PREVIEW_SIZE)
    return gallery, status, None, gr.DownloadButton(interactive=False)


def _finished(output: Output, count: int, seconds: float, folder: Path) -> tuple[Any, ...]:
    """Outputs of the page at the end."""
    import gradio as gr

    path = folder / f"settings-{time.time_ns()}.json"
    write_json(path, output.record)
    lines = [f"{len(output.images)} images in {seconds:.1f} s"]
    lines += [f"Warning: {escape(warning)}" for warning in output.warnings]
    gallery = _gallery(to_uint8(output.images), output.captions, count)
    return gallery, "\n\n".join(lines), output.record, gr.DownloadButton(value=str(path), interactive=True)


def _gallery(pixels: Tensor, captions: list[str], count: int, max_size: int | None = None) -> gr.Gallery:
    """Images (B, H, W, C) uint8, at most max_size wide, with the images of a caption in one row if they fit."""
    import gradio as gr

    images = [from_pixels(image) for image in pixels.numpy()]
    if max_size is not None:
        for image in images:
            image.thumbnail((max_size, max_size))
    return gr.Gallery(list(zip(images, captions)), columns=count if 3 <= count <= 6 else 4)


# ---- sampling beside the page

Preview = tuple[str, int, Tensor]
"""Stage, step, current estimate of the images as pixels (B, H, W, C) uint8."""


class Cancelled(Exception):
    """The visitor has left or pressed Stop, or the server is shutting down."""


@dataclass(frozen=True)
class Worker:
    """Runs all sampling in one thread: CUDA graphs are recorded per thread."""

    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    closing: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Cancel the running request at its next step, and wait for it."""
        self.closing.set()
        self.thread.shutdown(cancel_futures=True)


class Sample(Protocol):
    """ImagenPipeline.sample."""

    def __call__(
        self, request: SamplingRequest, *, batch_size: int = 32, callback: Callback | None = None
    ) -> Output: ...


def sample_in_background(worker: Worker, sample: Sample, request: SamplingRequest) -> Iterator[Preview | Output]:
    """Yield a preview now and then while the worker samples, then the output. Raises what `sample` raises.

    When the iterator or the worker is closed, sampling stops at its next step.
    """
    items: queue.SimpleQueue[Preview | Output | Exception] = queue.SimpleQueue()
    closed = threading.Event()
    last_preview = -PREVIEW_SECONDS

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        nonlocal last_preview
        if closed.is_set() or worker.closing.is_set():
            raise Cancelled
        is_due = time.monotonic() - last_preview >= PREVIEW_SECONDS
        if is_due and items.empty():  # a slow reader gets fewer previews, not a backlog
            last_preview = time.monotonic()
            items.put((stage, step, to_uint8(x0).cpu()))

    def job() -> None:
        try:
            items.put(sample(request, callback=callback, batch_size=MAX_IMAGES))
        except Exception as error:  # raised again in the thread that reads the queue
            items.put(error)

    worker.thread.submit(job)
    try:
        while True:
            item = items.get()
            if isinstance(item, Cancelled):
                return
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Output):
                return
    finally:
        closed.set()
