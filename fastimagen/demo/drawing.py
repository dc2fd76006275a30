"""Sampling beside the page: one thread draws, previews come out while it works, visitors can stop their request."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..cascade import Callback
from ..images import to_uint8
from ..sampling.output import Output
from ..sampling.request import SamplingRequest

MAX_IMAGES = 64  # of one request
PREVIEW_SECONDS = 0.3  # between two previews

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


def sample_in_background(
    worker: Worker, sample: Sample, request: SamplingRequest, stop: threading.Event | None = None
) -> Iterator[Preview | Output]:
    """Yield a preview now and then while the worker samples, then the output. Raises what `sample` raises.

    When `stop` is set, sampling ends at its next step, and the last item is a preview of that step. When the iterator
    or the worker is closed, sampling ends at its next step too.
    """
    items: queue.SimpleQueue[Preview | Output | Exception] = queue.SimpleQueue()
    closed, stop = threading.Event(), stop or threading.Event()
    last_preview = -PREVIEW_SECONDS

    def callback(stage: str, step: int, x: Tensor, x0: Tensor) -> None:
        nonlocal last_preview
        if closed.is_set() or worker.closing.is_set():
            raise Cancelled
        is_due = time.monotonic() - last_preview >= PREVIEW_SECONDS
        if stop.is_set() or (is_due and items.empty()):  # a slow reader gets fewer previews, not a backlog
            last_preview = time.monotonic()
            items.put((stage, step, to_uint8(x0).cpu()))
        if stop.is_set():
            raise Cancelled

    def job() -> None:
        try:
            if stop.is_set():
                raise Cancelled
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


@dataclass(frozen=True)
class Visits:
    """The stop signal of each visitor's newest request, by session."""

    signals: dict[str, threading.Event] = field(default_factory=dict)

    def begin(self, session: str) -> None:
        """The visitor has asked for images: forget an earlier Stop."""
        self.signals[session] = threading.Event()

    def signal(self, session: str) -> threading.Event:
        """The signal that `stop` sets."""
        return self.signals.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        """The visitor has pressed Stop, while the request is sampled or still waits for others."""
        self.signal(session).set()

    def end(self, session: str) -> None:
        """The visitor has left."""
        self.signals.pop(session, threading.Event()).set()
