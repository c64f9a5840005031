"""A file of jobs: clips x targets x settings x methods, each with its own, and single ones."""

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
from ..config.files import held_by
from ..config.settings import ConfigError
from ..config.values import from_home

AXES = ("clips", "methods", "settings", "targets")
"""The keys whose entries are combined: a later one's settings stand over an earlier one's, and all over the file's."""
_TEXT_OF = {"clips": "video", "jobs": "video", "methods": "preset", "settings": "preset", "targets": "target"}
"""The setting that an entry is which is a text alone."""
_OTHER = ("jobs", "suffix", "workflow", "inputs")


@dataclass(frozen=True)
class Job:
    """One edit of a batch.

    name: of its result, without folder and suffix; the same whatever else its file holds. values: the settings its
    file gives it. labels: the name of its entry on each axis.
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
    """Read a file of jobs, YAML or JSON; ConfigError, naming the file, for what cannot be one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no jobs at {path}")
    held = held_by(path)
    try:
        return _batch(held)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _batch(held: Any) -> Batch:
    if not isinstance(held, Mapping) or not {*AXES, "jobs"} & set(held):
        raise ConfigError(f"holds no jobs: give {', '.join(AXES)}, or jobs one by one")
    _check_keys({name: entries for name, entries in held.items() if name not in ("methods", "settings")})
    shared = {name: value for name, value in held.items() if name not in (*AXES, *_OTHER)}
    axes = {axis: _entries(axis, held[axis]) for axis in AXES if axis in held}
    jobs = [_job(shared, dict(zip(axes, chosen, strict=True))) for chosen in product(*axes.values())] if axes else []
    jobs += [_job(shared, {"clips": one}) for one in _entries("jobs", held["jobs"])] if "jobs" in held else []
    suffix, workflow, inputs = held.get("suffix", ".mp4"), held.get("workflow"), held.get("inputs", {})
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


def _check_keys(held: Any) -> None:
    """Raise ConfigError for a setting whose name is no text."""
    for part in held if isinstance(held, list) else held.values() if isinstance(held, Mapping) else ():
        _check_keys(part)
    wrong = [key for key in held if not isinstance(key, str)] if isinstance(held, Mapping) else []
    if wrong:
        raise ConfigError(f"{shown(wrong[0])} is no name of a setting: write names as text")


Entry = tuple[str, dict[str, Any]]
"""A name, and settings."""


def _entries(axis: str, held: Any) -> list[Entry]:
    """The entries of an axis, or of "jobs": a list, a section of named ones, or one alone; a clip's for each file it
    names. What a single job or target is that is no text, its edit refuses.
    """
    if isinstance(held, Mapping) and axis in ("methods", "settings"):
        given: list[tuple[str, Any]] = [(str(name), entry) for name, entry in held.items()]
    else:
        given = [("", entry) for entry in (held if isinstance(held, list) else [held])]
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
            raise ConfigError(f"clips: there is none at {shown(values['video'])[1:-1]}")
        found += [(name or _named(axis, one), one) for one in files or [values]]
    return found


def _files(values: dict[str, Any]) -> list[dict[str, Any]]:
    """A clip's entry for each file that its name stands for, where it has a * in it."""
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
    """A name for an entry that was given none."""
    text = values.get(_TEXT_OF[axis])
    if isinstance(text, str):
        return Path(text).stem if axis in ("clips", "jobs") else text
    return ", ".join(f"{name} {value}" for name, value in values.items())


_LONGEST = 200
"""Bytes of a name before its digest; file systems take 255 with suffixes."""


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
    """A text as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:40]
