"""Logging of the command line programs."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def configure_logging() -> None:
    """Show fastimagen's log on stderr: warnings from every process, other messages from rank 0 only.

    Loading bars of Hugging Face's libraries appear in a terminal only, never in a log file. Programs call it once at
    their start. The library never does: an application configures logging as it likes.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    # DeepSpeed calls these by their names before torch 2.13; every process would say so.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_not_about_a_new_scheduler)
    logger = logging.getLogger("fastimagen")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _not_about_a_new_scheduler(record: logging.LogRecord) -> bool:
    """Leave out a warning that DeepSpeed's WarmupCosineLR gives itself whenever it is created.

    It does not concern training, which sets the rate of each step before the step (train/learning_rate.py).
    """
    return "learning rate from scheduler before it has started" not in record.getMessage()


class _StderrHandler(logging.Handler):
    """Prints the message; warnings and errors with their level in front."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(level + self.format(record), file=sys.stderr, flush=True)
