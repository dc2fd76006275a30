"""Bad input of `fastimagen shards`."""

from __future__ import annotations

from pathlib import Path

from fastimagen.data.packing.download import DownloadOptions
from fastimagen.data.packing.folder import pack_folder
from fastimagen.data.packing.table import pack_table
from tests.data.bad_input.making import (
    SKIPPED,
    STOPS,
    Row,
    pair,
    problem,
    server_of,
)
from tests.drills.hostile_data import image

# ---- packing


def packing_folders(folder: Path) -> list[Row]:
    kinds: dict[str, dict[str, bytes]] = {
        "an image without caption": {"x.png": image(1)},
        "a blank caption": pair("x", "png", image(1)) | {"x.txt": b"\n"},
        "a caption in Latin-1": pair("x", "png", image(1)) | {"x.txt": b"caf\xe9"},
        "a damaged image": pair("x", "png", image(1)[:60]),
        "a damaged .json beside an image": {"x.png": image(1), "x.json": b"{"},
        "a caption that is no text": {"x.png": image(1), "x.json": b'{"caption": 5}'},
        "a caption without image": {"x.txt": b"a caption"},
        "another file": {"film.mp4": b"x"},
        "a row of an image that is not there": {"metadata.csv": b"file_name,text\ngone.png,a caption\n"},
        "a row without a file name": {"metadata.jsonl": b'{"file_name": null, "text": "a"}\n'},
        "a row that is no JSON": {"metadata.jsonl": b'{"file_name": "good.png", "text": "a"}\n{\n'},
    }
    rows = []
    for number, (kind, files) in enumerate(kinds.items()):
        root = folder / str(number) / "images"
        root.mkdir(parents=True)
        for name, content in (pair("good", "png", image(1)) | files).items():
            (root / name).write_bytes(content)
        rows.append(Row(kind, SKIPPED, skipped(pack_folder(root, folder / f"out{number}").reasons())))
    root = folder / "links"
    (root / "linked").mkdir(parents=True)
    (root / "linked/good.png").write_bytes(image(1))
    (root / "linked/good.txt").write_bytes(b"a caption")
    (root / "x.png").symlink_to("nowhere.png")
    (root / "folder").symlink_to("linked")
    links = sorted(pack_folder(root, folder / "out").reasons())
    return [*rows, Row("a broken link", SKIPPED, links[0]), Row("a link to a folder", SKIPPED, links[1])]


def skipped(reasons: list[str]) -> str:
    (line,) = reasons
    return line


def packing_tables(folder: Path) -> list[Row]:
    with server_of(folder / "web") as server:
        for name in ("good.png", "page.png"):
            (server.folder / name).write_bytes(image(1) if name == "good.png" else b"<html>")
        good = server.url("good.png")
        kinds = {
            "a row with another number of cells": (f"{good},a,b", []),
            "a row without image": (",a caption", []),
            "a row without caption": (f"{good},", []),
            "an image file that is not there": ("gone.png,a caption", []),
            "a URL that is neither http nor https": ("ftp://host/x.png,a caption", []),
            "a URL that is none": ("http://[bad/x.png,a caption", []),
            "a host that does not exist": ("http://no-such-host.invalid/x.png,a caption", []),
            "an image that is gone": (f"{server.url('gone.png')},a caption", []),
            "a server that always answers 503": (f"{good}?1,a caption", ["503"] * 9),
            "a server that asks to wait an hour": (f"{good}?1,a caption", ["429 wait 3600"]),
            "a server that does not answer": (f"{good}?1,a caption", ["stall"] * 9),
            "a connection that breaks off": (f"{good}?1,a caption", ["break"] * 9),
            "a page in place of an image": (f"{server.url('page.png')},a caption", []),
        }
        rows = []
        (folder / "local.png").write_bytes(image(1))
        options = DownloadOptions(threads=1, timeout=0.5, tries=2, pause=0.01, longest_pause=0.1)
        for number, (kind, (line, faults)) in enumerate(kinds.items()):
            server.faults["/good.png"] = list(faults)
            table = folder / f"{number}.csv"
            table.write_text(f"image,caption\nlocal.png,a caption\n{line}\n")
            report = pack_table(table, folder / f"out{number}", download=options)
            rows.append(Row(kind, SKIPPED, skipped(report.reasons())))
        (folder / "columns.csv").write_text("a,b\n1,2\n")
        (folder / "empty.csv").write_text("")
        (folder / "damaged.parquet").write_bytes(b"PAR1")
        for kind, name in (
            ("a table without known columns", "columns.csv"),
            ("an empty table", "empty.csv"),
            ("a damaged parquet file", "damaged.parquet"),
            ("a table that is not there", "nowhere.csv"),
        ):
            rows.append(Row(kind, STOPS, problem(lambda name=name: pack_table(folder / name, folder / "out"))))
    return rows
