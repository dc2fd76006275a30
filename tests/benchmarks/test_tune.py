"""Tuning writes what it measured into the table, and nothing else."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from benchmarks.studies.tune import GRID, SOURCE, fastest, main, rewritten


def tables(source: str) -> dict[tuple[str, str], dict[int, tuple]]:
    """TILES of the source, as plain numbers."""
    space: dict[str, object] = {"__name__": "fastimagen_kernels.attention_tiles", "__package__": "fastimagen_kernels"}
    exec(compile(source, "attention_tiles.py", "exec"), space)
    return {
        key: {width: tuple(map(tuple, pair)) for width, pair in table.items()} for key, table in space["TILES"].items()
    }


def test_the_table_as_it_stands_is_written_again_as_it_stands() -> None:
    source = SOURCE.read_text()
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        found = {name: table for (owner, name), table in tables(source).items() if owner == target}
        assert len(found) == 3 and rewritten(source, target, found) == source


@pytest.mark.parametrize("target", ["sm_90", "sm_120"])
def test_only_this_gpu_changes(target: str) -> None:
    source = SOURCE.read_text()
    found = {
        name: {64: ((32, 64, 4, 1), (128, 64, 8, 2)), 128: ((64, 32, 4, 1), (64, 64, 8, 3))}
        for name in ("forward", "backward_rows", "backward_keys")
    }
    before, after = tables(source), tables(rewritten(source, target, found))
    assert {key[1]: after.pop(key) for key in list(after) if key[0] == target} == found
    assert after == {key: table for key, table in before.items() if key[0] != target}
    assert max(map(len, rewritten(source, target, found).splitlines())) <= 120


def test_the_fastest_of_those_that_can_be_launched(capsys: pytest.CaptureFixture[str]) -> None:
    def milliseconds(tile: tuple[int, ...]) -> float:
        if tile[3] == 3:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return abs(tile[0] - 64) + abs(tile[1] - 128) + tile[2] + 0.1 * tile[3]

    assert fastest(GRID, milliseconds) == ((64, 128, 4, 1), pytest.approx(4.1))
    assert "(64, 128, 4, 3): OutOfResources: out of resource: shared memory" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="there is no GPU to tune for"):
        main()
