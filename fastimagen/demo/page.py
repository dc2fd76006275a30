"""The layout of the page and its style."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade import has_use_for
from ..config import StageConfig
from ..sampling.pipeline import ImagenPipeline
from ..sampling.settings import Setting, sampling_settings
from ..text.t5 import is_random_encoder
from .drawing import Visits, Worker
from .handlers import Handlers
from .inputs import MAX_CHARACTERS, MAX_SEED
from .results import Results

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)

EXAMPLES = (
    "a large blue star at the top of a black background",
    "a large red triangle on the right of a white background",
    "a pink circle to the left of a blue triangle on a black background",
)  # of the built-in shapes
CACHE_SECONDS = 24 * 3600  # how long an image stays on the disk while the page is served
OUT_OF_MEMORY = "CUDA out of memory: draw fewer images at once"

CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
.gradio-container, .gradio-container > main {width: 100%}  /* not as wide as what is in it */
#gallery {height: 612px}  /* from the start: the page does not move when images come */
#gallery img {image-rendering: pixelated}
#gallery .grid-container {grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto}
#gallery .thumbnail-lg {aspect-ratio: auto; height: auto}
#gallery .thumbnail-lg img {aspect-ratio: 1}
#gallery .thumbnail-lg .caption-label {
    position: static; max-width: none; border: none; padding: 0; margin: 2px 6px 4px; font-size: 11px;
    line-height: 1.25; white-space: normal; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
    color: var(--body-text-color); background: none}
#progress {align-items: center; flex-wrap: nowrap; min-height: 54px}  /* two lines */
.min_value, .max_value {color: var(--body-text-color-subdued) !important}
#status .wrap, #gallery > .wrap {display: none}  /* Gradio's badge "Error": the message is shown anyway */
#record {overflow-x: auto}
#record .value {color: var(--body-text-color)}
@media (max-width: 640px) {
    #gallery {height: 440px}
    #gallery .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr))}
}
"""

# Ctrl+Enter draws. On a narrow screen the images are below the controls: Draw brings them into view, and Stop.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.querySelector("#draw").click();
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest("#draw")) return;
  const top = document.querySelector("#progress").getBoundingClientRect().top;
  if (top > window.innerHeight / 3) window.scrollBy({top: top - 8, behavior: "smooth"});
});
</script>
"""
# Roles that Gradio leaves out; screen readers announce the status line.
ROLES = """
() => {
  document.querySelector("#status").setAttribute("role", "status");
  for (const one of document.querySelectorAll("div[aria-label]:not([role])")) one.setAttribute("role", "group");
}
"""


def build(pipe: ImagenPipeline, worker: Worker, folder: Path) -> gr.Blocks:
    """The page. It samples for one visitor at a time, the others queue. Finished images are kept below `folder`."""
    import gradio as gr

    handlers = Handlers(pipe, worker, Visits(), Results(folder))
    sizes = " → ".join(f"{stage.name} {stage.size}x{stage.size}" for stage in pipe.cascade.config.stages)
    with page_class()(
        title=f"fastimagen: {Path(pipe.source).name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(CACHE_SECONDS // 24, CACHE_SECONDS),
    ) as app:
        gr.Markdown(f"# fastimagen\n`{pipe.source}` on {pipe.device}: {sizes} pixels")
        with gr.Row():
            with gr.Column(scale=2):
                inputs, draw = _inputs(pipe)
            with gr.Column(scale=3):
                outputs, stop = _outputs()
        last = gr.BrowserState(storage_key="fastimagen-last-images")
        status = outputs[1]
        quietly: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        begun = draw.click(with_request(handlers.begin), None, [status], **quietly)
        drawn = begun.then(
            with_request(handlers.draw),
            inputs,
            [*outputs, last],
            api_name="draw",
            concurrency_limit=1,
            show_progress="hidden",
        )
        drawn.failure(lambda: "Nothing was drawn", None, [status], **quietly)
        stop.click(with_request(handlers.stop), **quietly)
        app.load(handlers.restore, [last], outputs, **quietly)
        app.load(None, js=ROLES)
        app.unload(with_request(handlers.leave))
    return app


def with_request(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Have Gradio pass its request as `visitor`: it goes by annotations, which cannot name Gradio before its import."""
    import gradio as gr

    handler.__func__.__annotations__["visitor"] = gr.Request  # type: ignore[attr-defined]
    return handler


def page_class() -> type[gr.Blocks]:
    """gr.Blocks with errors that are one line in the page and one on the console."""
    import gradio as gr

    class Page(gr.Blocks):
        async def process_api(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
            try:
                return await super().process_api(*arguments, **keywords)
            except (gr.Error, ValueError, OSError, ImportError) as error:
                message = " ".join(str(getattr(error, "message", error)).split())
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                message = OUT_OF_MEMORY
            logger.info("page: %s", message)
            raise gr.Error(escape(message, quote=False), print_exception=False)

    return Page


# ---- the controls


def _inputs(pipe: ImagenPipeline) -> tuple[list[gr.components.Component], gr.Button]:
    """(captions, negative, seed, count, init image, mask, strength, resamples, settings of every stage), and Draw."""
    import gradio as gr

    assert pipe.text_encoder is not None  # serve checks it
    shapes = pipe.encoder_folder is not None and is_random_encoder(pipe.encoder_folder)  # it suits the shapes only
    captions = gr.Textbox(
        label="Captions, one per line",
        lines=5,
        max_lines=5,
        max_length=MAX_CHARACTERS,
        autofocus=True,
        elem_id="captions",
        value="\n".join(EXAMPLES) if shapes else "",
        info="This model was trained on captions like these. Ctrl+Enter draws." if shapes else "Ctrl+Enter draws.",
    )
    with gr.Row():
        count = gr.Slider(label="Images per caption", value=4, minimum=1, maximum=16, step=1, scale=3, buttons=[])
        seed = gr.Number(label="First seed", value=0, precision=0, minimum=0, maximum=MAX_SEED, scale=2)
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    negative = gr.Textbox(label="Negative caption (optional)", lines=1, max_lines=1, max_length=MAX_CHARACTERS)
    strength_value = max(0.05, round(20 * pipe.cascade.stages[0].default_strength()) / 20)
    with gr.Accordion("Start from an image, or fill a part of it in", open=False, elem_id="init"):
        with gr.Row():
            image = _upload("Init image", "init-image")
            mask = _upload("Mask: white is drawn anew, black is kept", "mask")
        strength = gr.Slider(
            label="Strength",
            info=f"Share of the steps that run. Near {strength_value:g} layout and main colours of the image stay; "
            f"less keeps more of it, and at 1 nothing of it is left, except what a mask keeps.",
            value=strength_value,
            minimum=0.05,
            maximum=1,
            step=0.05,
            buttons=[],
        )
        for event, value in ((mask.upload, 1.0), (mask.clear, strength_value)):
            event(partial(float, value), None, [strength], api_visibility="private", show_progress="hidden")
        resamples = gr.Slider(
            label="Resampling",
            info="With a mask: how often each part is sampled, so that it fits what is kept.",
            value=5,
            minimum=1,
            maximum=20,
            step=1,
            buttons=[],
        )
    controls = []
    for stage in pipe.cascade.config.stages:
        with gr.Accordion(f"Stage {stage.name}", open=False):
            controls += stage_controls(stage)
    return [captions, negative, seed, count, image, mask, strength, resamples, *controls], draw


def _upload(label: str, elem_id: str) -> gr.Image:
    """A field for an image file, which stays as it is: open_rgb decodes it, within its limits."""
    import gradio as gr

    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload"], height=180, elem_id=elem_id, buttons=[]
    )


def _outputs() -> tuple[list[gr.components.Component], gr.Button]:
    """(gallery, status line, settings and their download), and the button Stop."""
    import gradio as gr

    with gr.Row(elem_id="progress"):
        status = gr.Markdown("Images appear here.", elem_id="status")
        stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=90, size="md")
    gallery = gr.Gallery(
        show_label=False,
        columns=4,
        height=612,
        format="png",
        elem_id="gallery",
        object_fit="contain",
        buttons=["download", "fullscreen"],
    )
    with gr.Accordion("Settings that reproduce these images", open=False):
        record = gr.JSON(show_label=False, elem_id="record")
    download = gr.DownloadButton("Download settings", interactive=False)
    return [gallery, status, record, download], stop


def stage_controls(stage: StageConfig) -> list[gr.components.Component]:
    """A control for every sampling setting, in order; those that the stage does not take are not shown."""
    controls = []
    for setting in sampling_settings():
        controls.append(control(setting, getattr(stage.sampling, setting.name)))
        controls[-1].visible = has_use_for(stage, setting.name)
    return controls


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
    if setting.optional:  # an empty gr.Number would send 0
        return gr.Textbox(value=setting.text(value), label=label, info=setting.help, placeholder="none")
    minimum = setting.minimum or 0
    maximum = setting.maximum
    if maximum is None:
        maximum = max(8 * setting.default, value, 1)  # a slider needs an end
    step: float = 1 if whole else 0.1 if maximum - minimum > 1 else 0.001
    if setting.excludes_minimum:
        minimum += step
    return gr.Slider(label=label, info=setting.help, value=value, minimum=minimum, maximum=maximum, step=step)
