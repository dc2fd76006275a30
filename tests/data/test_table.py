"""Packing tables: the kinds of files, the columns, and images from a server that fails in every way."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fastimagen.data.packing.download import DownloadOptions
from fastimagen.data.packing.table import pack_table
from fastimagen.data.packing.writer import PackOptions
from fastimagen.data.shards import open_shards
from tests.data.test_folder import contents, image, write

RED = image("red")


def captions(folder) -> list[str]:
    return [caption for shard in open_shards(folder) for caption in shard.captions()]


def test_every_kind_of_table_is_packed_in_its_order(tmp_path):
    write(tmp_path, {f"{i}.png": image((i, 0, 0)) for i in range(5)})
    names, texts = [f"{i}.png" for i in range(5)], [f'nr {i}, "quoted"' for i in range(5)]
    lines = [json.dumps({"image": name, "caption": text, "score": 1}) for name, text in zip(names, texts)]
    quoted = [text.replace('"', '""') for text in texts]
    columns = {"path": names, "TEXT": texts}
    write(
        tmp_path,
        {
            "t.jsonl": "\n".join(lines),
            "t.csv": "\ufefffile_name,prompt\n" + "".join(f'{n},"{t}"\n' for n, t in zip(names, quoted)),
            "t.tsv": "caption\timage\n" + "".join(f"{t}\t{n}\n" for n, t in zip(names, texts)),
        },
    )
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for suffix in ("jsonl", "csv", "tsv", "parquet"):
        report = pack_table(tmp_path / f"t.{suffix}", tmp_path / suffix, PackOptions(shard_size=2))
        assert (report.packed, report.shards, report.skipped) == (5, 3, {})
        assert captions(tmp_path / suffix) == texts
        assert list(contents(tmp_path / suffix)) == names
    assert contents(tmp_path / "jsonl")["3.png"]["score"] == 1
    assert 'images are in the column "path", captions in "TEXT"' in str(report)


def test_images_inside_parquet_and_hugging_face_data_sets_are_packed(tmp_path):
    column = [{"bytes": RED, "path": "a.png"}, {"bytes": image("blue", "JPEG"), "path": None}, None]
    table = pyarrow.table({"image": column, "captions": [["one", "two"], ["three"], ["x"]], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    folder = tmp_path / "on_disk"
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    for source in (tmp_path / "t.parquet", folder):
        out = tmp_path / f"{source.name}-out"
        report = pack_table(source, out)
        assert (report.packed, report.captions, report.skipped) == (2, 3, {"row without image": 1})
        (shard,) = open_shards(out)
        assert shard.captions() == ["one", "three"] and shard.image(0) == RED
        assert shard.metadata(0) == {"captions": ["one", "two"], "n": 1, "path": "a.png", "width": 9, "height": 7}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.jsonl", "nothing\n[1]\n", "no line is a JSON object"),
        (
            "t.csv",
            "file_name,score\na.png,1\n",
            r"none of its columns \(file_name, score\) .* captions: .*--caption-col",
        ),
        ("t.csv", "where,text\na.png,1\n", r"none of its columns \(where, text\) .* URLs: name it with --image-column"),
        ("t.parquet", "not parquet", "not a parquet file or is damaged"),
        ("t.xlsx", "", "not a table: expected one of .csv, .tsv"),
        ("t.jsonl", '{"image": "gone.png", "caption": "x"}', "nothing to pack .*: image not found: 1 \\(gone.png\\)"),
    ],
)
def test_a_table_that_cannot_be_packed_is_refused_in_one_line(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        pack_table(write(tmp_path, {name: content}) / name, tmp_path / "out")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ValueError, match="there is no table"):
        pack_table(tmp_path / "gone.csv", tmp_path / "out")


def test_bad_rows_are_counted_by_reason(tmp_path):
    rows = [
        '{"image": "a.png", "caption": "good"}',
        "not json",
        '{"image": "a.png", "caption": "  "}',
        '{"image": "a.png"}',
        '{"image": "a.png", "caption": 5}',
        '{"image": "", "caption": "x"}',
        '{"image": "s3://bucket/a.png", "caption": "x"}',
        '{"image": "page.png", "caption": "x"}',
        '{"image": "gone.png", "caption": "x"}',
    ]
    write(tmp_path, {"a.png": RED, "page.png": "<html>", "t.jsonl": "\n".join(rows)})
    report = pack_table(tmp_path / "t.jsonl", tmp_path / "out")
    assert report.packed == 1 and report.skipped == {
        "row that is not a JSON object": 1,
        "empty caption": 1,
        "row without caption": 1,
        "caption is not text": 1,
        "row without image": 1,
        "URL that is neither http nor https": 1,
        "unreadable image": 1,
        "image not found": 1,
    }
    assert "page.png: an HTML page" in str(report)
    write(tmp_path, {"t.tsv": "image\tcaption\na.png\tok\na.png\n" + "a.png\t\xe9\n"})
    (tmp_path / "t.tsv").write_bytes((tmp_path / "t.tsv").read_bytes() + b"a.png\t\xe9\n")
    report = pack_table(tmp_path / "t.tsv", tmp_path / "tsv")
    assert report.packed == 2
    assert report.skipped == {"row with another number of columns": 1, "caption not in UTF-8": 1}


# ---- downloads


class Failing(BaseHTTPRequestHandler):
    """Every path fails in its own way; /flaky/... only at the first request."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[Counter[str]] = Counter()
    now = most = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            Failing.now += 1
            Failing.most = max(Failing.most, Failing.now)
            Failing.requests[self.path] += 1
        try:
            self.answer(self.path.strip("/").split("/")[0], first=Failing.requests[self.path] == 1)
        except OSError:
            pass  # the client has gone
        finally:
            with self.lock:
                Failing.now -= 1

    def answer(self, kind: str, *, first: bool) -> None:
        if kind.isdigit() or (kind.startswith("flaky") and first):
            after = {"Retry-After": "0"} if kind == "flaky" else {"Retry-After": "3600"} if kind == "429" else {}
            return self.send(int(kind) if kind.isdigit() else 503, b"no", after)
        if kind == "stall":
            time.sleep(1.2)
        elif kind == "redirect":
            self.send(302, b"", {"Location": self.path})
        elif kind == "moved":
            self.send(301, b"", {"Location": "/good/moved.jpg"})
        elif kind == "html":
            self.send(200, b"<!DOCTYPE html>")
        elif kind == "noai":
            self.send(200, RED, {"X-Robots-Tag": "noai, noimageai"})
        elif kind in ("broken", "slow"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(30 if kind == "slow" else 1):
                self.wfile.write(bytes(10))
                self.wfile.flush()
                time.sleep(0.05 if kind == "slow" else 0)
            self.close_connection = True
        else:
            time.sleep(0.01)
            self.send(200, RED)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    Failing.requests, Failing.now, Failing.most = Counter(), 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_downloads_end_in_bounded_time_with_the_right_reasons(server, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    paths = ["404", "403", "429", "500", "stall", "redirect", "html", "noai", "broken", "slow", "flaky", "flaky503"]
    paths.append("moved")
    urls = [f"{server}/{path}/x.jpg" for path in paths] + [f"{server}/good/{i}.jpg" for i in range(20)]
    urls += [f"http://127.0.0.1:{port}/x.jpg", "http://no-such-host.invalid/x.jpg", "http://[bad/x.jpg"]
    # Conceptual Captions: caption and URL, without a header.
    write(tmp_path, {"cc.tsv": "".join(f"a caption, {i}\t{url}\n" for i, url in enumerate(urls))})
    options = DownloadOptions(per_host=3, timeout=0.4, deadline=0.5, tries=2, pause=0.05)
    started = time.monotonic()
    report = pack_table(tmp_path / "cc.tsv", tmp_path / "out", download=options)
    assert time.monotonic() - started < 8
    assert report.packed == 23 and report.skipped == {
        "HTTP 404": 1,
        "HTTP 403": 1,
        "HTTP 429": 1,
        "HTTP 500": 1,
        "no answer in time": 1,
        "too many redirects": 1,
        "unreadable image": 1,
        "the site excludes it (X-Robots-Tag)": 1,
        "connection broken off": 1,
        "not complete after 0.5 s": 1,
        "no connection": 1,
        "host not found": 1,
        "not a URL": 1,
    }
    counts = {path: Failing.requests[f"/{path}/x.jpg"] for path in paths}
    assert counts["404"] == counts["403"] == counts["429"] == 1 and counts["500"] == counts["flaky"] == 2
    assert Failing.most <= 3 + 2  # the handlers of a stalled or slow answer outlive the client's connection
    lines = str(report)
    assert f"{server}/429/x.jpg: asks to wait 3600 s" in lines
    assert [url for url in urls if lines.count(url) > 1] == []  # each is named once
    found = contents_by_url(tmp_path / "out")
    assert found[f"{server}/flaky/x.jpg"]["txt"] == "a caption, 10" and f"{server}/good/0.jpg" in found


def contents_by_url(folder) -> dict[str, dict]:
    (shard,) = open_shards(folder)
    return {shard.metadata(i)["url"]: {"txt": shard.caption(i)} for i in range(len(shard))}


def test_a_download_that_is_killed_resumes_after_the_last_complete_shard(server, tmp_path, monkeypatch):
    write(tmp_path, {"t.csv": "url,text\n" + "".join(f"{server}/good/{i}.jpg,c {i}\n" for i in range(10))})
    monkeypatch.setattr("fastimagen.data.packing.table.finish", lambda *_: next(iter([])))
    with pytest.raises(StopIteration):
        pack_table(tmp_path / "t.csv", tmp_path / "out", PackOptions(shard_size=4))
    monkeypatch.undo()
    (tmp_path / ".out.incomplete/.00002.json").unlink()
    report = pack_table(tmp_path / "t.csv", tmp_path / "out", PackOptions(shard_size=4))
    assert (report.packed, report.kept) == (10, 2)
    assert [Failing.requests[f"/good/{i}.jpg"] for i in range(10)] == [1] * 8 + [2] * 2
    assert captions(tmp_path / "out") == [f"c {i}" for i in range(10)]


def test_downloaded_images_get_the_extension_of_their_content(server, tmp_path):
    write(tmp_path, {"t.csv": f"url,text\n{server}/good/photo.jpg?size=2,c\n"})
    pack_table(tmp_path / "t.csv", tmp_path / "out")
    (shard,) = open_shards(tmp_path / "out")
    assert shard.image(0) == RED and Image.open(io.BytesIO(RED)).format == "PNG"
    assert b".png" in (tmp_path / "out/00000.tar").read_bytes()
