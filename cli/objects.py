"""Objects that a command names, and where they shall be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.layout import Layout, Wanted, named_path
from ..video.read import open_video
from ..video.size import to_unit
from .config import EditConfig, GenerateConfig


def layout_of(config: EditConfig | GenerateConfig, tokenizer: Any, prompt: str, frames: int) -> Layout | None:
    """The layout of a configuration, None for none.

    Raises ValueError for words that are not in the prompt, or that no place is named for.
    """
    known = _by_words("object_mask", getattr(config, "object_mask", ()), frames)
    found = []
    for form in ("box", "ellipse", "shift"):
        for text in getattr(config, form, ()):
            words, way = named_path(text, form)
            found.append(Wanted(words, way, known.pop(words, None)))
    for words, mask in _by_words("mask", config.mask, frames).items():
        found.append(Wanted(words, mask, known.pop(words, None)))
    if known:
        raise ValueError(f"object_mask: {next(iter(known))!r} is given no place (--shift, --box, --ellipse or --mask)")
    return Layout(prompt, tokenizer, tuple(found), config.layout) if found else None


def _by_words(name: str, texts: tuple[str, ...], frames: int) -> dict[str, Tensor]:
    """Masks (frames, height, width) by the words they are for, of "words: file"."""
    found = {}
    for text in texts:
        words, _, file = text.partition(":")
        if not words.strip() or not file.strip():
            raise ValueError(f'{name} {text!r} must be words and a file: "burger: mask.mp4"')
        shown = open_video(file.strip(), 0, 1, frames)
        found[words.strip()] = torch.stack([to_unit(frame[None])[0].mean(0) for frame in shown.frames()])
    return found
