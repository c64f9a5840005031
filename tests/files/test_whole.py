"""Files are written completely or not at all; leftovers of dead processes are removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fatezero.files import whole
from fatezero.files.whole import check_writable, disk_folder, is_in_memory, reserved, temporary_folder, whole_file

HELD = """
import sys
from pathlib import Path
from fatezero.files.whole import temporary_folder, whole_file
parent = Path(sys.argv[1])
folder = temporary_folder(parent)
(folder / "store.safetensors").write_bytes(b"x" * 1000)
with whole_file(parent / "video.mp4") as partial:
    partial.write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A process with a temporary folder and a partial file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def names(folder: Path) -> set[str]:
    return {path.name.split("-")[0].split(".mp4")[0] for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_files_of_a_live_process_are_kept_until_it_ends(other, tmp_path):
    mine = temporary_folder(tmp_path)
    with whole_file(tmp_path / "video.mp4") as partial:
        partial.write_bytes(b"mine")
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2
    assert len(list(tmp_path.glob(".video.mp4.*.partial.mp4"))) == 1
    other.send_signal(signal.SIGKILL)
    other.wait()
    third = temporary_folder(tmp_path)
    with whole_file(tmp_path / "video.mp4") as partial:
        partial.write_bytes(b"mine again")
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, third.name, "video.mp4"}
    for folder in (mine, third):
        whole.remove_folder(folder)


NAMED = """
import sys
from pathlib import Path
from fatezero.files.whole import reserved
with reserved(Path(sys.argv[1]) / "new" / "o.mp4"):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_an_output_is_reserved_for_one_run_until_it_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", NAMED, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        (tmp_path / "link.mp4").symlink_to(tmp_path / "new" / "o.mp4")
        for name in ("new/o.mp4", "new/../new/o.mp4", "link.mp4"):
            for overwrite in (False, True):
                with pytest.raises(FileExistsError, match="being written by another run"):
                    check_writable(tmp_path / name, overwrite)
        check_writable(tmp_path / "new" / "p.mp4")
    finally:
        other.kill()
        other.wait()
    with reserved(tmp_path / "new" / "o.mp4"), pytest.raises(FileExistsError, match="another run"):
        check_writable(tmp_path / "new" / "o.mp4")
    check_writable(tmp_path / "new" / "o.mp4")
    assert list((tmp_path / "new").iterdir()) == []


def test_other_users_folders_and_links_are_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "fatezero-link").symlink_to(tmp_path / "elsewhere")
    whole.remove_stale_folders(tmp_path)
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert (tmp_path / "fatezero-link").is_symlink()


def test_leftovers_are_removed_at_exit(tmp_path):
    folder = temporary_folder(tmp_path)
    (folder / "x").touch()
    with whole_file(tmp_path / "a.bin") as partial:
        partial.touch()
        whole.remove_leftovers()
        assert list(tmp_path.iterdir()) == []
        partial.touch()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("name", ["a.mp4", "new/deep/a.mp4", "x" * 251 + ".mp4", "ü" * 125 + ".mp4", "a [1]*?.mp4"])
def test_a_file_can_be_written_where_the_check_passes(tmp_path, name):
    path = tmp_path / name
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        with whole_file(path) as partial:
            partial.write_text("whole")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_obstacles_to_writing_are_reported_before_any_work(tmp_path):
    here = tmp_path / "here.mp4"
    here.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; give --overwrite"):
        check_writable(here)
    check_writable(here, overwrite=True)
    (tmp_path / "link.mp4").symlink_to(here)
    with pytest.raises(FileExistsError, match="exists; give --overwrite"):
        check_writable(tmp_path / "link.mp4")
    with pytest.raises(ValueError, match="is not UTF-8"):
        check_writable(os.fsdecode(b"o\xff.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match="it is a folder"):
        check_writable(tmp_path / "folder.mp4", overwrite=True)
    with pytest.raises(OSError, match="regular file"):
        check_writable("/dev/null", overwrite=True)
    with pytest.raises(OSError, match="is too long"):
        check_writable(tmp_path / ("x" * 300 + ".mp4"))
    with pytest.raises(OSError, match="cannot write"):
        check_writable(here / "below.mp4")
    assert here.read_text() == "mine"


def test_a_read_only_folder_is_reported(tmp_path):
    """Root ignores a folder's mode, so the test uses a folder of the kernel."""
    place = Path("/proc/self") if os.getuid() == 0 else tmp_path
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write"):
        check_writable(place / "a.mp4")
    tmp_path.chmod(0o700)


def test_overwriting_a_link_replaces_its_target(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with whole_file(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a folder in memory")
def test_a_folder_in_memory_is_not_a_disk(monkeypatch, tmp_path):
    assert is_in_memory(Path("/dev/shm/not/there/yet"))
    monkeypatch.setattr(whole.tempfile, "gettempdir", lambda: "/dev/shm")
    assert not is_in_memory(disk_folder())
    monkeypatch.setattr(whole.tempfile, "gettempdir", lambda: str(tmp_path))
    assert disk_folder() == tmp_path
