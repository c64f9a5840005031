"""All that made a result, beside it and within it, and the same edit made again from that.

A record is a configuration of `fatezero edit` (every setting that is no default) with one section more, `made`: the
program's and its libraries' versions, the device, the number type and the threads, the model by its hash, and the
hash of every file that was read.
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
from .files import MADE, METADATA, held_by
from .paths import bare_name, digest_of, files_of, full_name, is_here, renamed
from .settings import ConfigError, EditConfig

_LIBRARIES = ("torch", "diffusers", "transformers", "av", "numpy")


@dataclass(frozen=True)
class Made:
    """What a result was made with, beside its settings.

    versions: of the program and its libraries. threads: of a CPU's arithmetic, which adds in another order with other
    ones. coding: how the autoencoder took the frames, where that depends on the memory there is. model, vae: SHA-256
    of their weights. files: SHA-256 of each file by what it is for. frames: of those that went to the encoder, which
    a video's metadata come too early to know. store: the file that took the place of an
    inversion. model_config: see `Session`.
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
    def of(cls, held: Any) -> Made:
        """From a record; ConfigError for what is none."""
        if not isinstance(held, Mapping):
            raise ConfigError(f"{MADE} must be a section, as a record has it")
        kinds = {one.name: type(getattr(cls(), one.name)) for one in fields(cls)}
        kinds |= {"threads": int, "store": str, "model_config": str}
        for name, value in held.items():
            right = name in kinds and (value is None or type(value) is kinds[name])
            if not right or (isinstance(value, dict) and not all(isinstance(text, str) for text in value.values())):
                raise ConfigError(f"{shown(f'{MADE}.{name}')[1:-1]} is {shown(value)}, which no record has")
        if (threads := held.get("threads")) is not None and not 1 <= threads <= 4096:
            raise ConfigError(f"{MADE}.threads is {shown(threads)}, which no record has")
        return cls(**{name: value for name, value in held.items() if value is not None})


def versions() -> dict[str, str]:
    """Of the program, of Python, and of the libraries whose numbers end up in a result."""
    found = {"fatezero": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- what is written ------------------------------------------------------------------------


def record_of(config: EditConfig, made: Made, named: Callable[[str], str] = full_name) -> dict[str, Any]:
    """A record. named: how it calls files, by default so that it holds wherever it is read."""
    other = {
        name: value and named(value) for name, value in (("store", made.store), ("model_config", made.model_config))
    }
    told = {name: value for name, value in (asdict(made) | other).items() if value not in (None, "", {})}
    return settings_of(renamed(config, named)) | {MADE: told}


def settings_of(config: Any, default: Any = None) -> dict[str, Any]:
    """The settings that are no defaults, as JSON has them; sections likewise."""
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
    """Where the record of an output is: its name with ".json" after it; in a folder of pictures "edit.json"."""
    if is_sequence(output) and str(output).endswith(("/", "\\")):
        return Path(output) / "edit.json"
    return Path(f"{output}.json")


def write_record(output: str | Path, record: Mapping[str, Any]) -> Path:
    """Beside the output."""
    path = record_path(output)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def metadata_of(config: EditConfig, made: Made) -> dict[str, str]:
    """The record for a video's metadata, which travel: with the names of files, and not the folders they were in."""
    return {METADATA: json.dumps(record_of(config, made, bare_name), ensure_ascii=False)}


# --- what is read ---------------------------------------------------------------------------


def made_by(path: Path) -> Made | None:
    """What a record says of its making; None for a configuration that is no record. ConfigError naming the file."""
    held = held_by(path)
    if not isinstance(held, Mapping) or MADE not in held:
        return None
    try:
        made = Made.of(held[MADE])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return made if made.frames else replace(made, frames=_frames_beside(path, made))


def _frames_beside(result: Path, made: Made) -> str:
    """The digest of a result's frames by the record beside it, if that is still its own; else none."""
    with suppress(ConfigError, OSError, KeyError, TypeError):
        beside = Made.of(held_by(record_path(result))[MADE])
        # the folders of its files' names are told within the result no more
        same = replace(beside, frames="", store=made.store, model_config=made.model_config) == made
        return beside.frames if same else ""
    return ""


def check_is_here(path: Path, config: EditConfig, model_config: str | None, given: Collection[str]) -> None:
    """Raise ConfigError for a record's model that is not here: what is fetched from a hub, its user names.

    given: the names of settings that the user gave.
    """
    for name, value in (("model", config.model), ("model_config", model_config)):
        if value and name not in given and not is_here(value):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{path}: {name} is {shown(value)}, which is not here: give it with {flag}")


def files_read(configs: Sequence[EditConfig], store: str | Path | None) -> list[dict[str, str]]:
    """The digest of each file that each edit reads, by what it is for; not of the model, whose weights are known."""
    digest = cache(digest_of)  # edits of one run share most of them
    named = [files_of(config) | ({"store": str(store)} if store else {}) for config in configs]
    return [
        {what: digest(file) for what, file in of.items() if what not in ("model", "temporal", "controlnet")}
        for of in named
    ]


def differences(now: Made, then: Made) -> list[str]:
    """What is another than it was, in words, where that can change the last digits of a result."""
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


def check_same(now: Made, then: Made) -> None:
    """Raise ConfigError where an edit that shall be made again would be of another file or model."""
    for name, digest in then.files.items():
        if now.files.get(name, digest) != digest:
            flag = _FLAGS.get(name.partition(" ")[0], "other settings")
            raise ConfigError(f"the {name} is not the file that the result was made of: give {flag} to take this one")
    for name, what in (("model", "model"), ("vae", "autoencoder")):
        was, there = getattr(then, name), getattr(now, name)
        if was and there != was and now.dtype == then.dtype:
            raise ConfigError(
                f"the {what}'s weights are not those the result was made with: give --model to take these"
            )


_FLAGS = {
    "video": "VIDEO", "lora": "--lora", "store": "--store", "control": "--control", "edit_mask": "--edit-mask",
}  # fmt: skip
"""The options that take another file than a record names."""
_OF_WEIGHTS = {"model", "lora", "temporal", "variant", "controlnet", "model_config"}
"""Settings that other weights come with."""


def apart_from(made: Made, given: Collection[str]) -> Made:
    """The same without what was asked for otherwise, by the names of settings."""
    files = {name: digest for name, digest in made.files.items() if name.partition(" ")[0] not in given}
    frames = made.frames if set(given) <= {"video"} else ""  # a video may have moved, and is the same
    same = replace(made, files=files, frames=frames)
    return replace(same, model="", vae="") if _OF_WEIGHTS & set(given) else same


def threads_on(device: torch.device) -> int | None:
    """The threads that a CPU computes with; None for other devices."""
    return torch.get_num_threads() if device.type == "cpu" else None
