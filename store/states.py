"""The saved state of a run between two steps, from which an interrupted run continues with the same result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..files.whole import whole_file
from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor

RUN = "run.json"
"""The file that identifies the run of a state."""
log = logging.getLogger("fatezero")


class States(Protocol):
    """Saves values by name: tensors, numbers, None, and lists of these."""

    def save(self, name: str, value: Any) -> None:
        """Save a value in place of an earlier one of this name."""

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """A value of the interrupted run, with lists for its sequences; None if it has none of this name."""


class Unsaved:
    """Saves nothing."""

    def save(self, name: str, value: Any) -> None:
        """See `States.save`."""

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """See `States.load`."""
        return None


UNSAVED = Unsaved()


class SavedStates:
    """A folder of states, each in a file that appears complete or not at all.

    run: what identifies the run, as JSON. resume: whether to continue the run in the folder, if there is one; None: if
    it is the same run. Otherwise the first state that is saved replaces it. writes: False in all but one of several
    processes on one clip.

    Raises ValueError, naming the difference, for the state of another run. Without room on the disk, the run goes on
    and its states are not saved.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], resume: bool | None = False, writes: bool = True) -> None:
        self.folder, self._run, self._writes = folder, json.loads(json.dumps(run)), writes
        other = self._difference() if exists(folder) and resume is not False else ""
        if resume and other:
            raise ValueError(f"{folder} is the state of another run: {other}; give the same settings, or start over")
        self.resumes = exists(folder) and resume is not False and not other
        """Whether the run continues an interrupted one."""
        self._begun = self.resumes

    def _difference(self) -> str:
        """A difference to the run in the folder, in words."""
        try:
            then = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{RUN} is damaged ({error})"
        for name in {**self._run, **then}:
            was, now = then.get(name), self._run.get(name)
            if was != now:
                return f"its {name} is {_or_default(was)}, not {_or_default(now)}"
        return ""

    def save(self, name: str, value: Any) -> None:
        """See `States.save`."""
        from safetensors.torch import save

        if not self._writes:
            return
        tensors: dict[str, Tensor] = {}
        about = {"value": json.dumps(_packed(value, tensors))}
        try:
            if not self._begun:
                self._begin()
            with whole_file(self._path(name)) as partial:
                partial.write_bytes(save(tensors, about))
        except OSError as error:
            log.warning("the run cannot be resumed, because its state is not saved: %s", error)
            self._writes = False
            self.remove()

    def _begin(self) -> None:
        self.remove()
        with whole_file(self.folder / RUN) as partial:
            partial.write_text(json.dumps(self._run), encoding="utf-8")
        self._begun = True

    def load(self, name: str, device: torch.device | str = "cpu") -> Any:
        """See `States.load`. Raises ValueError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not self.resumes or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                value = json.loads(file.metadata()["value"])
                return _unpacked(value, lambda tensor: file.get_tensor(tensor), device)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): start over") from error

    @contextmanager
    def of_run(self) -> Iterator[None]:
        """A run that saves states: removes them after an error that would occur again."""
        try:
            yield
        except (ArithmeticError, ValueError):
            self.remove()
            raise

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def remove(self) -> None:
        """Remove the states, and the folder unless it has other files."""
        with suppress(OSError):
            (self.folder / RUN).unlink(missing_ok=True)
            for path in self.folder.glob("*.safetensors"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def exists(folder: Path) -> bool:
    """Whether a folder has the state of an interrupted run."""
    return (folder / RUN).is_file()


def _or_default(value: Any) -> str:
    return "the default" if value is None else repr(value)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, with its tensors by name. A tensor on the CPU stays there when it is loaded."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "cpu": value.device.type == "cpu"}
    if isinstance(value, (list, tuple)):
        return [_packed(part, tensors) for part in value]
    return value


def _unpacked(value: Any, read: Callable[[str], Tensor], device: torch.device | str) -> Any:
    if isinstance(value, dict):
        tensor = read(value["tensor"])
        return tensor.clone() if value["cpu"] else tensor.to(device)  # aligned in memory, on which last digits depend
    if isinstance(value, list):
        return [_unpacked(part, read, device) for part in value]
    return value
