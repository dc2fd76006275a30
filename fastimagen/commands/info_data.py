"""`fastimagen info --data`: what a run will see of its data."""

from __future__ import annotations

from pathlib import Path

from ..config import CascadeConfig, Config
from ..config_file import config_from_dict, load_config
from ..data.source import open_data
from ..data.summary import contact_sheet, describe_data, sheet_path
from ..train.stage_setup import resolve_cascade


def info_data(source: str, out: Path) -> None:
    """Print counts, sizes and caption lengths, and draw a contact sheet for each stage, or one without a configuration.

    source: a ds.json, or shards (a folder, a pattern, ...). Raises ValueError and OSError for what cannot be opened.
    """
    is_config = Path(source).suffix == ".json"
    config = resolve_cascade(load_config(source)) if is_config else _shards_alone(source)
    section = config.fastimagen
    train, validation = open_data(section, with_text=False)
    cascade = section.cascade
    stages = cascade.stages if isinstance(cascade, CascadeConfig) else ()
    for line in describe_data(train, validation, section, stages):
        print(line)
    for stage in stages or (None,):
        path = sheet_path(out, stage)
        contact_sheet(train, section, stage).save(path)
        print(f"contact sheet: {path}")


def _shards_alone(source: str) -> Config:
    """A configuration of these shards, whose cascade, a preset's name, is not looked at."""
    return config_from_dict({"fastimagen": {"data": {"shards": source, "validation": None, "max_bad_share": 1.0}}})
