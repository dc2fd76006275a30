"""Remote files: downloaded in bounded time, continued where they broke off, with errors that name URL and status.

http and https go through urllib3, "pipe:COMMAND" through a shell, and every other protocol (s3, gs) through fsspec.
"""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from functools import lru_cache
from typing import Any, BinaryIO, Protocol

from ... import __version__
from ...data_config import RemoteConfig
from ...extras import import_extra
from ...files import first_line

URL = re.compile(r"(?:pipe|file):|[a-zA-Z][a-zA-Z0-9+.-]*://")

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is repeated."""

MIN_RATE = 10_000
"""Bytes per second; a slower answer counts as one that has stalled."""

MIN_PROGRESS = 1 << 20
"""Bytes after which the tries are counted anew: a large file over a bad line breaks off often, and still arrives."""

CHUNK = 8 << 20
"""Bytes of a request to an object store, which must be answered in full within the time-out."""

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""fsspec's package for each protocol that needs one. No extra has them: each pins a version of fsspec of its own."""


class TransferError(ValueError):
    """A file did not come. missing: the server says that it is not there, or not for us."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Passing(Exception):
    """A failure that may pass. pause: seconds that the server asks to wait, or None."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class Remote(Protocol):
    """A file that `receive` writes to `file`, from file.tell() on if that is possible, otherwise from its start."""

    def receive(self, file: BinaryIO) -> None: ...


def shown(url: str) -> str:
    """A URL for messages: without its query, which may contain a signature, and without a password."""
    if url.startswith("pipe:"):
        return re.sub(r"\?[^\s'\"]*", "", url)
    return re.sub(r"(?<=://)[^/@]*@", "", url.partition("?")[0])


def check_protocol(url: str) -> None:
    """Raise ValueError for a protocol that nobody knows, ImportError if its package is missing."""
    protocol = url.partition(":")[0]
    if protocol in ("http", "https"):
        import_extra("urllib3", user="reading shards from the web", extra="data")
    elif protocol != "pipe":
        fsspec = import_extra("fsspec", user=f"reading shards from {protocol}:", extra="data")
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            raise ValueError(f"shard {shown(url)}: {first_line(error)}") from None
        except ImportError as error:
            if protocol not in PACKAGES:
                raise ImportError(f"shard {shown(url)}: {first_line(error)}") from None
            package = PACKAGES[protocol]
            raise ImportError(f"reading shards from {protocol}:// needs {package}: pip install {package}") from None


def download(url: str, file: BinaryIO, patience: RemoteConfig) -> None:
    """Write the content of a URL to a file that is open for reading and writing.

    What may pass is tried again after a pause, each longer than the one before: no answer within patience.timeout
    seconds, an answer that stalls or breaks off (it is continued where the server can), and the statuses PASSING.
    Raises TransferError, one line with URL and reason, after patience.tries in a row, and at once for other statuses.
    """
    remote, failures, received = _remote(url, patience), 0, 0
    while True:
        try:
            remote.receive(file)
            return
        except Passing as problem:
            failures = 1 if file.tell() - received >= MIN_PROGRESS else failures + 1
            received = file.tell()
            if failures >= patience.tries:
                raise TransferError(f"cannot fetch {shown(url)}: {problem} ({failures} tries)") from None
            pause = patience.pause * 2 ** (failures - 1) * random.uniform(0.5, 1)  # not all processes at once
            if problem.pause is not None and problem.pause > patience.longest_pause:
                raise TransferError(
                    f"cannot fetch {shown(url)}: {problem}, and the server asks to wait {problem.pause:.0f} s"
                ) from None
            time.sleep(min(problem.pause or pause, patience.longest_pause))


def retry_after(value: str | None) -> float | None:
    """Retry-After in seconds; None for a date and for nonsense."""
    return float(value) if value is not None and value.strip().isdigit() else None


def _remote(url: str, patience: RemoteConfig) -> Remote:
    protocol = url.partition(":")[0]
    if protocol in ("http", "https"):
        return _HttpFile(url, patience)
    return _Pipe(url, patience) if protocol == "pipe" else _StoredFile(url, patience)


class _Pace:
    """Finds an answer that arrives too slowly: `add` raises Passing after a time-out with less than MIN_RATE."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.since, self.bytes = timeout, time.monotonic(), 0

    def add(self, size: int) -> None:
        self.bytes += size
        seconds = time.monotonic() - self.since
        if seconds > self.timeout:
            if self.bytes < MIN_RATE * seconds:
                raise Passing(f"slower than {MIN_RATE // 1000} kB/s")
            self.since, self.bytes = time.monotonic(), 0


# ---- http and https


@lru_cache
def _pool(timeout: float) -> Any:
    """Connections, which threads share."""
    http = import_extra("urllib3", user="reading shards from the web", extra="data")
    return http.PoolManager(
        maxsize=16,
        timeout=http.Timeout(connect=timeout, read=timeout),
        retries=http.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        headers={"User-Agent": f"fastimagen/{__version__}", "Accept-Encoding": "identity"},
    )


class _HttpFile:
    """A file on a web server; a request for the rest of it names the version that was begun (If-Range)."""

    def __init__(self, url: str, patience: RemoteConfig) -> None:
        self.url, self.patience, self.version = url, patience, None

    def receive(self, file: BinaryIO) -> None:
        pool = _pool(self.patience.timeout)
        errors = import_extra("urllib3.exceptions", user="reading shards from the web", extra="data")
        headers = dict(pool.headers)
        if self.version and file.tell():
            headers |= {"Range": f"bytes={file.tell()}-", "If-Range": self.version}
        try:
            response = pool.request("GET", self.url, headers=headers, preload_content=False)
        except (errors.LocationParseError, errors.LocationValueError, UnicodeError) as error:
            raise TransferError(f"cannot fetch {shown(self.url)}: {first_line(error)}") from None
        except errors.HTTPError as error:
            raise Passing(_what_failed(error, errors, self.patience.timeout)) from None
        try:
            self._check_status(response, file)
            pace = _Pace(self.patience.timeout)
            while part := response.read1(1 << 20):  # what has arrived: read() would wait for all of it
                file.write(part)
                pace.add(len(part))
        except errors.HTTPError as error:
            raise Passing(_what_failed(error, errors, self.patience.timeout)) from None
        finally:
            response.close()

    def _check_status(self, response: Any, file: BinaryIO) -> None:
        """Leave `file` at the position that the answer begins with."""
        status = f"HTTP {response.status} {response.reason or ''}".rstrip()
        continues = f"bytes {file.tell()}-"
        if response.status == 206 and response.headers.get("Content-Range", "").startswith(continues):
            return
        file.seek(0)
        file.truncate()
        if response.status == 200:
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            self.version = None if version is None or version.startswith("W/") else version
        elif response.status in (*PASSING, 206, 416):  # 206, 416: not the range that was asked for
            raise Passing(status, retry_after(response.headers.get("Retry-After")))
        else:
            missing = response.status in (403, 404, 410)  # 403: S3's 404 for who may not list the bucket
            raise TransferError(f"cannot fetch {shown(self.url)}: {status}", missing=missing)


def _what_failed(error: Any, errors: Any, timeout: float) -> str:
    reason = getattr(error, "reason", None) or error  # MaxRetryError has one
    if isinstance(reason, errors.NameResolutionError):
        return "host not found"
    if isinstance(reason, errors.NewConnectionError):
        return "no connection"
    if isinstance(reason, errors.TimeoutError):
        return f"no answer for {timeout:g} s"
    if isinstance(reason, errors.SSLError):
        return f"TLS error: {first_line(reason)}"
    return "the connection broke off" if isinstance(reason, errors.ProtocolError) else first_line(reason)


# ---- commands


class _Pipe:
    """The output of a shell's command."""

    def __init__(self, url: str, patience: RemoteConfig) -> None:
        self.command, self.patience = url.removeprefix("pipe:"), patience

    def receive(self, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        with (
            tempfile.TemporaryFile() as complaints,
            subprocess.Popen(
                self.command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,  # so that all processes of the command can be ended
            ) as process,
        ):
            try:
                self._copy(process, file)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            status = process.wait()
            if status:
                complaints.seek(0)
                lines = complaints.read().decode(errors="replace").strip().splitlines()
                raise Passing(f"exit {status}" + (f": {lines[-1]:.200}" if lines else ""))

    def _copy(self, process: subprocess.Popen[bytes], file: BinaryIO) -> None:
        assert process.stdout is not None
        output, pace = process.stdout.fileno(), _Pace(self.patience.timeout)
        while True:
            if not select.select([output], [], [], self.patience.timeout)[0]:
                raise Passing(f"no output for {self.patience.timeout:g} s")
            part = os.read(output, 1 << 20)
            if not part:
                return
            file.write(part)
            pace.add(len(part))


# ---- object stores and whatever else fsspec reads


class _StoredFile:
    """A file of an fsspec file system, read in ranges of CHUNK bytes."""

    def __init__(self, url: str, patience: RemoteConfig) -> None:
        self.url, self.patience = url, patience
        self.size: int | None = None

    def receive(self, file: BinaryIO) -> None:
        fsspec = import_extra("fsspec", user="reading remote shards", extra="data")
        store, path = self._within(lambda: fsspec.core.url_to_fs(self.url))
        if self.size is None:
            self.size = self._within(lambda: store.size(path))
            if self.size is None:
                raise TransferError(f"cannot fetch {shown(self.url)}: its size is unknown")
        while (start := file.tell()) < self.size:
            end = min(start + CHUNK, self.size)
            part = self._within(lambda start=start, end=end: store.cat_file(path, start, end))
            if len(part) != end - start:
                raise Passing(f"{len(part)} bytes in place of {end - start}")
            file.write(part)

    def _within(self, request: Any) -> Any:
        """The result of a request, within the time-out: fsspec has none of its own."""
        answer: dict[str, Any] = {}

        def work() -> None:
            try:
                answer["value"] = request()
            except Exception as error:  # of the store's library, whichever it is
                answer["error"] = error

        thread = threading.Thread(target=work, daemon=True, name="fetch")
        thread.start()
        thread.join(self.patience.timeout)
        if thread.is_alive():
            raise Passing(f"no answer for {self.patience.timeout:g} s")
        error = answer.get("error")
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            reason = error.strerror or first_line(error)
            raise TransferError(f"cannot fetch {shown(self.url)}: {reason}", missing=True)
        if error is not None:
            raise Passing(f"{type(error).__name__}: {first_line(error)}")
        return answer["value"]
