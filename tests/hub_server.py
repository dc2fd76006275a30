"""A Hugging Face hub on this machine: what huggingface_hub needs to create repositories, to write and to read files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """repositories: {name: {branch: commit}}; commits: {commit: files}; requests: (method, path) of every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, branch: str, files: Files) -> str:
        """Set a branch to these files; returns the commit."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.repositories.setdefault(name, {})[branch] = commit
        return commit


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """The routes of huggingface_hub 1 and 2 for models, without large-file storage."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)(?:/revision/([^/]+))?", path):
            name, files, commit = match[1], *self._files(match[1], match[2] or "main")
            if files is not None:
                siblings = [{"rfilename": file} for file in files]
                self._json(
                    {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
                )
        elif match := re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)/tree/([^/]+)/?", path):
            files, _ = self._files(match[1], match[2])
            if files is not None:
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
                self._json(entries)
        elif match := re.fullmatch(r"/(\w[^/]*/[^/]+)/resolve/([^/]+)/(.+)", path):
            files, commit = self._files(match[1], match[2])
            if files is not None and match[3] not in files:
                self._error(404, "EntryNotFound")
            elif files is not None:
                content = files[match[3]]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self._send(200, content, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        else:
            self._error(404, "")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name.startswith("closed/"):
                self._error(403, "")
                return
            if asked.get("private"):
                self.server.private.add(name)
            if name not in self.server.repositories:
                self.server.commit(name, "main", {})
            self._json({"url": f"{self.server.url}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)/branch/([^/]+)", path):
            branches = self.server.repositories[match[1]]
            branches.setdefault(match[2], branches["main"])
            self._json({})
        elif re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)/preupload/[^/]+", path):
            asked_files = json.loads(body)["files"]
            self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular"} | {"shouldIgnore": False} for f in asked_files]}
            )
        elif match := re.fullmatch(r"/api/models/(\w[^/]*/[^/]+)/commit/([^/]+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = dict(self.server.commits[self.server.repositories[match[1]][match[2]]])
            files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.server.commit(match[1], match[2], files)
            address = f"{self.server.url}/{match[1]}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})
        else:
            self._error(404, "")

    def _files(self, name: str, revision: str) -> tuple[Files | None, str]:
        """The files of a revision and its commit; sends the hub's error if there is none."""
        branches = self.server.repositories.get(name)
        if branches is None:
            self._error(404, "RepoNotFound")
            return None, ""
        commit = branches.get(revision, revision)
        if commit not in self.server.commits:
            self._error(404, "RevisionNotFound")
            return None, ""
        return self.server.commits[commit], commit

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
