"""Objects of a command, and their target positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ..attention.prompt import places_of
from ..methods.layout import Form, Layout, LayoutObject, Swap, named_path
from ..settings import shown
from ..video.fitted import FittedVideo
from ..video.read import VideoSource
from .config.settings import ConfigError, EditConfig, GenerateConfig
from .masks import found_mask, grey

if TYPE_CHECKING:
    from torch import Tensor


_FORMS: tuple[Form | Literal["shift", "swap"], ...] = ("box", "ellipse", "shift", "swap")
"""The settings of objects on paths, or relative to their place."""


def layout_of(
    config: EditConfig | GenerateConfig,
    tokenizer: Any,
    prompt: str,
    frames: int,
    fit: Callable[[VideoSource], VideoSource | FittedVideo] = lambda found: found,
) -> Layout | None:
    """The layout of a configuration, if any. fit: crops and scales masks like the clip.

    Raises ValueError for words that are not in the prompt, or that no place is named for.
    """
    known = _by_words("object_mask", getattr(config, "object_mask", ()), frames, fit)
    found = []
    for form in _FORMS:
        for text in getattr(config, form, ()):
            words, way = named_path(text, form)
            found.append(LayoutObject(words, way, known.pop(words, None)))
    for words, mask in _by_words("mask", config.mask, frames, fit).items():
        found.append(LayoutObject(words, mask, known.pop(words, None)))
    if known:
        raise ValueError(
            f"object_mask: {next(iter(known))!r} has no position: give --shift, --box, --ellipse or --mask"
        )
    return Layout(prompt, tokenizer, tuple(found), config.layout) if found else None


def check_objects(config: EditConfig | GenerateConfig, prompt: str) -> None:
    """Raise ValueError or FileNotFoundError for texts that `layout_of` could not read; needs no model."""
    relative = [form for form in ("shift", "swap") if isinstance(config, GenerateConfig) and getattr(config, form)]
    if relative and config.layout.mode == "forward":
        raise ConfigError(f"{relative[0]} needs backward guidance: set layout.mode to backward")
    if config.layout.appearance and not relative:
        raise ConfigError("layout.appearance has no effect without --shift or --swap of `fatezero generate`")
    for form in _FORMS:
        for text in getattr(config, form, ()):
            try:
                words, where = named_path(text, form)
                places_of(prompt, words, form)
                if isinstance(where, Swap):
                    places_of(prompt, where.words, form)
            except ValueError as error:
                raise ConfigError(f"{form} {shown(text)}: {str(error).removeprefix(f'{form}: ')}") from error
    for name in ("mask", "object_mask"):
        for text in getattr(config, name, ()):
            words, file = _words_and_file(name, text)
            found_mask(name, file, 1)
            if name == "mask":
                places_of(prompt, words, name)


def _words_and_file(name: str, text: str) -> tuple[str, str]:
    words, _, file = text.partition(":")
    if not words.strip() or not file.strip():
        raise ConfigError(f'{name} {shown(text)} must be words and a file: "burger: mask.mp4"')
    return words.strip(), file.strip()


def _by_words(
    name: str, texts: tuple[str, ...], frames: int, fit: Callable[[VideoSource], VideoSource | FittedVideo]
) -> dict[str, Tensor]:
    """Masks (frames or 1, height, width) by words, from texts "words: file"."""
    files = (_words_and_file(name, text) for text in texts)
    return {words: grey(fit(found_mask(name, file, frames))) for words, file in files}
