"""Serving the page: where it listens, who may use it, what it accepts, and what it leaves behind: nothing."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..sampling.pipeline import ImagenPipeline
from .drawing import Worker
from .inputs import MAX_BODY, MAX_UPLOAD
from .page import CSS, HEAD, build

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def serve(pipe: ImagenPipeline, *, host: str = "127.0.0.1", port: int = 7860, auth: str | None = None) -> None:
    """Serve the page until interrupted or terminated, then remove its temporary files.

    auth: USER:PASSWORD that visitors are asked for; None asks for nothing. Raises ValueError if the model names no text
    encoder, if auth is not of that form, or if the server cannot listen on host and port.
    """
    if pipe.text_encoder is None:
        raise ValueError(f"{pipe.source} names no text encoder: the web page needs one to read captions")
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise ValueError("--auth must be USER:PASSWORD")
    _check_address(host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="fastimagen-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        import gradio as gr
        from starlette.middleware import Middleware

        worker = Worker()
        app = build(pipe, worker, Path(folder) / "results")
        _, url, _ = app.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme(gr),
            css=CSS,
            head=HEAD,
            auth=(user, password) if auth is not None else None,
            max_file_size=MAX_UPLOAD,
            allowed_paths=[folder],
            app_kwargs={"middleware": [Middleware(Guard, names=host_names(host))]},
            prevent_thread_lock=True,
        )
        print(f"{url}  (stop with Ctrl-C)", flush=True)
        if auth is None and not _is_this_machine(host):
            print(
                "Everyone who reaches this address can use the page: --auth USER:PASSWORD asks for a password",
                flush=True,
            )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            worker.close()


def theme(gr: Any) -> Any:
    """Gradio's plain theme with the system's fonts, which need no download, and hints that are dark enough to read."""
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return plain.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )


def _check_address(host: str, port: int) -> None:
    """Raise ValueError if nobody can listen on host and port; Gradio's own message is long."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot listen on {host}, port {port}: {reason}; change --host or --port") from None


def _is_this_machine(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


def host_names(host: str) -> set[str]:
    """The names under which visitors reach a server that listens on `host`, besides its addresses."""
    return {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


class Guard:
    """Refuses requests for other hosts, and requests that are too large, before Gradio sees them.

    A web page of somebody else can have its own name resolve to this server (DNS rebinding), and would then be allowed
    to read the answers; it cannot change the Host header, which says that name. Addresses are safe: nobody else owns
    them. Uploads are limited by Gradio, which reads MAX_UPLOAD bytes at most; everything else to MAX_BODY.
    """

    def __init__(self, app: App, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, message = refusal
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = message.encode()
        sent = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [*sent, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, message) of a request that is refused, or None."""
        host = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname or ""
        if not _is_address(host) and host not in self.names:
            return 421, f"unknown host {host!r}: open the page by its address, or as {', '.join(sorted(self.names))}\n"
        if scope.get("method") not in ("POST", "PUT", "PATCH"):
            return None
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "a request needs a Content-Length\n"
        limit = MAX_UPLOAD + MAX_BODY if scope["path"].endswith("/upload") else MAX_BODY
        return (413, f"{int(length)} bytes are too many: the maximum is {limit}\n") if int(length) > limit else None
