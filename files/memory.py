"""Free memory, and errors for what would not fit."""

from __future__ import annotations

from pathlib import Path

from .safetensors import format_bytes


def free_bytes() -> int | None:
    """Free bytes of RAM; None if unknown."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_room(what: str, needed: int, free: int | None, advice: str) -> None:
    """Raise ValueError if `needed` bytes exceed the free ones (None: unknown)."""
    if free is not None and needed > free:
        raise ValueError(f"{what} takes {format_bytes(needed)} of memory, and {format_bytes(free)} are free: {advice}")
