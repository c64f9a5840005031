"""Measurement of peak memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measures memory inside a `with` block; `bytes` is the peak.

    On CUDA it is the allocator's exact peak; on a CPU the process's resident memory, sampled 50 times per second, or 0
    if the system does not report it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._watcher.join()
            self._measure()  # work that ended before the first sample

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._measure()

    def _measure(self) -> None:
        self.bytes = max(self.bytes, _resident_bytes())


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
