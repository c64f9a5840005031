"""Picture sequences: the files of a folder, a pattern or a glob, in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jfif")
_NUMBER = re.compile(r"%(?:0(\d+))?d")
"""A pattern's number, padded with zeros; "%20d", as in my%20dog.png, does not match."""


class VideoError(ValueError):
    """A file without frames, or with fewer than needed."""


def numbered(path: Path) -> bool:
    """Whether a name is a pattern with a number, like f_%04d.png."""
    return _NUMBER.search(path.name) is not None


def with_number(pattern: Path, i: int) -> Path:
    """The pattern with a number filled in; ValueError for a pattern with several numbers."""
    if len(_NUMBER.findall(pattern.name)) > 1:
        raise ValueError(f"{pattern.name!r} has several numbers: use one, as in f_%04d.png")
    return pattern.with_name(_NUMBER.sub(lambda place: f"{i:0{place[1] or 1}d}", pattern.name))


def picture_files(path: Path) -> tuple[Path, ...]:
    """The pictures of a path, in the order of the numbers in their names; none for a video.

    Raises FileNotFoundError for a pattern, and VideoError for a folder, without pictures.
    """
    if path.is_file():
        return (path,) if path.suffix.lower() in PICTURES else ()
    several = _several(path)
    if several is None:
        return ()
    folder, named = several
    found = [one for one in folder.iterdir() if named(one.name)] if folder.is_dir() else []
    if found:
        return tuple(sorted(found, key=_by_number))
    if path.is_dir():
        raise VideoError(f"{path} is a folder without pictures ({', '.join(PICTURES)})")
    raise FileNotFoundError(f"no pictures at {path}")


def would_name(path: Path, picture: Path) -> bool:
    """Whether a folder, a pattern or a glob would include a picture."""
    several = None if path.is_file() else _several(path)
    if several is None:
        return False
    folder, named = several
    return folder.resolve() == picture.parent.resolve() and named(picture.name)


def _several(path: Path) -> tuple[Path, Callable[[str], bool]] | None:
    """The folder of a path to several pictures, and a test of names in it; None for a path to a single file."""
    if path.is_dir():
        return path, lambda name: _is_picture(name) and not name.startswith(".")
    if numbered(path):
        pattern = re.compile(_NUMBER.sub(r"\\d+", re.escape(path.name).replace(r"\%", "%")))
        return path.parent, lambda name: pattern.fullmatch(name) is not None
    if "*" in path.name:  # like a shell, without hidden names: ._f.png is a Mac's metadata of f.png
        shown = path.name.startswith(".")
        return (
            path.parent,
            lambda name: fnmatchcase(name, path.name) and _is_picture(name) and (shown or not name.startswith(".")),
        )
    return None


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A sort key that puts f2 before f10."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", path.name)]
