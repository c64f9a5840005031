"""Widgets made from the settings of dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from math import isfinite
from typing import Any, TypeVar, get_origin

from comfy_api.latest import io

from ..settings import NamedSetting, numbers_of_words, setting_of, settings_of

T = TypeVar("T")

ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in signature(io.Float.Input.__init__).parameters else {}
"""Options that hide a rarely used widget by default, if the host supports it."""

MOST = {int: 1_000_000, float: 10_000.0}
"""Maximal values of widgets whose settings have none."""


def widget(settings: type, name: str, id: str | None = None, advanced: bool = False, **other: Any) -> Any:
    """The widget of a setting. id: its name on the node, if different. other: replaces options of the setting.

    For an optional number, 0 means None.
    """
    one = setting_of(settings, name)
    meta, kind = one.meta, one.plain
    given: dict[str, Any] = {"default": _default(one), "tooltip": meta.text, **(ADVANCED if advanced else {})}
    if one.optional and kind in (int, float):
        given |= {"min": 0, "tooltip": f"{meta.text} 0: {meta.shown}."}
    elif kind in (int, float):
        given |= {"min": kind(meta.least) if isfinite(meta.least) else -MOST[kind]}
    if kind in (int, float):
        given |= {
            "max": kind(meta.most) if isfinite(meta.most) else MOST[kind],
            "step": meta.step or {int: 1, float: 0.01}[kind],
        }
    if one.choices and not one.switch:
        return io.Combo.Input(id or name, **{"options": list(one.choices), **given, **other})
    inputs: dict[Any, Any] = {bool: io.Boolean.Input, int: io.Int.Input, float: io.Float.Input}
    return inputs.get(bool if one.switch else kind, io.String.Input)(id or name, **{**given, **other})


def widgets(settings: type, *names: str, advanced: tuple[str, ...] = (), later: tuple[str, ...] = ()) -> list[Any]:
    """The widgets of some settings, or of all; the words that a switch also takes are switches at the end.

    later: settings that older workflows lack.
    """
    chosen = names or tuple(one.name for one in settings_of(settings))
    optional: dict[str, dict[str, Any]] = {name: {"optional": True} for name in later}
    own = [widget(settings, name, advanced=name in advanced, **optional.get(name, {})) for name in chosen]
    return own + [
        io.Boolean.Input(_word_id(name, word), default=False, optional=True, tooltip=f"Set {name} to {word}.")
        for name in chosen
        for word in _words(setting_of(settings, name))
    ]


def made(settings: type[T], values: dict[str, Any]) -> T:
    """The settings from widgets' values; ValueError for values that conflict."""
    kinds, values = {one.name: one for one in settings_of(settings)}, dict(values)
    of_words = {
        name: word for name, one in kinds.items() for word in _words(one) if values.pop(_word_id(name, word), False)
    }
    return settings(**{name: _value(kinds[name], value) for name, value in values.items()} | of_words)


def _words(one: NamedSetting) -> tuple[str, ...]:
    """The words that a switch also takes."""
    return one.choices if one.switch else ()


def _word_id(name: str, word: str) -> str:
    return f"{name}_{word}"


def words_in(text: str) -> list[str]:
    """The words of a widget, separated by commas or lines."""
    return [word.strip() for word in text.replace("\n", ",").split(",") if word.strip()]


def _default(one: NamedSetting) -> Any:
    if isinstance(one.default, tuple):
        return ", ".join(map(str, one.default))
    if get_origin(one.kind) is Mapping:
        return ""
    return 0 if one.default is None else one.default


def _value(one: NamedSetting, value: Any) -> Any:
    if get_origin(one.kind) is Mapping:
        return numbers_of_words(one.name, words_in(value))
    return None if one.optional and one.plain in (int, float) and not value else value
