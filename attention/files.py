"""safetensors files written tensor by tensor while a run goes on, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from .budget import Layout, format_bytes, layout_bytes

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""What a safetensors file calls the dtypes that a store may have."""
_STALE = 24 * 3600
"""Seconds after which a half-written file is taken for what a crash left."""


class SafetensorsWriter:
    """A safetensors file whose tensors come one after another.

    layout: every tensor's dtype and shape, known before the first. The file stands under another
    name until the `with` block ends well, and is removed where it does not; after a crash its name
    is never that of a store.

    Raises OSError, saying the bytes, where the disk has no room.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str]) -> None:
        self.path = path
        # Wide numbers first, so that every tensor is aligned in the mapped file.
        order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
        self._left = {name: layout[name] for name in order}
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name in order:
            start, end = end, end + layout_bytes({name: layout[name]})
            self._starts[name] = start
            dtype, shape = layout[name]
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self._head) + end
        path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        free = shutil.disk_usage(path.parent).free
        if self.nbytes > free:
            raise OSError(f"the store takes {self.nbytes} bytes but {path.parent} has {free} free")
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Self:
        self._file = self._partial.open("wb")
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError for one that is not as the layout says."""
        dtype, shape = self._left.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {dtype} {shape} was announced")
        data = tensor.detach().cpu()
        data = data if data.is_contiguous() else copied(data)
        self._write(len(self._head) + self._starts[name], data.view(torch.uint8).numpy().data)

    def _write(self, at: int, data: bytes | memoryview) -> None:
        try:
            self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            wanted = format_bytes(self.nbytes)
            raise OSError(f"the store of {wanted} could not be written to {self.path}: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._left:
                    raise ValueError(f"{next(iter(self._left))} and {len(self._left) - 1} more were never written")
                self._write(0, self._head)  # last: without it no reader takes the file for a whole one
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            try:
                self._file.close()
                if kind is None and not self._left:
                    self._partial.replace(self.path)
            finally:
                self._partial.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        for old in self.path.parent.glob(f".{self.path.name}.*.partial"):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink(missing_ok=True)


def copied(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """A contiguous copy of a CPU tensor, or of some of its rows, made by one thread.

    torch would copy with OpenMP, and a second team of its threads takes the cores from the one
    that runs the UNet.
    """
    whole_number = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    numbers = x.detach().view(whole_number).numpy()
    return torch.from_numpy(numbers.copy(order="C") if rows is None else numbers[list(rows)]).view(x.dtype)
