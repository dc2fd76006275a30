"""How long the web page takes to draw four images of a caption, from the click on Draw, in a headless Chromium.

    python -m benchmarks.studies.page_time MODEL... [--out benchmarks/results/cpu/page_time.json]

Serves each model directory in turn, opens the page 390 pixels wide, as on a phone, and draws one caption several times.
The first time, in which the encoder and the networks warm up, is apart. Needs the `demo` and `test` extras, and
Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastimagen import __version__
from fastimagen.files import write_json

from ..harness.checkout import ROOT

CAPTION = "a large red star on the left of a white background"
PORT, REPETITIONS = 7874, 9
FLAGS = ["--no-sandbox", "--disable-gpu"]
WATCH = """() => {
  window.lines = []
  const status = document.querySelector("#status")
  const changes = {childList: true, characterData: true, subtree: true}
  new MutationObserver(() => window.lines.push(status.innerText)).observe(status, changes)
}"""
"""Keeps what the page says from now on."""
DRAWN = """() => window.lines.some(line => line.startsWith("Stage "))
  && window.lines.at(-1).includes(" images in ")
  && [...document.querySelectorAll("#gallery img")].every(image => image.complete)"""


def measure(model: Path) -> dict[str, Any]:
    """Seconds from the click to the images."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-u", "-m", "fastimagen", "demo", "--model", str(model), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.goto(url)
            page.wait_for_selector("#status[role=status]")
            page.fill("#captions textarea", CAPTION)
            page.evaluate(WATCH)
            seconds = []
            for _ in range(1 + REPETITIONS):
                page.evaluate("window.lines = []")
                began = time.perf_counter()
                page.click("#draw")
                page.wait_for_function(DRAWN, polling=10, timeout=120000)
                seconds.append(time.perf_counter() - began)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return {
        "model": str(model),
        "first": round(seconds[0], 2),
        "median": round(statistics.median(seconds[1:]), 2),
        "seconds": [round(value, 2) for value in seconds[1:]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model directories")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu/page_time.json")
    options = parser.parse_args()
    rows = [measure(model) for model in options.models]
    for row in rows:
        print(f"{row['model']}: {row['median']} s (first {row['first']} s)", flush=True)
    versions = {"fastimagen": __version__, "torch": torch.__version__}
    result = {"caption": CAPTION, "threads": torch.get_num_threads(), "rows": rows, "versions": versions}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
