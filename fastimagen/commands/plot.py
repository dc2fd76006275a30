"""`fastimagen plot`."""

from __future__ import annotations

import argparse
from pathlib import Path


def plot(options: argparse.Namespace) -> None:
    """Draw the curves of a run and print where they are. Raises ValueError, ImportError and OSError as draw_curves."""
    from ..train.curves import draw_curves

    out: Path = options.out or options.run / "curves.png"
    missing = draw_curves(options.run, out)
    print(out)
    if missing:
        print(f"no records of: {', '.join(' '.join(name.split()) for name in missing)}")
