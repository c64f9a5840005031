"""Read a file of the authors, of any of their repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..settings import ConfigError
from . import fatezero, tokenflow, tune_a_video
from .keys import AuthorsFile


@dataclass(frozen=True)
class Repository:
    """A repository of the papers' authors. marks: the keys that its files have. module: reads them."""

    title: str
    marks: tuple[str, ...]
    module: ModuleType


REPOSITORIES = (
    Repository("FateZero", ("editing_config", "dataset_config"), fatezero),
    Repository("Tune-A-Video", ("train_data",), tune_a_video),
    Repository("TokenFlow", ("data_path", "sd_version", "n_timesteps"), tokenflow),
)
_OLDER = ("train_dataset", "validation_sample_logger", "validation_sample_logger_config")


def repository_of(data: Mapping[str, Any]) -> Repository | None:
    """The repository of a file; None for other files. Raises ConfigError for an older layout."""
    if any(mark in data for mark in _OLDER):
        raise ConfigError("is in FateZero's older layout (train_dataset); dataset_config and editing_config are read")
    return next((one for one in REPOSITORIES if any(mark in data for mark in one.marks)), None)


def edits_of(
    repository: Repository, data: Mapping[str, Any], source: str | None = None, target: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The settings of a file's edits, and notes. source, target: given elsewhere, in place of the file's."""
    file = AuthorsFile(data, "edit")
    found = repository.module.edits(file, source, target)
    return found, file.all_notes()


def tuning_of(repository: Repository, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file's tuning, and notes."""
    file = AuthorsFile(data, "tune")
    found = repository.module.tuning(file)
    return dict(found), file.all_notes()
