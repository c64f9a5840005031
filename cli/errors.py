"""Errors of the command line, in the style of our other errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from cyclopts import App, CycloptsError

from ..settings import shown

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def parsing_error(app: App, error: CycloptsError) -> str:
    """An error of cyclopts in one line."""
    command = " ".join(["fatezero", *(error.command_chain or ())])
    describe = _ERRORS.get(type(error).__name__)
    return str(error).rstrip(".") if describe is None else describe(app, error, command)


def _unknown_option(app: App, error: Any, command: str) -> str:
    name = (error.token.keyword or error.token.value).partition("=")[0]
    known = [name for argument in error.argument_collection for name in argument.names if argument.parse]
    return f"unknown option {shown(name)[1:-1]}{_near(name, known)}; {command} --help-all lists all"


def _unknown_command(app: App, error: Any, command: str) -> str:
    known = [name for name in app if not name.startswith("-")]
    name = next(iter(error.unused_tokens or error.root_input_tokens or ["?"]))
    return f"unknown command {shown(name)}{_near(name, known)}: use one of {', '.join(known)}"


def _unused(app: App, error: Any, command: str) -> str:
    return f"unexpected argument {shown(error.unused_tokens[0])}: quote texts with spaces, and see {command} --help"


def _missing(app: App, error: Any, command: str) -> str:
    name = error.argument.name if error.argument else "an argument"
    return f"{name} needs a value" if name.startswith("-") else f"missing {name}"


def _wrong_kind(app: App, error: Any, command: str) -> str:
    name = (error.token and error.token.keyword) or (error.argument.name if error.argument else "a value")
    given = f"{name} is {shown(error.token.value)}" if error.token else f"{name} has a wrong value"
    return f"{given}; it must be {error.msg or _in_words(error.target_type)}"


def _repeated(app: App, error: Any, command: str) -> str:
    return f"{error.token.keyword or shown(error.token.value)} is given twice"


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return next((_KINDS[one] for one in (kind, *get_args(kind)) if one in _KINDS), "another kind of value")


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


_ERRORS = {
    "UnknownOptionError": _unknown_option,
    "UnknownCommandError": _unknown_command,
    "UnusedCliTokensError": _unused,
    "MissingArgumentError": _missing,
    "CoercionError": _wrong_kind,
    "RepeatArgumentError": _repeated,
}
