"""Writing: whole or not at all, regular files only, links written through, errors in the caller's words."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cats import files
from cats.files import check_output, write_bytes_atomically, write_text_atomically


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "b" / "t.json"
    write_text_atomically(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_bytes_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["t.json"]


def test_permissions_are_the_umasks_or_those_that_were_there(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "new", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o600)
    write_text_atomically(tmp_path / "new", "y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


@pytest.mark.parametrize("target", ["there", "not there yet"])
def test_a_link_is_written_through(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "link to link").symlink_to("link")
    write_text_atomically(tmp_path / "link to link", "new")
    assert (tmp_path / target).read_text() == "new" and not (tmp_path / target).is_symlink()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link to link").is_symlink()


def test_what_is_no_regular_file_stays_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("fifo", "link", "null"):
        for write in (check_output, lambda path: write_text_atomically(path, "x")):
            with pytest.raises(OSError, match=rf"{name} cannot be written: it is a device, a FIFO or a socket"):
                write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "null").is_symlink()


def test_bad_names_are_refused_in_the_callers_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to("circle")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "x.json", "file is a file and not a folder"),
        (tmp_path / "circle", "circle cannot be written"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(OSError, match=message) as error:
            write_text_atomically(path, "x")
        assert str(error.value).startswith(f"{path} cannot be written: ")
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"] and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, there: bool, monkeypatch) -> None:
    path = tmp_path / "t.json"
    if there:
        path.write_text("old")

    class Full:
        def __init__(self, handle: int, _mode: str) -> None:
            self.handle = handle

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_error: object) -> None:
            os.close(self.handle)

        def write(self, _content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/temporary/name")

    monkeypatch.setattr(files.os, "fdopen", Full)
    with pytest.raises(OSError) as error:
        write_text_atomically(path, "new")
    assert str(error.value) == f"{path} cannot be written: No space left on device"
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == (["t.json"] if there else []) and (not there or path.read_text() == "old")


def test_no_torch_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = None; import cats.files, cats.criteria; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
