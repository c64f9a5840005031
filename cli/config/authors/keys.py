"""The keys of the authors' files, and what becomes of each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ....settings import shown
from ..fitting import WRONG, fitted, in_words
from ..settings import ConfigError

Command = Literal["edit", "tune"]
REFUSED = (None,)
"""For `Key.only`: no value can be followed."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """A key of the authors' files.

    kind: its type. default: what a missing key means there; None for nothing. edit, tune: the settings that it becomes
    in each command; "" where it has no effect there. read: the setting's value from the key's; None for a key that only
    the functions of its repository read. only: the values that can be followed; others are refused. about: how it maps,
    or for other values than `only`, what to write instead.
    """

    name: str
    kind: Any = Any
    default: Any = None
    edit: str = ""
    tune: str = ""
    about: str = ""
    read: Callable[[Any], Any] | None = _same
    only: tuple[Any, ...] = ()

    def settings(self, command: Command) -> str:
        return self.edit if command == "edit" else self.tune


Keys = tuple[Key, ...]


@dataclass
class AuthorsFile:
    """A file as a command reads it. others, idle: its keys for the other command, and those without effect."""

    data: Mapping[str, Any]
    command: Command
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    def section(self, path: Sequence[str], keys: Keys) -> Section:
        """A section by its path; empty if it is missing. Raises ConfigError for a key that cannot be followed."""
        data = self.at(path)
        if not isinstance(data, Mapping):
            raise ConfigError(f"{_name(path)} is {shown(data)}; it must be a section")
        return Section(self, tuple(path), keys, data)

    def at(self, path: Sequence[str]) -> Any:
        """The value at a path; an empty section if it is missing."""
        found: Any = self.data
        for part in path:
            if isinstance(found, Mapping):
                found = found.get(part, found.get(int(part)) if part.isdecimal() else None)
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                found = None
        return {} if found is None else found

    def resolved(self, value: Any, path: Sequence[str]) -> Any:
        """A value with OmegaConf's references followed: "${a.b}" from the root, "${..a}" from one section up.

        path: of the value's key. Raises ConfigError for a reference to nothing.
        """
        for _ in range(10):
            if not (isinstance(value, str) and "${" in value):
                return value
            found = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", value)
            dots, names = found.groups() if found else ("", "")
            path = (*(path[: len(path) - len(dots)] if dots else ()), *names.split("."))
            value = self.at(path) if found else {}
            if value == {}:
                raise ConfigError(f"{_name(path)} is a reference to nothing: write the value itself")
        raise ConfigError(f"{_name(path)} refers to itself: write the value itself")

    def all_notes(self) -> list[str]:
        """The notes, with the keys that have no effect."""
        other, what = ("tune", "an edit") if self.command == "edit" else ("edit", "a tuning")
        found = [f"for `fatezero {other} --config`, left out: {', '.join(self.others)}"] if self.others else []
        found += [f"without effect on {what}, left out: {', '.join(self.idle)}"] if self.idle else []
        return [*self.notes, *found]


@dataclass(frozen=True)
class Section:
    """A section of a file, its keys checked."""

    file: AuthorsFile
    path: tuple[str, ...]
    keys: Keys
    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = {key.name: key for key in self.keys}
        for name in self.data:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ConfigError(f"unknown key {self.name(name)}{hint}")
            self._check(known[name])

    def _check(self, key: Key) -> None:
        file, command = self.file, self.file.command
        if key.only:
            value = self.value(key.name)
            if value is not None and value not in key.only:
                raise ConfigError(f"{self.name(key.name)} is {shown(value)}; {key.about}")
        elif not key.settings(command):
            (file.others if key.edit or key.tune else file.idle).append(self.name(key.name))

    def name(self, key: str) -> str:
        return _name((*self.path, key))

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def value(self, name: str) -> Any:
        """A key's value in its type, or what a missing one means. Raises ConfigError, naming the key."""
        key = next(key for key in self.keys if key.name == name)
        value = self.file.resolved(self.data.get(name), (*self.path, name))
        return key.default if value is None else self.typed(name, value, key.kind)

    def typed(self, name: str, value: Any, kind: Any) -> Any:
        """A value as a type. Raises ConfigError, naming its key."""
        if kind is Any:
            return value
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        found = fitted(value, kind)
        if found is WRONG:
            raise ConfigError(f"{self.name(name)} is {shown(value)}; it must be {in_words(kind)}")
        return float(found) if kind is float else found

    def settings(self) -> dict[str, Any]:
        """The settings of the keys that become one each; those of sections in dictionaries of their own."""
        found: dict[str, Any] = {}
        for key in self.keys:
            name = key.settings(self.file.command)
            value = self.value(key.name) if name and key.read else None
            if value is not None and key.read:
                section, _, own = name.rpartition(".")
                (found.setdefault(section, {}) if section else found)[own] = key.read(value)
        return found


def _name(path: Sequence[str]) -> str:
    """A key's name in errors: a.b[1].c."""
    return "".join(f"[{part}]" if str(part).isdecimal() else f".{part}" for part in path).removeprefix(".")


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over each other, with sections merged."""
    found: dict[str, Any] = {}
    for name, value in (pair for part in parts for pair in part.items()):
        found[name] = {**found.get(name, {}), **value} if isinstance(value, Mapping) else value
    return found


# --- keys of several repositories --------------------------------------------------------------

TRAINER: Keys = (
    Key("mixed_precision", only=("fp16",), about="write fp16; for no give --dtype float32, for bf16 --dtype bfloat16"),
    Key("gradient_accumulation_steps", only=(1,), about="every step updates the weights: write 1"),
    Key("train_batch_size", only=(1,), about="a step is on one clip: write 1"),
    Key("learning_rate", float, 3e-5, tune="learning_rate"),
    Key("scale_lr", only=(False,), about="write False, and the scaled learning_rate"),
    Key("lr_scheduler", only=("constant",), about="the learning rate is constant: write constant"),
    Key("lr_warmup_steps", about="no effect on a constant learning rate"),
    Key("adam_beta1", only=(0.9,), about="write 0.9"),
    Key("adam_beta2", only=(0.999,), about="write 0.999"),
    Key("adam_epsilon", only=(1e-8,), about="write 1e-08"),
    Key("adam_weight_decay", float, 1e-2, tune="weight_decay"),
    Key("max_grad_norm", float, 1.0, tune="clip_gradients"),
    Key("gradient_checkpointing", about="saves memory only"),
)  # fmt: skip
