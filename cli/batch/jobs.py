"""A file of jobs: combinations of clips, targets, settings and methods, and single jobs."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...settings import shown
from ...video.pictures import picture_files
from ...video.write import METADATA_SUFFIXES
from ..config.files import data_of
from ..config.settings import ConfigError
from ..config.values import from_home

AXES = ("clips", "methods", "settings", "targets")
"""The keys whose entries are combined; later keys override earlier ones, and all override the file's settings."""
_TEXT_OF = {"clips": "video", "jobs": "video", "methods": "preset", "settings": "preset", "targets": "target"}
"""The setting that an entry of only a text stands for."""
_OTHER = ("jobs", "suffix", "workflow", "inputs")


@dataclass(frozen=True)
class Job:
    """One edit of a batch.

    name: of its result, without folder and suffix; depends only on its settings. values: its settings in the file.
    labels: the name of its entry on each axis.
    """

    name: str
    values: dict[str, Any]
    labels: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """The jobs of a file.

    suffix: of the results. workflow, inputs: for a ComfyUI server, the API form of a workflow, and which node's input
    takes a setting ("5.text").
    """

    jobs: tuple[Job, ...]
    suffix: str
    workflow: Path | None
    inputs: dict[str, str]


def load_batch(path: str | Path) -> Batch:
    """Read a file of jobs, YAML or JSON. Raises ConfigError, naming the file, for invalid content."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no jobs at {path}")
    data = data_of(path)
    try:
        return batch_of(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def batch_of(data: Any) -> Batch:
    """The jobs of a file's content. Raises ConfigError for invalid content."""
    if not isinstance(data, Mapping) or not {*AXES, "jobs"} & set(data):
        raise ConfigError(f"contains no jobs: give {', '.join(AXES)}, or jobs")
    _check_keys({name: entries for name, entries in data.items() if name not in ("methods", "settings")})
    shared = {name: value for name, value in data.items() if name not in (*AXES, *_OTHER)}
    axes = {axis: _entries(axis, data[axis]) for axis in AXES if axis in data}
    jobs = [_job(shared, dict(zip(axes, chosen, strict=True))) for chosen in product(*axes.values())] if axes else []
    jobs += [_job(shared, {"clips": one}) for one in _entries("jobs", data["jobs"])] if "jobs" in data else []
    suffix, workflow, inputs = data.get("suffix", ".mp4"), data.get("workflow"), data.get("inputs", {})
    if suffix not in METADATA_SUFFIXES:
        raise ConfigError(f"suffix is {shown(suffix)}; it must be one of {', '.join(METADATA_SUFFIXES)}")
    if workflow is not None and not isinstance(workflow, str):
        raise ConfigError(f"workflow is {shown(workflow)}; it must be a file")
    if not isinstance(inputs, Mapping) or not all(isinstance(text, str) for pair in inputs.items() for text in pair):
        raise ConfigError(
            f'inputs is {shown(inputs)}; it must name a node\'s input for settings, e.g. "target: 5.text"'
        )
    file = Path(from_home(workflow)) if workflow else None
    return Batch(tuple({job.name: job for job in jobs}.values()), suffix, file, dict(inputs))


def _check_keys(data: Any) -> None:
    """Raise ConfigError for a setting whose name is not a text."""
    for part in data if isinstance(data, list) else data.values() if isinstance(data, Mapping) else ():
        _check_keys(part)
    wrong = [key for key in data if not isinstance(key, str)] if isinstance(data, Mapping) else []
    if wrong:
        raise ConfigError(f"{shown(wrong[0])} is not the name of a setting: write names as text")


Entry = tuple[str, dict[str, Any]]
"""A name, and settings."""


def _entries(axis: str, data: Any) -> list[Entry]:
    """The entries of an axis, or of "jobs", from a list, a section of named entries, or one entry.

    A clip has an entry for each file that matches. Jobs and targets of invalid types are left to their edits' checks.
    """
    if isinstance(data, Mapping) and axis in ("methods", "settings"):
        given: list[tuple[str, Any]] = [(str(name), entry) for name, entry in data.items()]
    else:
        given = [("", entry) for entry in (data if isinstance(data, list) else [data])]
    if not given:
        raise ConfigError(f"{axis} is empty")
    found = []
    for name, entry in given:
        if not isinstance(entry, (str, Mapping)) and axis not in ("jobs", "targets"):
            raise ConfigError(f"{axis}: {shown(entry)} must be a text, or a section of settings")
        values = dict(entry) if isinstance(entry, Mapping) else {_TEXT_OF[axis]: entry}
        _check_keys(values)
        name = str(values.pop("name", name))
        files = _files(values) if axis in ("clips", "jobs") else [values]
        if axis == "clips" and not files:
            raise ConfigError(f"clips: there are no clips at {shown(values['video'])[1:-1]}")
        found += [(name or _named(axis, one), one) for one in files or [values]]
    return found


def _files(values: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry for each file that matches a clip's pattern."""
    pattern = values.get("video")
    if not isinstance(pattern, str) or not glob.has_magic(pattern) or Path(pattern).exists():
        return [values]
    pattern = from_home(pattern)
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path's gives a relative name's root back otherwise
    found = [name for name in names if Path(name).is_file() or _of_pictures(name)]
    return [{**values, "video": name} for name in sorted(found)]


def _of_pictures(folder: str) -> bool:
    try:
        return bool(picture_files(Path(folder)))
    except ValueError:
        return False


def _named(axis: str, values: Mapping[str, Any]) -> str:
    """The default name of an entry."""
    text = values.get(_TEXT_OF[axis])
    if isinstance(text, str):
        return Path(text).stem if axis in ("clips", "jobs") else text
    return ", ".join(f"{name} {value}" for name, value in values.items())


_LONGEST = 200
"""Maximal bytes of a name before its digest; file systems allow 255 with suffixes."""


def _job(shared: Mapping[str, Any], chosen: Mapping[str, Entry]) -> Job:
    values = dict(shared)
    for _, own in chosen.values():
        values |= own
    labels = {axis: name for axis, (name, _) in chosen.items()}
    if "targets" not in labels and isinstance(values.get("target"), str):
        labels["targets"] = values["target"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    words = "_".join(filter(None, map(_slug, labels.values()))).encode()[:_LONGEST].decode(errors="ignore")
    return Job(f"{words}_{digest[:8]}", values, labels)


def _slug(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:40]
