"""safetensors files written tensor by tensor, read by offset, with a checksum for each row.

The safetensors library maps a file privately and writable, which counts against memory: it cannot open a file larger
than memory. This reader reads tensors on demand.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, TypeAlias
from zlib import crc32

from typing_extensions import Self

from ..imports import torch
from .whole import remove_folder, whole_file

if TYPE_CHECKING:
    from torch import Tensor

Layout: TypeAlias = "dict[str, tuple[torch.dtype, tuple[int, ...]]]"
"""The dtype and shape of every tensor, by name."""

_CODES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
}
"""safetensors' codes of the dtypes a store may have, with torch's names."""
CHECKSUMS = "checksums"
"""Name of the tensor with every row's CRC-32, in the order of the file's tensors."""
_LONGEST_HEADER = 2**30


class DamagedFileError(ValueError):
    """A truncated or altered file."""


def code_of(dtype: torch.dtype) -> str:
    """safetensors' code of a dtype; KeyError for a dtype that no store has."""
    return {name: code for code, name in _CODES.items()}[str(dtype).removeprefix("torch.")]


def dtype_of(code: str) -> torch.dtype | None:
    """The dtype of a safetensors code; None for a dtype that no store has."""
    return getattr(torch, _CODES[code]) if code in _CODES else None


def layout_bytes(layout: Layout) -> int:
    """Bytes of all the tensors of a layout."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def format_bytes(count: int) -> str:
    """A number of bytes in a readable unit: 12.10 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, left in place of a file that was not fetched."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def rows_of(shape: Sequence[int]) -> int:
    """Number of checksummed rows of a tensor: its first dimension."""
    return shape[0] if shape else 1


# --- writing --------------------------------------------------------------------------


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time.

    layout: every tensor's dtype and shape, in advance. The file has a temporary name until the `with` block succeeds,
    and is removed if it fails.

    Raises OSError, with the bytes needed and free, if the disk is too small.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str]) -> None:
        self.path = path
        rows = sum(rows_of(shape) for _, shape in layout.values())
        layout = layout | {CHECKSUMS: (torch.int64, (rows,))}
        # Wide numbers first, so that every tensor is aligned in the file.
        order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
        self._left = {name: layout[name] for name in order}
        self._starts: dict[str, int] = {}
        self._header: dict[str, object] = {"__metadata__": {"checksum": _NONE} | metadata}
        self._checksums: dict[str, list[int]] = {name: [] for name in order if name != CHECKSUMS}
        end = 0
        for name in order:
            start, end = end, end + layout_bytes({name: layout[name]})
            self._starts[name] = start
            dtype, shape = layout[name]
            self._header[name] = {"dtype": code_of(dtype), "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(self._header).encode()
        self._head = text + b" " * (-len(text) % 8)
        self.nbytes = 8 + len(self._head) + end
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if self.nbytes > free:
            raise OSError(f"the store takes {self.nbytes} bytes but {path.parent} has {free} free")
        self._whole = whole_file(path, keep_suffix=False)  # a partial file must not be listed as a store

    def __enter__(self) -> Self:
        self._file: IO[bytes] = self._whole.__enter__().open("wb")
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError if its dtype or shape differs from the layout."""
        dtype, shape = self._left.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}")
        data = tensor.detach().cpu()
        data = data if data.is_contiguous() else copied(data)
        numbers = _bytes_of(data)
        size = len(numbers) // max(1, rows_of(shape))
        if name != CHECKSUMS:
            self._checksums[name] = [crc32(numbers[i * size : (i + 1) * size]) for i in range(rows_of(shape))]
        self._write(8 + len(self._head) + self._starts[name], numbers)

    def _write(self, at: int, data: bytes | memoryview) -> None:
        try:
            self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            needed = format_bytes(self.nbytes)
            raise OSError(f"the store of {needed} could not be written to {self.path}: {error}") from error

    def _finish(self) -> None:
        if len(self._left) > 1:
            left = [name for name in self._left if name != CHECKSUMS]
            raise ValueError(f"{left[0]} and {len(left) - 1} more were never written")
        checksums = torch.tensor([crc for rows in self._checksums.values() for crc in rows], dtype=torch.int64)
        self.put(CHECKSUMS, checksums)
        head = _with_checksum(self._head, _NONE, _header_checksum(self._head, checksums))
        self._write(0, len(head).to_bytes(8, "little") + head)  # last, so that an unfinished file is unreadable
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            try:
                if kind is None:
                    self._finish()
            finally:
                self._file.close()
        except BaseException as failure:
            self._whole.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._whole.__exit__(kind, error, at)


_NONE = "0" * 8
"""Placeholder for the header's own checksum."""


def _header_checksum(head: bytes, checksums: Tensor) -> str:
    """CRC-32 of a header, with the placeholder in it, and of the tensors' checksums."""
    return f"{crc32(_bytes_of(checksums), crc32(head)):08x}"


def _with_checksum(head: bytes, before: str, after: str) -> bytes:
    """The header with its checksum replaced; the checksum comes first in the metadata."""
    return head.replace(f'"checksum": "{before}"'.encode(), f'"checksum": "{after}"'.encode(), 1)


# --- reading --------------------------------------------------------------------------


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, read on demand."""

    file: SafetensorsReader
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """The tensor, or some of its rows, in RAM; DamagedFileError for a wrong checksum."""
        return self.file.read(self.name, rows)


class SafetensorsReader:
    """Reads a file of `SafetensorsWriter`, checking each tensor as it is read.

    temporary: remove the file's folder with this object, or when the process ends.

    Raises DamagedFileError for another kind of file, or a damaged header.
    """

    def __init__(self, path: Path, temporary: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, _close, self._file, path.parent if temporary else None)
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise DamagedFileError(str(error)) from error

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError("no header")
        head = self._file.read(length)
        header = json.loads(head)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._begin = 8 + length
        self._starts: dict[str, int] = {}
        self.tensors: dict[str, FileTensor] = {}
        end = 0
        for name, about in header.items():
            dtype, shape = dtype_of(about["dtype"]), tuple(about["shape"])
            if dtype is None or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"{name} has an unknown dtype or shape")
            start, end = end, end + layout_bytes({name: (dtype, shape)})
            if about["data_offsets"] != [start, end]:
                raise ValueError(f"{name} has wrong offsets")
            self._starts[name] = start
            self.tensors[name] = FileTensor(self, name, dtype, shape)
        if self._begin + end != size:
            raise ValueError(f"truncated, {size - self._begin} of {end} bytes")
        self._read_checksums(head)

    def _read_checksums(self, head: bytes) -> None:
        if CHECKSUMS not in self.tensors or "checksum" not in self.metadata:
            self._checksums: dict[str, Tensor] = {}
            return
        tensor = self.read(CHECKSUMS, check=False)
        written = self.metadata["checksum"]
        if _header_checksum(_with_checksum(head, written, _NONE), tensor) != written:
            raise ValueError("wrong checksum of the header")
        names = [name for name in self.tensors if name != CHECKSUMS]
        counts = [rows_of(self.tensors[name].shape) for name in names]
        if sum(counts) != len(tensor):
            raise ValueError("wrong number of checksums")
        self._checksums = dict(zip(names, tensor.split(counts), strict=True))

    @property
    def checked(self) -> bool:
        """Whether the file has checksums; other programs write none."""
        return bool(self._checksums)

    def read(self, name: str, rows: Sequence[int] | None = None, check: bool = True) -> Tensor:
        """A tensor, or some of its rows; DamagedFileError for a wrong checksum."""
        about = self.tensors[name]
        whole = range(rows_of(about.shape))
        rows_read = whole if rows is None else rows
        shape = about.shape if rows is None else (len(rows), *about.shape[1:])
        result = torch.empty(shape, dtype=about.dtype)
        size = about.nbytes // max(1, len(whole))
        numbers = _bytes_of(result)
        done = 0
        for first, count in _runs(rows_read):
            part = numbers[done * size : (done + count) * size]
            self._fill(part, self._begin + self._starts[name] + first * size)
            if check:
                self._check(name, part, first, count, size)
            done += count
        return result

    def _fill(self, part: memoryview, at: int) -> None:
        with self._lock:
            self._file.seek(at)
            done = 0
            while done < len(part):
                got = self._file.readinto(part[done:])
                if not got:
                    raise DamagedFileError(f"{self.path} is truncated")
                done += got

    def _check(self, name: str, part: memoryview, first: int, count: int, size: int) -> None:
        expected = self._checksums[name][first : first + count].tolist()
        for i, checksum in enumerate(expected):
            if crc32(part[i * size : (i + 1) * size]) != checksum:
                raise DamagedFileError(f"{self.path} is damaged: wrong checksum of {name}")


def _close(file: IO[bytes], folder: Path | None) -> None:
    file.close()
    if folder is not None:
        remove_folder(folder)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive rows, as (first, length)."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((row, 1))
    return found


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return x.reshape(-1).view(torch.uint8).numpy().data


def copied(x: Tensor) -> Tensor:
    """A contiguous copy of a CPU tensor, made in one thread.

    torch would copy with OpenMP, whose second thread team takes cores from the one that runs the UNet.
    """
    whole_number = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.from_numpy(x.detach().view(whole_number).numpy().copy(order="C")).view(x.dtype)
