"""A short version of the drill with damaged shards and failing servers, tests/drills/soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from fastimagen.data import source
from fastimagen.data.listed import Download
from fastimagen.data.remote.transfer import TransferError
from tests.drills.hostile_data import FOREVER, store_truths, write_data
from tests.drills.soak import left_in_cache, read


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder with damaged shards, and `data` of a configuration for them; a server of another process."""
    monkeypatch.setattr(source, "identity_of", source.identity_of)  # restored after the test
    (tmp_path / "remote").mkdir()
    Path(f"{tmp_path}/remote.faults.json").write_text(json.dumps(FOREVER))
    command = [sys.executable, "-m", "tests.faulty_server", f"{tmp_path}/remote", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        try:
            data, truths = write_data(tmp_path, url, remote=40, local=10, piped=2, samples=7, timeout=0.3)
            store_truths(tmp_path / "truths.json", truths)
            yield tmp_path, data
        finally:
            server.kill()


def test_what_is_read_is_delivered_or_skipped_for_a_known_reason_and_nothing_is_left(hostile):
    folder, data = hostile
    data["remote"]["pause"] = 0.01
    data["remote"]["pause"] = 0.01
    end = read(data, folder, rank=0, ranks=1, batches=30)  # compares samples and counters
    assert end["skipped"]["bad"] > 10 and end["skipped"]["lost"] > 10 and end["epochs"]["remote"] > 1
    assert not end["threads_left"] and not end["processes_left"]
    assert not left_in_cache(folder)["incomplete"]


def test_errors_of_a_lost_shard_do_not_accumulate(tmp_path):
    def fetch(wait: bool) -> None:
        raise TransferError("HTTP 404", missing=True)

    download, depths = Download(fetch), []
    for _ in range(3):
        with pytest.raises(TransferError, match="HTTP 404") as error:
            download()
        depths.append(len(traceback.extract_tb(error.value.__traceback__)))
    assert depths[2] == depths[1] and error.value.missing
