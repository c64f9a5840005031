"""The files of an edit: their paths, digests and other names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files.bundled import LORAS
from ...files.lora import LoraFile
from ...files.whole import check_name
from ...models import DEMOS
from ...video.pictures import VideoError, numbered, picture_files
from .settings import FILES, FILES_OF_OBJECTS, EditConfig, GenerateConfig, TuneConfig

_OF_CLIPS = ("video", "control", "edit_mask", "first_frame", "class_pictures", *FILES_OF_OBJECTS)
"""The settings whose file is a video or pictures; others are weights."""


def is_clip(what: str) -> bool:
    """Whether a file is a video or pictures, by its key in `files_of`."""
    return what.partition(" ")[0] in _OF_CLIPS


def files_of(config: EditConfig | GenerateConfig | TuneConfig) -> dict[str, str]:
    """The files of a configuration by purpose; "mask burger" is the mask of a burger, "lora 2" the
    second LoRA.
    """
    found = {name: getattr(config, name, "") for name in FILES}
    found = {name: file for name, file in found.items() if name == "video" or file not in DEMOS}
    for number, text in enumerate(getattr(config, "lora", ()), 1):
        if (path := LoraFile.parse(text).path) not in LORAS:
            found["lora" if number == 1 else f"lora {number}"] = path
    for kind in FILES_OF_OBJECTS:
        for text in getattr(config, kind, ()):
            words, _, file = text.partition(":")
            found[f"{kind} {words.strip()}"] = file.strip()
    return {name: file for name, file in found.items() if file}


def check_names(files: Mapping[str, str | Path | None]) -> None:
    """Raise ValueError, naming the setting, for an invalid file name or a broken link."""
    for what, file in files.items():
        try:
            check_name(file or "")
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}: {error}") from error
        if file and Path(file).is_symlink() and not Path(file).exists():
            raise FileNotFoundError(f"{what}: {file} is a broken link")


def renamed(config: EditConfig, named: Callable[[str], str]) -> EditConfig:
    """An edit with other names for its files."""

    def of_object(text: str) -> str:
        words, _, file = text.partition(":")
        return f"{words}: {named(file.strip())}"

    def of_lora(text: str) -> str:
        lora = LoraFile.parse(text)
        return str(replace(lora, path=named(lora.path)))

    changed: dict[str, Any] = {name: named(file) for name, file in files_of(config).items() if name in FILES}
    changed["lora"] = tuple(map(of_lora, config.lora))
    changed |= {kind: tuple(map(of_object, getattr(config, kind))) for kind in FILES_OF_OBJECTS}
    return replace(config, **changed)


def is_here(model: str) -> bool:
    """Whether a model is bundled or on this machine; others are on a hub."""
    return model in DEMOS or Path(model).exists()


def full_name(name: str) -> str:
    """The full path of a file on this machine; other names, as of hub models, unchanged."""
    path = Path(name)
    pattern = path.parent.is_dir() and ("*" in path.name or numbered(path))
    return str(path.absolute()) if path.exists() or pattern else name


def bare_name(name: str) -> str:
    """A file's name without its folder; other names unchanged."""
    path = Path(full_name(name))
    return path.name if path.is_absolute() else name


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file, or of the pictures that a folder or a pattern names, with their names; of a folder without
    pictures, as a LoRA's, of all its files.
    """
    path = Path(path)
    if path.is_file():
        return _sha256(path)
    try:
        files: Sequence[Path] = picture_files(path)
    except VideoError:
        files = sorted(file for file in path.rglob("*") if file.is_file())
    whole = hashlib.sha256()
    for file in files:
        whole.update(os.fsencode(file.name) + f" {_sha256(file)}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
