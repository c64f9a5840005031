"""Read YAML and JSON, with errors that name the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import yaml

from ...settings import shown

_MOST = 1_000_000
"""Values in a document, its aliases followed."""


class DocumentError(ValueError):
    """A text that is not a document, or has ambiguous parts."""


def read_yaml(text: str) -> Any:
    """The content of a YAML document, with the numbers of YAML 1.2: 1e-1 is a number, and 1:02 is a text."""
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"is not YAML: {_where(error)}") from error
    _check_size(data)
    return data


def _where(error: Exception) -> str:
    """The line and reason of an error."""
    mark = getattr(error, "problem_mark", None)
    return str(error) if mark is None else f"line {mark.line + 1}: {getattr(error, 'problem', error)}"


def read_json(text: str) -> Any:
    """The content of a JSON document."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"is not JSON: {error}") from error


class _Loader(yaml.SafeLoader):
    """A loader without base 60, with exponents without point and sign, and with unique keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found = set[tuple[str, Any]]()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in found and key.value != "<<":
                raise DocumentError(f"line {key.start_mark.line + 1}: {shown(key.value)} is given twice")
            if name:
                found.add(name)
        return node


_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+|[-+]?0[0-7_]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in zip(_NUMBERS, (_INT, _FLOAT), strict=True):
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise DocumentError(f"{shown(key)} is given twice")
        found[key] = value
    return found


def _check_size(data: Any) -> None:
    """Raise DocumentError for a document that contains itself by an alias, or expands to too many values."""
    sizes, inside = dict[int, int](), set[int]()

    def size(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) in inside:
            raise DocumentError("a part of it contains itself, by an alias (*)")
        if id(value) not in sizes:
            inside.add(id(value))
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, parts))
            inside.remove(id(value))
        return sizes[id(value)]

    if size(data) > _MOST:
        raise DocumentError(f"it contains more than {_MOST} values, by its aliases (*)")
