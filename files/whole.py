"""Files and folders that appear complete or not at all, and temporary ones that go with their process."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ..settings import shown

try:
    import fcntl
except ImportError:  # Windows: no locks, and files of other processes are never removed
    fcntl = None  # type: ignore[assignment]

_IN_MEMORY = ("tmpfs", "ramfs")
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO)
_PREFIX = "fatezero-"
_mine: dict[Path, int] = {}
"""Unfinished files and folders of this process, with the file descriptor of each one's lock."""
_made: list[Path] = []
"""Folders made by this process, removed at its end if empty; the deepest of each first."""
_owner = os.getpid()


# --- files ----------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | Path, keep_suffix: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` at the end, or removed on any error.

    keep_suffix: give it the same suffix, for writers that need it. Follows a link. Raises OSError if `path` is
    something other than a file.
    """
    path = _target(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.fsencode(path.name)[:120].decode(errors="ignore"), path.suffix[:20] if keep_suffix else ""
    for old in path.parent.glob(f".{glob.escape(stem)}.*.partial{glob.escape(suffix)}"):
        if old not in _mine:
            _remove_if_dead(old)
    partial = path.with_name(f".{stem}.{os.getpid()}.partial{suffix}")
    _mine[partial] = -1  # before it exists, in case a signal comes between
    try:
        _mine[partial] = _locked(os.open(partial, os.O_CREAT | os.O_RDWR, 0o666))
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in _FULL:  # libraries' errors name no file
            raise OSError(f"could not write {path}: {error.strerror}") from error
        raise
    finally:
        _remove(partial)


@contextmanager
def reserved(path: str | Path, overwrite: bool = False) -> Iterator[None]:
    """Reserve the name of an output file for this process, without writing the file.

    Tests the folder by writing to it; a missing folder is made, and removed if it stays empty. A killed process frees
    its names. Raises OSError if the file cannot be written: reserved by another run, exists without `overwrite`, ...;
    ValueError for a name that is not UTF-8.
    """
    path = Path(path)
    check_name(path)
    missing: list[Path] = []
    lock: Path | None = None
    try:
        try:
            target = _target(path)
            missing += [folder for folder in target.parents if not folder.exists()]
            _made.extend(missing)
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked_name(target)
            _try_out(target, overwrite)
        except OSError as error:
            if error.errno is None:  # our own, complete message
                raise
            if isinstance(error, FileExistsError):  # from mkdir
                raise OSError(f"cannot write {path}: {error.filename} is not a folder") from error
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        yield
    finally:
        if lock is not None:
            _remove(lock)
        for folder in missing:
            _made.remove(folder)
            with suppress(OSError):
                folder.rmdir()


def check_name(path: str | Path) -> None:
    """Raise ValueError for a name that is not UTF-8, which FFmpeg and records need, OSError for one too long."""
    try:
        str(Path(path).absolute()).encode()
        os.lstat(path)
    except UnicodeEncodeError:
        raise ValueError(f"the name {str(path)!a} is not UTF-8: rename the file, or the folder it is in") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(f"the name {shown(str(path))} is too long: give a shorter one") from None


def check_writable(path: str | Path, overwrite: bool = False) -> None:
    """Raise OSError if a file cannot be written, as `reserved` does, and leave the folder unchanged."""
    with reserved(path, overwrite):
        pass


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError for an existing file, unless `overwrite`."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give --overwrite to replace it")


def _try_out(target: Path, overwrite: bool) -> None:
    check_free(target, overwrite)
    if not target.exists():
        target.touch(exist_ok=False)  # the name itself may be too long
        target.unlink()
    with tempfile.TemporaryFile(dir=target.parent, prefix="." + _PREFIX) as file:
        file.write(b"0")


def _locked_name(target: Path) -> Path:
    """A hidden file in the same folder, locked by this process; FileExistsError if another has the lock."""
    name = os.fsencode(target.name)
    lock = target.with_name(f".{_PREFIX}{sha256(name).hexdigest()[:16]}.lock")
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            locked = fcntl is not None and _has_lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(f"{target} is being written by another run") from None
        with suppress(FileNotFoundError):
            if not locked or os.path.samestat(os.fstat(handle), lock.stat()):
                _mine[lock] = handle
                return lock
        os.close(handle)  # the other process has removed it in the meantime


def _has_lock(handle: int) -> bool:
    """Lock an open file; False on network file systems without locks, BlockingIOError if another has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _target(path: Path) -> Path:
    """The file of a path, links resolved; OSError for a folder or a device."""
    try:
        path = path.resolve() if path.is_symlink() else path
    except RuntimeError:  # Python before 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"it is {'a folder' if path.is_dir() else 'not a regular file'}", str(path))
    return path


# --- folders --------------------------------------------------------------------------


def temporary_folder(parent: Path | None = None) -> Path:
    """A folder of this process, which later processes remove once this one has ended."""
    parent = parent or disk_folder()
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale_folders(parent)
    new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    handle = -1 if fcntl is None else _locked(os.open(new, os.O_RDONLY))
    folder = new.rename(parent / new.name[1:])  # others check the lock of folders with this name
    _mine[folder] = handle
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder of `temporary_folder`."""
    _remove(folder)


def remove_stale_folders(parent: Path) -> None:
    """Remove the temporary folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if folder not in _mine:
            _remove_if_dead(folder)


def disk_folder() -> Path:
    """A folder for large temporary files: the system's, or another if that is in memory."""
    usual = Path(tempfile.gettempdir())
    others = [Path("/var/tmp"), Path.home() / ".cache"]
    usable = (f for f in others if f.is_dir() and os.access(f, os.W_OK) and not is_in_memory(f))
    return next(usable, usual) if is_in_memory(usual) else usual


def is_in_memory(path: Path) -> bool:
    """Whether a path is on a file system in RAM; False if unknown."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return False
    place = existing(path).resolve()
    found, kind = Path(), ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        point, kind_there = line.split(" ")[1:3]
        mount = Path(point.encode().decode("unicode_escape") if "\\" in point else point)
        if place.is_relative_to(mount) and len(mount.parts) >= len(found.parts):
            found, kind = mount, kind_there
    return kind in _IN_MEMORY


def existing(path: Path) -> Path:
    """The nearest existing folder above a path."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


# --- at the end of a process, and after it ------------------------------------------------


def remove_leftovers() -> None:
    """Remove all unfinished files of this process, at the end of an interrupted one."""
    if os.getpid() == _owner:  # not in a fork
        for path in list(_mine):
            _remove(path)
        for folder in sorted(_made, reverse=True):
            with suppress(OSError):
                folder.rmdir()


def _remove(path: Path) -> None:
    handle = _mine.pop(path, -1)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if handle >= 0:
        os.close(handle)


def _locked(handle: int) -> int:
    """The same file or folder, locked until it is closed or the process ends."""
    if fcntl is None:
        os.close(handle)
        return -1
    with suppress(OSError):  # some network file systems have no locks: other processes then never remove the file
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _remove_if_dead(path: Path) -> None:
    """Remove a file or folder of this user that no process has locked."""
    if fcntl is None:
        return
    with suppress(OSError):
        about = path.lstat()
        if about.st_uid != os.getuid() or stat.S_ISLNK(about.st_mode):
            return
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, made if missing; BlockingIOError if another process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(f"{folder} is in use by another run") from None
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(handle)
