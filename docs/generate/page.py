"""A photograph of the web page, for README.md: serves a model, draws its example captions in a headless Chromium.

    python docs/generate/page.py --model runs/quickstart/model [--out docs/page.png]

Needs the `demo` and `test` extras, and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PORT = 7873
FLAGS = ["--no-sandbox", "--disable-gpu"]


def main() -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"), help="default: %(default)s")
    options = parser.parse_args()
    command = [sys.executable, "-u", "-m", "fastimagen", "demo", "--model", options.model, "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(viewport={"width": 1160, "height": 860})
            page.goto(url)
            page.wait_for_selector("#status[role=status]")
            page.click("#draw")
            page.wait_for_function(
                "document.querySelector('#status').innerText.includes(' images in ')", timeout=300000
            )
            page.mouse.move(0, 0)
            page.wait_for_timeout(2000)  # until the last image is shown
            page.screenshot(path=options.out)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    Image.open(options.out).convert("RGB").quantize(128).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
