"""The outputs of a run: they must not be inputs, and are locked for other runs until it ends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from ..files.whole import check_free, check_name, reserved
from ..video.pictures import picture_files, would_name
from ..video.write import is_sequence, output_files
from .config.record import record_path


class Outputs(ExitStack):
    """The files that a run writes, each checked first, and locked until this context ends.

    overwrite: replace those that are there. clips: inputs that are videos, pictures, folders, patterns or globs of
    pictures. others: inputs that are files, or folders of files as a model's. An input is never replaced, whatever
    name it goes by, and no output becomes one.
    """

    def __init__(self, overwrite: bool, clips: Iterable[str | Path], others: Iterable[str | Path] = ()) -> None:
        super().__init__()
        self._overwrite, self._clips = overwrite, [Path(clip) for clip in clips]
        self._inputs = dict[tuple[int, int], Path]()
        self._taken = set[str]()
        for given, files in ((self._clips, _of_clip), ([Path(other) for other in others], _of_folder)):
            for path in given:
                check_name(path)
                with suppress(OSError, ValueError):  # readers report missing files
                    self._inputs |= {_identity(file): path for file in files(path)}

    def clip(self, path: str | Path, frames: int) -> None:
        """An output of frames. Raises ValueError for an unsuitable name, and OSError for an unwritable place."""
        _check_output(path)
        first, *more = output_files(path, frames)
        self.file(first)
        for one in more:
            self._refuse_input(one)
            check_free(one, self._overwrite)
        if is_sequence(path) and (beyond := output_files(path, frames + 1)[-1]).exists():
            raise FileExistsError(
                f"{beyond} is there already and would follow the {frames} pictures of this run as part of their clip: "
                "remove it and those after it, or write to another folder"
            )

    def results(self, paths: Iterable[str], frames: int) -> None:
        """Edited clips and their records."""
        for path in paths:
            self.clip(path, frames)
            self.file(record_path(path))

    def file(self, path: str | Path) -> None:
        """Any other output. Raises OSError if it cannot be written."""
        path = Path(path)
        _check_output(path)
        self._refuse_input(path)
        name = os.path.realpath(path)
        if name in self._taken:
            raise ValueError(f"{path} is given for two outputs of this run")
        self._taken.add(name)
        self.enter_context(reserved(path, self._overwrite))

    def _refuse_input(self, path: Path) -> None:
        if path.exists() and (given := self._inputs.get(_identity(path))) is not None:
            which = "" if given == path else f" ({given})"
            raise FileExistsError(f"{path} is an input of this run{which}; it is never overwritten")
        for clip in self._clips:
            if would_name(clip, path):
                raise FileExistsError(f"{path} would become part of the input {clip}: write to another folder")


def check_folder(path: str | Path, what: str = "output", flag: str = "-o") -> None:
    """Raise ValueError or OSError for a path that cannot be a folder to write into. what, flag: in the error."""
    _check_output(path)
    path = Path(path).absolute()
    there = next(one for one in (path, *path.parents) if one.exists() or one.is_symlink())
    if not there.is_dir():
        raise NotADirectoryError(f"{what}: {there} is not a folder: give another with {flag}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{what}: {there} cannot be written to: give another folder with {flag}")


def _check_output(path: str | Path) -> None:
    try:
        check_name(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"output: {error}") from error


def _identity(file: Path) -> tuple[int, int]:
    """A key that is equal for all names of a file."""
    about = file.stat()
    return about.st_dev, about.st_ino


def _of_clip(path: Path) -> Iterable[Path]:
    return picture_files(path) or [path]


def _of_folder(path: Path) -> Iterator[Path]:
    """A file, or all files in a folder, as of a model."""
    if not path.is_dir():
        yield path
        return
    for pattern in ("*", "*/*"):
        yield from (file for file in path.glob(pattern) if file.is_file())


def numbered(output: str, count: int) -> list[str]:
    """The output of each edit, numbered if there are several."""
    if count == 1:
        return [output]
    path, end = Path(output), "/" if output.endswith(("/", "\\")) else ""
    return [f"{path.with_stem(f'{path.stem}_{i}')}{end}" for i in range(count)]
