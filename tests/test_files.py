"""Files are written completely or not at all, and errors about files that cannot be read name them in one line."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastimagen.extras import import_extra
from fastimagen.files import (
    ABANDONED,
    atomic_file,
    atomic_folder,
    first_line,
    read_json_object,
    read_safetensors,
    remove_abandoned,
    require_empty,
    temporary_path,
    write_json,
    write_safetensors,
)
from tests.conftest import ROOT


def test_an_atomic_file_replaces_the_old_one_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with atomic_file(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent and not (path.exists() and path.read_text() == content)
        assert path.read_text() == content
    assert os.listdir(path.parent) == ["file"]


def test_a_failing_block_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_a_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_temporary_names_are_hidden_new_and_in_the_same_folder(tmp_path: Path) -> None:
    names = {temporary_path(tmp_path / "file").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".file.") and name.endswith(".tmp") for name in names)
    assert temporary_path(tmp_path / "file").parent == tmp_path


def test_an_atomic_folder_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("content")
        assert not path.exists()
    assert (path / "file").read_text() == "content" and os.listdir(tmp_path / "a") == ["b"]


def test_an_atomic_folder_may_replace_an_empty_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("content")
    assert os.listdir(path) == ["file"]


def test_a_failing_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder with a file"])
def test_an_atomic_folder_refuses_what_is_not_an_empty_folder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    content = path if kind == "file" else path / "notes"
    content.parent.mkdir(exist_ok=True)
    content.write_text("mine")
    with pytest.raises(ValueError, match=r"out is not empty: choose another folder, or remove it first"):
        require_empty(path)
    with pytest.raises(ValueError, match="is not empty"), atomic_folder(path):
        pytest.fail("the block must not run")
    assert content.read_text() == "mine" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{\n  "a": 1,\n  b\n}', "is not JSON: line 3: "),
        (b"", "is not JSON: line 1: "),
        (b'{"a": "\xff"}', "is not JSON: "),
        (b"[1, 2]", "must hold a JSON object"),
    ],
)
def test_errors_in_json_name_file_and_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_json_object(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_json_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none.json: No such file or directory"):
        read_json_object(tmp_path / "none.json")


def test_json_is_read_as_written(tmp_path: Path) -> None:
    content = {"ä": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "new" / "a.json", content)
    assert read_json_object(tmp_path / "new" / "a.json") == content
    assert os.listdir(tmp_path / "new") == ["a.json"]


def test_tensors_are_read_as_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3), "empty": torch.zeros(0, 2, dtype=torch.bfloat16)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
    loaded = read_safetensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_other_users_may_read_safetensors_where_they_may_read_other_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")]
    assert modes[0] == modes[1]


def test_a_safetensors_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"rubbish")
    for name in ("damaged", "none"):
        with pytest.raises(ValueError, match=rf"cannot read weights .*{name}: .") as raised:
            read_safetensors(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_missing_optional_package_is_an_error_that_says_how_to_install_it() -> None:
    import_error = r"^the page needs no_such_package: pip install --editable '\.\[demo\]'$"
    with pytest.raises(ImportError, match=import_error):
        import_extra("no_such_package", user="the page", extra="demo")
    assert import_extra("json", user="the page", extra="demo").loads("1") == 1


def test_a_package_without_its_own_dependency_is_not_reported_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "incomplete_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        import_extra("incomplete_package", user="the page", extra="demo")


# ---- what killed processes leave

WRITES = """
import sys, time
from fastimagen.files import atomic_file, temporary_path
folder = temporary_path(sys.argv[1] + ".index")
folder.mkdir()
(folder / ".tmpAbCdEf").write_text("half")
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_temporary_files_of_a_killed_process_are_removed_and_those_of_a_live_one_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", WRITES, str(tmp_path / "0.tar")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    (tmp_path / ".keep").write_text("another hidden file")
    with atomic_file(tmp_path / "own") as own:
        assert remove_abandoned(tmp_path) == 0 and len(os.listdir(tmp_path)) == 4
        writer.kill()
        writer.wait()
        assert remove_abandoned(tmp_path) == 2
        assert sorted(os.listdir(tmp_path)) == sorted([".keep", own.name])
    assert f"{tmp_path}: removed 2 temporary files of killed processes" in caplog.text
    assert remove_abandoned(tmp_path / "missing") == 0


def test_temporary_files_of_other_machines_are_removed_after_a_day(tmp_path: Path) -> None:
    other, older = tmp_path / f".a.{'0' * 8}-1-1.{'0' * 8}.tmp", tmp_path / ".b.12345678.tmp"
    for path in (other, older):
        path.write_text("half")
    assert remove_abandoned(tmp_path) == 0
    for path in (other, older):
        os.utime(path, (0, time.time() - ABANDONED - 60))
    assert remove_abandoned(tmp_path) == 2 and os.listdir(tmp_path) == []


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    """As after a restart of a container, in which process numbers begin again."""
    own = temporary_path(tmp_path / "a")
    own.write_text("half")
    assert remove_abandoned(tmp_path) == 0
    earlier = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1"))
    own.rename(earlier)
    assert remove_abandoned(tmp_path) == 1


def test_safetensors_leave_nothing_beside_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "new/a.safetensors", {"a": torch.zeros(2)}, {})
    write_safetensors(tmp_path / "new/a.safetensors", {"a": torch.ones(2)}, {})
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new/a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
