"""Records of results: in a file next to a result and in its metadata, to repeat the same edit.

A record is a configuration of `fatezero edit` (every setting with another value than its default) with an extra section
`made`: the versions of program and libraries, the device, the dtype, the threads, and the hashes of the model and of
every file that was read.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import __version__
from ...files.whole import whole_file
from ...imports import torch
from ...settings import shown
from ...video.write import is_sequence
from .files import MADE, METADATA, data_of
from .paths import bare_name, digest_of, files_of, full_name, is_here, renamed
from .settings import ConfigError, EditConfig

_LIBRARIES = ("torch", "diffusers", "transformers", "av", "numpy")


@dataclass(frozen=True)
class Provenance:
    """The provenance of a result besides its settings.

    versions: of the program and its libraries. threads: of the CPU, because their number changes the order of sums.
    coding: how the autoencoder processed the frames, if that depends on free memory. model, vae: SHA-256 of their
    weights. files: SHA-256 of each file by its purpose. frames: digest of the frames given to the encoder; not in a
    video's metadata, which are written first. store: the file used instead of an inversion. model_config: see
    `Session`.
    """

    versions: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    coding: str = ""
    model: str = ""
    vae: str = ""
    files: dict[str, str] = field(default_factory=dict)
    frames: str = ""
    store: str | None = None
    model_config: str | None = None

    @classmethod
    def of(cls, data: Any) -> Provenance:
        """From a record. Raises ConfigError for invalid content."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{MADE} must be a section, as in a record")
        kinds = {one.name: type(getattr(cls(), one.name)) for one in fields(cls)}
        kinds |= {"threads": int, "store": str, "model_config": str}
        for name, value in data.items():
            right = name in kinds and (value is None or type(value) is kinds[name])
            if not right or (isinstance(value, dict) and not all(isinstance(text, str) for text in value.values())):
                raise ConfigError(f"{shown(f'{MADE}.{name}')[1:-1]} is {shown(value)}, which is not valid in a record")
        if (threads := data.get("threads")) is not None and not 1 <= threads <= 4096:
            raise ConfigError(f"{MADE}.threads is {shown(threads)}, which is not valid in a record")
        return cls(**{name: value for name, value in data.items() if value is not None})


def versions() -> dict[str, str]:
    """The versions of the program, of Python, and of the libraries that affect results."""
    found = {"fatezero": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- writing --------------------------------------------------------------------------------


def record_of(config: EditConfig, made: Provenance, named: Callable[[str], str] = full_name) -> dict[str, Any]:
    """A record. named: converts the names of files; by default to full paths."""
    other = {
        name: value and named(value) for name, value in (("store", made.store), ("model_config", made.model_config))
    }
    fields_made = {name: value for name, value in (asdict(made) | other).items() if value not in (None, "", {})}
    return settings_of(renamed(config, named)) | {MADE: fields_made}


def settings_of(config: Any, default: Any = None) -> dict[str, Any]:
    """The settings with other values than their defaults, for JSON; sections likewise."""
    default, found = default or type(config)(), dict[str, Any]()
    for one in fields(config):
        value, usual = getattr(config, one.name), getattr(default, one.name)
        if value == usual:
            continue
        if is_dataclass(value):
            found[one.name] = settings_of(value, usual)
        else:
            found[one.name] = dict(value) if isinstance(value, Mapping) else value
    return found


def record_path(output: str | Path) -> Path:
    """The path of an output's record: its name with ".json" appended; in a folder of pictures "edit.json"."""
    if is_sequence(output) and str(output).endswith(("/", "\\")):
        return Path(output) / "edit.json"
    return Path(f"{output}.json")


def write_record(output: str | Path, record: Mapping[str, Any]) -> Path:
    """Write a record next to its output; returns the record's path."""
    path = record_path(output)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def metadata_of(config: EditConfig, made: Provenance) -> dict[str, str]:
    """The record for a video's metadata: with file names without folders, because videos are shared."""
    return {METADATA: json.dumps(record_of(config, made, bare_name), ensure_ascii=False)}


# --- reading --------------------------------------------------------------------------------


def made_by(path: Path) -> Provenance | None:
    """The provenance in a record; None for a plain configuration. Raises ConfigError naming the file."""
    data = data_of(path)
    if not isinstance(data, Mapping) or MADE not in data:
        return None
    try:
        made = Provenance.of(data[MADE])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return made if made.frames else replace(made, frames=_frames_of_record(path, made))


def _frames_of_record(result: Path, made: Provenance) -> str:
    """The digest of a result's frames in the record next to it, if that matches its metadata; else ""."""
    with suppress(ConfigError, OSError, KeyError, TypeError):
        found = Provenance.of(data_of(record_path(result))[MADE])
        # the metadata omit the folders of files
        same = replace(found, frames="", store=made.store, model_config=made.model_config) == made
        return found.frames if same else ""
    return ""


def check_is_here(path: Path, config: EditConfig, model_config: str | None, given: Collection[str]) -> None:
    """Raise ConfigError for a record's model that is not on this machine; only users name models to download.

    given: the names of settings that the user gave.
    """
    for name, value in (("model", config.model), ("model_config", model_config)):
        if value and name not in given and not is_here(value):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{path}: {name} is {shown(value)}, which is not on this machine: give it with {flag}")


def files_read(
    configs: Sequence[EditConfig], store: str | Path | None, digest: Callable[[str], str] | None = None
) -> list[dict[str, str]]:
    """The digests of the files that each edit reads, by purpose; without the model, whose weights are hashed."""
    digest = digest or cache(digest_of)  # edits of a run share most files
    named = [files_of(config) | ({"store": str(store)} if store else {}) for config in configs]
    return [
        {what: digest(file) for what, file in of.items() if what not in ("model", "temporal", "controlnet")}
        for of in named
    ]


def differences(now: Provenance, then: Provenance) -> list[str]:
    """The differences, in words, that can change the last digits of a result."""
    found = [
        f"{name} {then.versions[name]} (here {there})"
        for name, there in now.versions.items()
        if then.versions.get(name, there) != there
    ]
    for name in ("device", "dtype", "threads", "coding"):
        was, there = getattr(then, name), getattr(now, name)
        if was and there and was != there and was != "auto":
            found.append(f"{name} {was} (here {there})")
    return found


def check_same(now: Provenance, then: Provenance) -> None:
    """Raise ConfigError if repeating an edit would use another file or model."""
    for name, digest in then.files.items():
        if now.files.get(name, digest) != digest:
            flag = _FLAGS.get(name.partition(" ")[0], "other settings")
            raise ConfigError(f"the {name} is not the file that the result was made from: give {flag} to use this one")
    for name, what in (("model", "model"), ("vae", "autoencoder")):
        was, there = getattr(then, name), getattr(now, name)
        if was and there != was and now.dtype == then.dtype:
            raise ConfigError(f"the {what}'s weights are not those of the result: give --model to use these")


_FLAGS = {
    "video": "VIDEO", "lora": "--lora", "store": "--store", "control": "--control", "edit_mask": "--edit-mask",
    "first_frame": "--first-frame", "guide_frame": "--guide-frame",
}  # fmt: skip
"""The options that replace a record's files."""
_OF_WEIGHTS = {"model", "lora", "temporal", "variant", "controlnet", "model_config"}
"""Settings that change the weights."""


def without_given(made: Provenance, given: Collection[str]) -> Provenance:
    """Without the parts that given settings replace. given: the names of settings."""
    files = {name: digest for name, digest in made.files.items() if name.partition(" ")[0] not in given}
    frames = made.frames if set(given) <= {"video"} else ""  # a video may have moved
    same = replace(made, files=files, frames=frames)
    return replace(same, model="", vae="") if _OF_WEIGHTS & set(given) else same


def threads_on(device: torch.device) -> int | None:
    """The threads that a CPU computes with; None for other devices."""
    return torch.get_num_threads() if device.type == "cpu" else None
