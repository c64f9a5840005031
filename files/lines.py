"""Logs with one JSON value per line, appended to during a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Append values, each on its own line, also after a line that an interruption cut short."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(value) + "\n" for value in values).encode("ascii"))
