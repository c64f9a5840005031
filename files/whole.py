"""Files and folders that appear whole or not at all, and are gone when their process is."""

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
except ImportError:  # Windows: nothing is locked there, and nothing of other processes is removed
    fcntl = None  # type: ignore[assignment]

_IN_MEMORY = ("tmpfs", "ramfs")
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EIO)
_PREFIX = "fatezero-"
_mine: dict[Path, int] = {}
"""What this process must not leave behind, and the file descriptor that holds its lock."""
_made: list[Path] = []
"""Folders that this process made, and that go with it where they are empty; the deepest of each first."""
_owner = os.getpid()


# --- files ----------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | Path, keep_suffix: bool = True) -> Iterator[Path]:
    """A path beside the wanted one; it takes its place at the end, or goes on any error.

    keep_suffix: end its name like the wanted one's, for writers that go by it. A link is followed. Raises OSError
    where something other than a file is in the way.
    """
    path = _target(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.fsencode(path.name)[:120].decode(errors="ignore"), path.suffix[:20] if keep_suffix else ""
    for old in path.parent.glob(f".{glob.escape(stem)}.*.partial{glob.escape(suffix)}"):
        if old not in _mine:
            _remove_if_dead(old)
    partial = path.with_name(f".{stem}.{os.getpid()}.partial{suffix}")
    _mine[partial] = -1  # before it is there, for a signal may come between
    try:
        _mine[partial] = _locked(os.open(partial, os.O_CREAT | os.O_RDWR, 0o666))
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in _FULL:  # which tells no name where a library writes
            raise OSError(f"could not write {path}: {error.strerror}") from error
        raise
    finally:
        _remove(partial)


@contextmanager
def reserved(path: str | Path, overwrite: bool = False) -> Iterator[None]:
    """Keep the name of a file for this process, before any work and until its end; the file is another's to write.

    The folder is tried by writing to it; one that was missing is there meanwhile, and goes if it stays empty. Raises
    OSError where the file cannot be written: another run has the name, it exists and `overwrite` is not given, ...
    A process that is killed keeps no name. ValueError for a name that is not UTF-8.
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
            if error.errno is None:  # it says all itself
                raise
            if isinstance(error, FileExistsError):  # a folder that is to be made
                raise OSError(f"cannot write {path}: {error.filename} is no folder") from error
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
    """Raise ValueError for a name that FFmpeg and records cannot hold, OSError for one that is too long."""
    try:
        str(Path(path).absolute()).encode()
        os.lstat(path)
    except UnicodeEncodeError:
        raise ValueError(f"the name {str(path)!a} is not UTF-8: rename the file, or the folder it is in") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(f"the name {shown(str(path))} is too long: give a shorter one") from None


def check_writable(path: str | Path, overwrite: bool = False) -> None:
    """Raise OSError where a file cannot be written, as `reserved` does; the folder is left as it was."""
    with reserved(path, overwrite):
        pass


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a file is there that shall not be replaced."""
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
    """A hidden file beside the wanted one, which this process alone has locked."""
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
        os.close(handle)  # its owner removed it meanwhile


def _has_lock(handle: int) -> bool:
    """Lock an open file; False on network file systems without locks, and BlockingIOError where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _target(path: Path) -> Path:
    """The file that a path names; OSError where it is a folder or a device."""
    try:
        path = path.resolve() if path.is_symlink() else path
    except RuntimeError:  # Python before 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"it is {'a folder' if path.is_dir() else 'no regular file'}", str(path))
    return path


# --- folders --------------------------------------------------------------------------


def temporary_folder(parent: Path | None = None) -> Path:
    """A folder of this process, which a later one may remove once this one is gone."""
    parent = parent or disk_folder()
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale_folders(parent)
    new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    handle = -1 if fcntl is None else _locked(os.open(new, os.O_RDONLY))
    folder = new.rename(parent / new.name[1:])  # only now may others look whether it is held
    _mine[folder] = handle
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder that `temporary_folder` gave."""
    _remove(folder)


def remove_stale_folders(parent: Path) -> None:
    """Remove the temporary folders of processes that are gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if folder not in _mine:
            _remove_if_dead(folder)


def disk_folder() -> Path:
    """A folder for large temporary files: the system's, or another where that one is kept in memory."""
    usual = Path(tempfile.gettempdir())
    others = [Path("/var/tmp"), Path.home() / ".cache"]
    usable = (f for f in others if f.is_dir() and os.access(f, os.W_OK) and not is_in_memory(f))
    return next(usable, usual) if is_in_memory(usual) else usual


def is_in_memory(path: Path) -> bool:
    """Whether a path lies on a file system that is kept in RAM, as far as the system tells."""
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
    """The nearest folder above a path that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


# --- at the end of a process, and after it ------------------------------------------------


def remove_leftovers() -> None:
    """Remove all that this process has not finished: for the end of an interrupted one."""
    if os.getpid() == _owner:  # and not a fork of it
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
    """The same file or folder, its lock held until it is closed or the process ends, however it ends."""
    if fcntl is None:
        os.close(handle)
        return -1
    with suppress(OSError):  # some network file systems have no locks: others then leave the file alone
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _remove_if_dead(path: Path) -> None:
    """Remove a file or folder of this user's whose lock nobody holds."""
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
    """Hold a folder, made where it is missing; BlockingIOError where another process holds it."""
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
