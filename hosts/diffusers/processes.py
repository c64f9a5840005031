"""Editing one clip on several processes of accelerate, each with the model on its own device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device

from ...attention.key_frames import Chunk

T = TypeVar("T")


class Processes:
    """A `Spread` over the processes of an `Accelerator`.

    Predictions are exchanged through RAM: latents of chunks, some hundred kilobytes per step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def count(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    def each(self, chunks: Sequence[Chunk], call: Callable[[Chunk], T]) -> list[T]:
        mine = range(self._accelerator.process_index, len(chunks), self.count)
        parts = [(i, send_to_device(call(chunks[i]), "cpu")) for i in mine]
        all_parts: dict[int, T] = dict(gather_object(parts))
        return [send_to_device(all_parts[i], self.device) for i in range(len(chunks))]
