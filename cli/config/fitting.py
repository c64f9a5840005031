"""Convert values that users wrote to the type and range of their setting."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from ...settings import NamedSetting, check_one, is_union, settings_of, shown
from .settings import FILES, FILES_OF_OBJECTS, ConfigError

FILE_NAMES = {
    *FILES, *FILES_OF_OBJECTS, "lora", "truth", "lpips", "clip", "output", "plot", "comparison", "pairs", "state",
    "five", "v2v", "dino", "niqe", "tracker", "vlm", "aesthetic", "pickscore", "viclip", "gmflow",
}  # fmt: skip
"""The settings of files."""


def fitting(values: Mapping[str, Any], known: Mapping[str, NamedSetting], where: str = "") -> dict[str, Any]:
    """Values converted to their types and checked against their ranges."""
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {where + near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown setting {', '.join(shown(where + name) for name in unknown[:3])}{hint}")
    found = {}
    for name, value in values.items():
        kind = known[name].kind
        found[name] = fitted(_plain_value(value, kind), kind)
        if found[name] is WRONG:
            raise ConfigError(f"{where}{name} is {shown(value)}; it must be {in_words(kind)}{_if_great(value)}")
        _check_text(where + name, found[name], "\0" if name in FILE_NAMES else _HALVES)
        try:
            check_one(known[name], found[name])
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from error
    return found


def _if_great(value: Any) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ", below 2**63" if any(isinstance(part, int) and abs(part) > _MOST for part in parts) else ""


_HALVES = "\ud800-\udfff"
"""UTF-16 surrogates, which are not text; in file names they stand for bytes that are not UTF-8."""


def _check_text(name: str, value: Any, wrong: str) -> None:
    """Raise ConfigError for a text with invalid characters."""
    for text in (value,) if isinstance(value, str) else value if isinstance(value, (tuple, dict)) else ():
        if isinstance(text, str) and (found := re.search(f"[{wrong}]", text)):
            raise ConfigError(f"{name} is {shown(value)}; remove {found[0]!r}")


def section_of(name: str, given: Any, settings: type) -> dict[str, Any]:
    """The given values of a section."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {shown(given)}; it must be a section")
    found = fitting(given, {one.name: one for one in settings_of(settings)}, f"{name}.")
    try:
        settings(**found)
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from error
    return found


WRONG = object()


_MOST = 2**63 - 1
"""The largest integer of tensors."""


def _plain_value(value: Any, kind: Any) -> Any:
    """A single word or number as a list, for a setting of lists."""
    several = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return (value,) if several and isinstance(value, (str, int)) else value


def fitted(value: Any, kind: Any) -> Any:
    """A value of a kind, or `WRONG`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if value in inner else WRONG
    if is_union(kind):
        return next((found for one in inner if (found := fitted(value, one)) is not WRONG), WRONG)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        parts = [fitted(v, k) for v, k in zip(value, kinds, strict=False)]
        return WRONG if len(value) != len(kinds) or any(part is WRONG for part in parts) else tuple(parts)
    if origin is Mapping and isinstance(value, Mapping):
        parts = [(fitted(k, inner[0]), fitted(v, inner[1])) for k, v in value.items()]
        return WRONG if any(part is WRONG for pair in parts for part in pair) else dict(parts)
    if kind is type(None):
        return None if value is None else WRONG
    if kind in (int, float):
        number = isinstance(value, kind if kind is int else (int, float)) and not isinstance(value, bool)
        return value if number and abs(value) <= (_MOST if kind is int else sys.float_info.max) else WRONG
    return value if kind in (str, bool) and isinstance(value, kind) else WRONG


def in_words(kind: Any) -> str:
    """A kind in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if is_union(kind):
        return " or ".join(in_words(one) for one in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {in_words(inner[0])}"
    if origin is Mapping:
        return f"pairs of {in_words(inner[0])} and {in_words(inner[1])}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(kind, "empty")
