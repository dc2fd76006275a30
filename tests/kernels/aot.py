"""What kernels compile to, for the tests of each: benchmarks/studies/aot.py, run as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes of a program


def compiled(file: str, targets: list[str], labels: str = "") -> list[dict[str, Any]]:
    """The rows of benchmarks/studies/aot.py (registers, spills, shared_bytes, instructions, ...) for one kernel file.

    `labels` is a regular expression that the labels of what is compiled must match.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "aot.json"
        # Interpreted kernels cannot be compiled: the flag, if the tests run with it, must not reach the child.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.studies.aot",
                "--kernels",
                file,
                "--targets",
                ",".join(targets),
                "--labels",
                labels,
                "--out",
                str(out),
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stdout + child.stderr
        return json.loads(out.read_text())["rows"]
