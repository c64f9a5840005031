"""Heat maps of words, as pictures and videos."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..video.write import write_picture, write_video

if TYPE_CHECKING:
    from torch import Tensor

SHEET = "steps.png"
"""The file with every word's attention over the steps."""


def map_files(folder: Path, words: Iterable[str]) -> dict[str, Path]:
    """The video of each word."""
    plain = {word: re.sub(r"[^0-9A-Za-z]+", "_", word) for word in words}
    return {word: folder / f"{name}_{number}.mp4" for number, (word, name) in enumerate(plain.items(), 1)}


def write_maps(folder: Path, heats: Mapping[str, Tensor], size: tuple[int, int], rate: Fraction) -> None:
    """Write a video of each word, averaged over the steps, and a sheet of the middle frame over the steps.

    heats: (steps, frames, y, x) of each word. size: height and width of the videos.
    """
    from ..video.sheet import heat_map, heat_steps

    for word, path in map_files(folder, heats).items():
        write_video(path, heat_map(heats[word].mean(0), size, word), rate)
    write_picture(folder / SHEET, heat_steps(heats, size))
