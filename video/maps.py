"""Pictures and videos of attention to words, of an edit's masks, and of x-t slices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..imports import F, Image, torch
from .slice import slice_picture
from .write import write_picture, write_video

if TYPE_CHECKING:
    from torch import Tensor

SHEET = "steps.png"
"""The file with every word's attention over the steps."""
MASKS = ("attention", "latents")
"""The kinds of an edit's masks."""
SHOWN = 8
"""Frames and steps of a sheet."""
SWEPT = 96
"""Rows in the video of slices."""


class Maps(Protocol):
    """What is recorded of an edit: `EditMaps`."""

    def heats(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The attention to each word of "source" and "target": (steps, frames, y, x)."""

    def masks(self) -> Mapping[str, Tensor]:
        """Masks in 0..1 of steps: (steps, frames, y, x)."""


# --- attention to words -----------------------------------------------------------------------


def map_files(folder: Path, words: Iterable[str], prefix: str = "") -> dict[str, Path]:
    """The video of each word."""
    plain = {word: re.sub(r"[^0-9A-Za-z]+", "_", word) for word in words}
    return {word: folder / f"{prefix}{name}_{number}.mp4" for number, (word, name) in enumerate(plain.items(), 1)}


def write_heats(
    folder: Path, heats: Mapping[str, Tensor], size: tuple[int, int], rate: Fraction, prefix: str = ""
) -> None:
    """Write a video of each word, averaged over the steps, and a sheet of the middle frame over the steps.

    heats: (steps, frames, y, x) of each word. size: height and width of the videos.
    """
    from .sheet import heat_map, heat_steps

    for word, path in map_files(folder, heats, prefix).items():
        write_video(path, heat_map(heats[word].mean(0), size, word), rate)
    write_picture(folder / f"{prefix}{SHEET}", heat_steps(heats, size))


# --- an edit ----------------------------------------------------------------------------------


def edit_map_files(folder: Path, words: Mapping[str, Iterable[str]]) -> list[Path]:
    """The files of `write_maps`. words: of the prompts "source" and "target"."""
    heats = [path for name, own in words.items() for path in map_files(folder, own, f"{name}_").values()]
    sheets = [folder / f"{name}_{kind}" for name in words for kind in ("frames.png", SHEET)]
    masks = [folder / f"mask_{name}{suffix}" for name in MASKS for suffix in (".png", ".mp4")]
    return [*heats, *sheets, *masks, folder / "slice.png", folder / "slice.mp4"]


def write_maps(
    folder: str | Path, maps: Maps, source: Tensor, edited: Tensor, fps: Fraction | float, row: int | None = None
) -> None:
    """Write an edit's heat maps, masks and x-t slices as pictures and videos.

    source, edited: the clips, uint8 (frames, height, width, 3). row: of the slice; None for the one that changes most
    over time; the video of slices goes from top to bottom. Of each word there is a video, averaged over the steps, and
    of each prompt a sheet of frames and one of steps. Masks are shown step by step, and averaged in their video.

    Raises OSError if the disk fails, ValueError for a row that a frame does not have.
    """
    from .sheet import contact_sheet, heat_map

    folder, size = Path(folder), (source.shape[1], source.shape[2])
    folder.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    for name, heats in maps.heats().items():
        if heats:
            frames = len(next(iter(heats.values()))[0])
            write_heats(folder, heats, size, rate * frames / len(source), f"{name}_")
            rows = [(word, heat_map(heat.mean(0)[_some(frames)], size, "")) for word, heat in heats.items()]
            write_picture(folder / f"{name}_frames.png", contact_sheet(rows, f"{name}: mean over the steps"))
    for name, masks in maps.masks().items():
        _write_masks(folder, name, masks, size, rate * masks.shape[1] / len(source))
    write_slice(folder / "slice.png", source, edited, row)
    sweep = (slice_picture(source, edited, y) for y in _some(size[0], SWEPT))
    write_video(folder / "slice.mp4", sweep, Fraction(12))


def write_slice(path: Path, source: Tensor, edited: Tensor, row: int | None = None) -> None:
    """Write the x-t slices of both clips as a picture; see `write_maps`."""
    write_picture(path, Image.fromarray(slice_picture(source, edited, row).cpu().numpy()))


def _write_masks(folder: Path, name: str, masks: Tensor, size: tuple[int, int], rate: Fraction) -> None:
    """A sheet of some steps and frames of a mask, and a video of its mean over the steps."""
    from .sheet import contact_sheet, mask_frames

    def shown(mask: Tensor) -> Tensor:
        return mask_frames(F.interpolate(mask[:, None], size=size, mode="nearest")[:, 0])

    rows = [(f"step {i + 1} of {len(masks)}", shown(masks[i, _some(masks.shape[1])])) for i in _some(len(masks))]
    write_picture(folder / f"mask_{name}.png", contact_sheet(rows, f"mask of {name}"))
    write_video(folder / f"mask_{name}.mp4", shown(masks.mean(0)), rate)


def _some(count: int, most: int = SHOWN) -> list[int]:
    """At most `most` of a number of frames, steps or rows, evenly spaced."""
    return [round(float(i)) for i in torch.linspace(0, count - 1, min(most, count))]
