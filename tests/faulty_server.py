"""An HTTP server of a folder that fails as servers do: for the tests and drills of remote shards.

    python -m tests.faulty_server FOLDER SEED

serves FOLDER with faults at random, never more than RandomFaults.IN_A_ROW at successive requests of a file, and prints
its port. FOLDER.faults.json names what fails at every request: {"/0.tar": "403"}.
"""

from __future__ import annotations

import http.server
import json
import random
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. faults: what happens at the next requests of a path; requests: (path, Range) of all.

    Faults: an HTTP status, as "500" or "429 wait SECONDS" (Retry-After); "stall": no answer for `stall` seconds;
    "slow": 500 bytes a second; "break": half of what was asked for; "no ranges": the whole file for a part of it.
    """

    daemon_threads = True
    stall = 2.0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, defaultdict(list), []
        self.ending = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def asked(self, name: str) -> list[str | None]:
        return [range_ for path, range_ in self.requests if path == f"/{name}"]

    def next_fault(self, path: str, range_: str | None) -> str:
        """What happens at this request; "" for nothing."""
        self.requests.append((path, range_))
        return self.faults[path].pop(0) if self.faults[path] else ""

    def handle_error(self, *_: object) -> None:
        """Clients that break off are no news."""


class RandomFaults(Server):
    """Serves a folder with faults at random. forever: the fault of every request of a path; served: counts them."""

    KINDS = ("429 wait 0", "429 wait 1", "500", "503", "stall", "slow", "break", "break", "no ranges")
    SHARE, IN_A_ROW = 0.25, 3
    stall = 5.0

    def __init__(self, folder: Path, seed: int, forever: dict[str, str]) -> None:
        super().__init__(folder)
        self.chance, self.forever = random.Random(seed), forever
        self.in_a_row: Counter[str] = Counter()
        self.served: Counter[str] = Counter()

    def next_fault(self, path: str, range_: str | None) -> str:
        fault = self.forever.get(path, "")
        if not fault and self.in_a_row[path] < self.IN_A_ROW and self.chance.random() < self.SHARE:
            fault = self.chance.choice(self.KINDS)
        self.in_a_row[path] = self.in_a_row[path] + 1 if fault else 0
        self.served[fault or "whole"] += 1
        return fault


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, range_ = self.path.partition("?")[0], self.headers.get("Range")
        if path == "/served" and isinstance(self.server, RandomFaults):
            return self._answer(200, json.dumps(self.server.served).encode())
        fault = self.server.next_fault(path, range_)
        file = self.server.folder / path.lstrip("/")
        if fault[:3].isdigit() or not file.is_file():
            return self._answer(int(fault[:3] or 404), wait=fault.partition(" wait ")[2])
        content, start = file.read_bytes(), 0
        if fault == "stall":
            self.server.ending.wait(self.server.stall)
            return None
        if range_ and fault != "no ranges":
            start = int(range_.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault == "break":
            self.wfile.write(content[start : (start + len(content)) // 2])
        elif fault == "slow":
            while start < len(content) and not self.server.ending.wait(0.02):
                self.wfile.write(content[start : start + 10])
                start += 10
        else:
            self.wfile.write(content[start:])
        self.close_connection = True

    def _answer(self, status: int, body: bytes = b"", wait: str = "") -> None:
        self.send_response(status)
        if wait:
            self.send_header("Retry-After", wait)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    server = RandomFaults(folder, seed, json.loads(Path(f"{folder}.faults.json").read_text()))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
