"""The heat maps, masks and slices of an edit: where they are written, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.prompt import PromptEdit, bare, words_of
from ..diffusion.edit_maps import EditMaps
from ..diffusion.parts import Edit
from ..imports import torch
from ..video.maps import edit_map_files, write_maps
from .config.settings import EditConfig
from .outputs import Outputs, check_folder
from .session import Session

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model

HELP = (
    "Folder for what the edit does, as videos and pictures: the attention of both prompts' words, the blend masks, and "
    "x-t slices of source and edit. Takes eight more model calls; the result is the same."
)
"""The help of `fatezero edit --maps`."""


def words_in(prompt: str) -> list[str]:
    """The words of a prompt that have heat maps."""
    return list(dict.fromkeys(map(bare, words_of(prompt))))


def map_folders(folder: Path | None, outputs: Sequence[str]) -> list[Path | None]:
    """The folder of each edit's maps: the given one, or for several edits one in it, named like the output."""
    if folder is None or len(outputs) == 1:
        return [folder] * len(outputs)
    return [folder / Path(output).stem for output in outputs]


def check_maps(folder: Path | None) -> None:
    """Raise ValueError or OSError for a path that cannot be the folder of maps."""
    if folder is not None:
        check_folder(folder, "maps", "--maps")


def reserve_maps(writes: Outputs, folders: Iterable[Path | None], configs: Iterable[EditConfig]) -> None:
    """Raise OSError if a file of maps exists or cannot be written."""
    for folder, config in zip(folders, configs, strict=True):
        if folder is not None:
            words = {"source": words_in(config.source), "target": words_in(config.target)}
            for path in edit_map_files(folder, words):
                writes.file(path)


def recording(edit: Edit, config: EditConfig, model: Model, source_tokens: int) -> Edit:
    """The edit, with a record of its maps. source_tokens: of the source's text."""
    target = Condition.of(edit.target_embeddings, "target")
    pair = PromptEdit(config.source, config.target, model.tokenizer)
    return replace(edit, maps=EditMaps.of(pair, source_tokens, target.text_tokens))


@dataclass(frozen=True)
class Kept:
    """Frames that pass once, and are kept for slices if `keep`."""

    passing: Iterable[Tensor]
    keep: bool
    frames: list[Tensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.passing:
            if self.keep:
                self.frames.append(frame.cpu())
            yield frame


def write_recorded(
    folder: Path, maps: EditMaps, source: Iterable[Tensor], edited: Kept, fps: Fraction, session: Session
) -> None:
    """Write an edit's maps, and note what is left out. source: the clip's frames, uint8 (height, width, 3)."""
    write_maps(folder, maps, torch.stack([frame.cpu() for frame in source]), torch.stack(edited.frames), fps)
    if not maps.heats()["target"]:
        session.note("maps: no heat maps, because attention to words is not available on this model")
    if not maps.masks():
        session.note("maps: no masks, because this edit uses none (preset shape does)")
    session.say(f"heat maps and slices written to {folder}")
