"""Settings, each written once: command options, YAML keys, node widgets, tooltips and tables come from its field."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from inspect import get_annotations
from math import inf, isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Setting:
    """User-facing description of a dataclass field.

    help: one or two sentences. least, most: the range, both included. unit: the number's unit. symbol: the paper's name
    for it. shown: what help prints for a default of None. step: the widget's step. group: the heading in the
    command's help.
    """

    help: str
    least: float = -inf
    most: float = inf
    unit: str = ""
    symbol: str = ""
    shown: str = ""
    step: float | None = None
    group: str = ""

    @property
    def text(self) -> str:
        """Help with unit and symbol."""
        more = "; ".join(part for part in (self.unit, f"the paper's {self.symbol}" if self.symbol else "") if part)
        return f"{self.help.removesuffix('.')} ({more})." if more else self.help


def setting(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a `Setting`; a callable default is a factory."""
    made: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return field(**made, metadata={"setting": Setting(help, **more)})


@dataclass(frozen=True)
class NamedSetting:
    """A setting with its name, type and default."""

    name: str
    kind: Any
    default: Any
    meta: Setting

    @property
    def optional(self) -> bool:
        return NoneType in get_args(self.kind)

    @property
    def plain(self) -> Any:
        """The type without None."""
        left = [kind for kind in get_args(self.kind) if kind is not NoneType]
        return left[0] if is_union(self.kind) and len(left) == 1 else self.kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The words of a Literal; empty for other types."""
        kinds = get_args(self.kind) if is_union(self.kind) else (self.kind,)
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())

    @property
    def switch(self) -> bool:
        """Whether it is on or off; with `choices`, or one of these words."""
        return self.plain is bool or (is_union(self.kind) and bool in get_args(self.kind))


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def settings_of(settings: type) -> Iterator[NamedSetting]:
    """The settings of a dataclass, in order."""
    kinds = _kinds(settings)
    for one in fields(settings):
        if "setting" in one.metadata:
            yield NamedSetting(one.name, kinds[one.name], _default(one), one.metadata["setting"])


def _kinds(settings: type) -> dict[str, Any]:
    """The types of a dataclass's settings. Types of its other fields may be imported for type checking only."""
    named, found = {one.name for one in fields(settings) if "setting" in one.metadata}, dict[str, Any]()
    for base in reversed(settings.__mro__):
        own = {name: kind for name, kind in get_annotations(base).items() if name in named}
        found |= get_type_hints(type(base.__name__, (), {"__annotations__": own, "__module__": base.__module__}))
    return found


def setting_of(settings: type, name: str) -> NamedSetting:
    """A dataclass's setting, by name."""
    return next(one for one in settings_of(settings) if one.name == name)


def _default(one: Field[Any]) -> Any:
    made: Any = one.default_factory
    return made() if one.default is MISSING else one.default


def setting_like(settings: type, name: str, default: Any, **more: Any) -> Any:
    """A setting of another dataclass, with another default and whatever else differs."""
    return field(default=default, metadata={"setting": replace(setting_of(settings, name).meta, **more)})


def check(settings: Any) -> None:
    """Raise ValueError, naming the setting, for a value out of its range or not among its choices."""
    for one in settings_of(type(settings)):
        check_one(one, getattr(settings, one.name))


def check_one(one: NamedSetting, value: Any) -> None:
    """Raise ValueError, naming the setting, for a value out of its range or not among its choices."""
    if one.choices and value not in one.choices and not (one.switch and isinstance(value, bool)):
        switch = "true, false or " if one.switch else ""
        raise ValueError(f"{one.name} is {shown(value)}; it must be {switch}one of {', '.join(one.choices)}")
    if one.plain in (int, float) and not (value is None and one.optional) and not _fits(value, one):
        raise ValueError(f"{one.name} is {shown(value)}; it must be {range_in_words(one.meta)}")


def _fits(value: Any, one: NamedSetting) -> bool:
    number = isinstance(value, int) or (isinstance(value, float) and isfinite(value))
    return number and one.meta.least <= value <= one.meta.most


def range_in_words(setting: Setting) -> str:
    """The range of a number, in words."""
    if isfinite(setting.least) and isfinite(setting.most):
        return f"between {setting.least:g} and {setting.most:g}"
    return f"a number of at least {setting.least:g}" if isfinite(setting.least) else "a finite number"


# --- values in errors -----------------------------------------------------------------------

_SHOWN = 72
"""Maximal characters of a value in an error."""


class _Values(reprlib.Repr):
    """Python's repr, with the middle of long values cut out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _SHOWN, _SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """A value's repr for an error, cut to about 70 characters."""
    return shortened(_Values().repr(value), _SHOWN)


def shortened(text: str, most: int) -> str:
    """A text cut in its middle to at most `most` characters: errors start with the fault and end with the remedy."""
    head = 2 * (most - 5) // 3
    return text if len(text) <= most else f"{text[:head]} ... {text[head + 5 - most :]}"


# --- numbers of words -----------------------------------------------------------------------


def numbers_of_words(name: str, items: Iterable[str]) -> dict[str, float | tuple[float, float]]:
    """Numbers of words written as "watercolor=10", ranges as "car=0.2:0.8". Raises ValueError, naming the setting."""
    return dict(_number_of_word(name, item) for item in items)


def _number_of_word(name: str, item: str) -> tuple[str, float | tuple[float, float]]:
    word, _, text = item.rpartition("=")
    try:
        first, *more = map(float, text.split(":", 1))
    except ValueError:
        first, more, word = 0.0, [], ""
    if not word.strip():
        raise ValueError(f"{name} is {shown(item)}; it must be word=number, such as watercolor=10")
    return word.strip(), (first, *more) if more else first  # type: ignore[return-value]


# --- shares of steps ------------------------------------------------------------------------


def steps_of_share(share: float, steps: int) -> int:
    """int(share * (steps + 1)), Prompt-to-Prompt's count of cross-attention steps; at most `steps`."""
    return min(steps, int(share * (steps + 1) + 1e-9))


def whole_steps(share: float, steps: int) -> int:
    """int(share * steps)."""
    return int(share * steps + 1e-9)
