"""How much memory is free, and refusals of what would not fit."""

from __future__ import annotations

from pathlib import Path

from .safetensors import format_bytes


def free_bytes() -> int | None:
    """Free bytes of RAM; None where nothing tells."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_room(what: str, needed: int, free: int | None, advice: str) -> None:
    """Raise ValueError where something needs more bytes than are free, as far as that is known."""
    if free is not None and needed > free:
        raise ValueError(f"{what} takes {format_bytes(needed)} of memory, and {format_bytes(free)} are free: {advice}")
