"""Logs of one JSON value a line, which are added to while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Add lines, on a line of their own even where an interruption cut the last one short."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(value) + "\n" for value in values).encode("ascii"))
