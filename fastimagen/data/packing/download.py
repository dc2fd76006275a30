"""Images from the web: politely, in bounded time, with a reason for each that does not come.

A host gets a few connections at a time. A request that fails for a passing reason is repeated after a pause, for as
long as the host asks (Retry-After), at most. A host that says noai or noindex (X-Robots-Tag) is respected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ... import __version__
from ...extras import import_extra
from ..remote.transfer import PASSING, retry_after
from .samples import Item, Unusable, read_local

MAX_HOSTS = 1000
"""Hosts whose connections are kept open."""

FORBIDDING = {"noai", "noimageai", "noindex", "noimageindex"}
"""Directives of X-Robots-Tag that exclude an image."""

MAX_BYTES = 64 << 20
"""Of an image file."""


@dataclass(frozen=True)
class DownloadOptions:
    """threads: downloads at a time; per_host: of them, from one host; timeout: seconds until a host answers, and
    between two parts of its answer; deadline: seconds of a whole file; tries: of a request; pause: seconds before the
    second try, twice as long before each further one; longest_pause: that a host may ask for."""

    threads: int = 32
    per_host: int = 4
    timeout: float = 10.0
    deadline: float = 60.0
    tries: int = 3
    pause: float = 1.0
    longest_pause: float = 30.0

    def __post_init__(self) -> None:
        for name in ("threads", "per_host", "timeout", "deadline", "tries"):
            if getattr(self, name) <= 0:
                flag = {"threads": "--threads", "per_host": "--connections-per-host", "tries": "--tries"}
                raise ValueError(f"{flag.get(name, name)} must be above 0, got {getattr(self, name)}")


class Downloader:
    """Reads the image of an item: a local file, or a URL. Threads share it."""

    def __init__(self, options: DownloadOptions) -> None:
        self.options = options
        self.http: Any = import_extra("urllib3", user="downloading images", extra="data")
        self.pool = self.http.PoolManager(
            num_pools=MAX_HOSTS,
            maxsize=options.per_host,
            block=True,  # waits for one of the host's connections
            timeout=self.http.Timeout(connect=options.timeout, read=options.timeout),
            # total=0 would count the first redirect as one too many.
            retries=self.http.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            headers={"User-Agent": f"fastimagen/{__version__}", "Accept": "image/*"},
        )

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.clear()

    def read(self, item: Item) -> bytes:
        """The content of an item's image. Raises Unusable with the reason; the report names the item beside it."""
        if not isinstance(item.image, str):
            return read_local(item)
        for attempt in range(1, self.options.tries + 1):
            try:
                return self._get(item.image)
            except _Passing as problem:
                if attempt == self.options.tries:
                    raise Unusable(problem.reason, f"{attempt} tries") from None
                pause = problem.pause or self.options.pause * 2 ** (attempt - 1)
                if pause > self.options.longest_pause:
                    raise Unusable(problem.reason, f"asks to wait {pause:.0f} s") from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _get(self, url: str) -> bytes:
        """One request. Raises _Passing if another one may succeed, otherwise Unusable."""
        errors = self.http.exceptions
        try:
            response = self.pool.request("GET", url, preload_content=False)
        except errors.MaxRetryError as error:
            raise _reason(error.reason or error, errors) from None
        except errors.HTTPError as error:
            raise _reason(error, errors) from None
        except (UnicodeError, ValueError) as error:
            raise Unusable("not a URL", str(error)) from None
        complete = False
        try:
            if response.status in PASSING:
                raise _Passing(f"HTTP {response.status}", retry_after(response.headers.get("Retry-After")))
            if response.status != 200:
                raise Unusable(f"HTTP {response.status}")
            directives = {part.strip().lower() for part in response.headers.get("X-Robots-Tag", "").split(",")}
            if directives & FORBIDDING:
                raise Unusable("the site excludes it (X-Robots-Tag)")
            data = self._body(response)
            complete = True
            return data
        except errors.HTTPError as error:
            raise _reason(error, errors) from None
        finally:
            if not complete:
                response.close()  # the connection is in the middle of an answer
            response.release_conn()

    def _body(self, response: Any) -> bytes:
        end, parts, size = time.monotonic() + self.options.deadline, [], 0
        while part := response.read1(1 << 16):  # what has arrived: read() would wait for all of it
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise Unusable(f"larger than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise Unusable(f"not complete after {self.options.deadline:g} s")
        return b"".join(parts)


class _Passing(Exception):
    """A failure that may pass. pause: seconds that the host asks to wait, or None."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


def _reason(error: BaseException, errors: Any) -> Exception:
    """What a failed request is reported as."""
    if isinstance(error, errors.NameResolutionError):
        return Unusable("host not found")
    if isinstance(error, (errors.LocationParseError, errors.URLSchemeUnknown, errors.LocationValueError)):
        return Unusable("not a URL")
    if isinstance(error, errors.SSLError):
        return Unusable("TLS error", str(error))
    if isinstance(error, errors.ResponseError):  # too many redirects
        return Unusable("too many redirects")
    if isinstance(error, errors.NewConnectionError):  # a kind of TimeoutError to urllib3
        return _Passing("no connection")
    if isinstance(error, errors.TimeoutError):
        return _Passing("no answer in time")
    return _Passing("connection broken off")
