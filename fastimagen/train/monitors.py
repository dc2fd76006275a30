"""TensorBoard, Weights & Biases and the other monitors that DeepSpeed's keys switch on, images included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..files import first_line


class Monitors:
    """The monitors of one stage, on rank 0.

    master: DeepSpeed's MonitorMaster. name: of the stage's run in Weights & Biases, where every stage is a run of its
    own, because steps begin at 1 again. A full disk switches a monitor off with one line for `warn`.
    """

    def __init__(self, master: Any, name: str, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.scalars = {
            label: monitor
            for label in ("tb_monitor", "csv_monitor", "comet_monitor")
            if (monitor := getattr(master, label, None)) is not None
        }
        self.wandb: Any = None
        if getattr(master, "wandb_monitor", None) is not None:
            self.wandb = import_module("wandb")
            if self.wandb.run is not None:
                self.wandb.run.name = name
            self.wandb.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step by name."""
        events = [(name, value, step) for name, value in values.items()]
        for label in list(self.scalars):
            self._try(label, lambda monitor: monitor.write_events(events))
        if self.wandb:
            self.wandb.log({**values, "step": step})

    def write_image(self, name: str, path: Path, step: int) -> None:
        """An image file, to the monitors that show images."""
        self._try("tb_monitor", lambda monitor: _add_image(monitor.summary_writer, name, path, step))
        if self.wandb:
            self.wandb.log({name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """End the run in Weights & Biases, so that the next stage gets its own."""
        self._try("tb_monitor", lambda monitor: monitor.summary_writer.close())
        if self.wandb:
            self.wandb.finish()

    def _try(self, label: str, use: Callable[[Any], None]) -> None:
        """Use a monitor if it is on; switch it off if the disk does not take what it writes."""
        if label not in self.scalars:
            return
        try:
            use(self.scalars[label])
        except OSError as error:
            del self.scalars[label]
            self.warn(f"DeepSpeed's {label} is off from now on: {first_line(error)}")


def _add_image(writer: Any, name: str, path: Path, step: int) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    writer.flush()
