"""`fastimagen index`: the manifests of all shards, on one process or on all of a launcher."""

from __future__ import annotations

import argparse

from ..config_file import load_config
from ..data.indexing import check_index, index_all
from ..sampling.distributed import rank_and_world_size


def index(options: argparse.Namespace) -> None:
    """Write the manifests, or compare the shards with them. The processes of a launcher share the shards."""
    config = load_config(options.config, options.overrides).fastimagen
    rank, world_size = rank_and_world_size()

    def say(line: str) -> None:
        print(line if world_size == 1 else f"process {rank} of {world_size}: {line}", flush=True)

    (check_index if options.check else index_all)(config, say=say, rank=rank, world_size=world_size)
