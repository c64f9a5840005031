"""Heat maps of words, as pictures and videos."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..imports import torch
from ..video.write import write_picture, write_video

if TYPE_CHECKING:
    from torch import Tensor

SHEET = "steps.png"
"""The file with every word's attention over the steps."""
_SHOWN = 8
"""Maximal number of steps in it."""


def map_files(folder: Path, words: Iterable[str]) -> dict[str, Path]:
    """The video of each word."""
    return {
        word: folder / f"{re.sub(r'[^0-9A-Za-z]+', '_', word) or 'word'}_{i}.mp4" for i, word in enumerate(words, 1)
    }


def write_maps(folder: Path, heats: Mapping[str, Tensor], size: tuple[int, int], rate: Fraction) -> None:
    """Write a video of each word, averaged over the steps, and a sheet of the middle frame over the steps.

    heats: (steps, frames, y, x) of each word. size: height and width of the videos.
    """
    from ..video.sheet import contact_sheet, heat_map

    for word, path in map_files(folder, heats).items():
        write_video(path, heat_map(heats[word].mean(0), size, word), rate)
    steps, frames = next(iter(heats.values())).shape[:2]
    shown = torch.linspace(0, steps - 1, min(_SHOWN, steps)).round().long()
    rows = [(word, heat_map(heat[shown, frames // 2], size, "")) for word, heat in heats.items()]
    title = f"frame {frames // 2}, steps {', '.join(str(int(step)) for step in shown)}"
    write_picture(folder / SHEET, contact_sheet(rows, title))
