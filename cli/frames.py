"""Find, fit, encode and decode the frames of a clip."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..imports import torch
from ..video.fitted import FittedVideo
from ..video.pictures import picture_files
from ..video.read import VideoSource, open_video
from ..video.size import check_size, fit_size, to_bytes, to_unit
from ..video.which import colour_of
from .config.settings import ConfigError, of_setting

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.checkpoint import Checkpoint
    from ..hosts.diffusers.model import Model
    from .config.settings import EditConfig, TuneConfig
    from .session import Session


def find_frames(config: EditConfig | TuneConfig, default: int | None = None) -> VideoSource:
    """The frames of a run, not decoded yet. default: the maximal number if the configuration has none; None for
    all."""
    at_most = default if config.count is None and config.end is None else None
    return open_video(
        config.video, config.start, config.stride, config.count or None, at_most, end=config.end, fps=config.frame_rate,
        background=colour_of(config.background),
    )  # fmt: skip


def fit_frames(config: EditConfig | TuneConfig, source: VideoSource, multiple: int, native: int) -> FittedVideo:
    """The frames to edit, fitted to a model. Raises ValueError for an unsuitable crop or size."""
    left, top, right, bottom = config.crop
    width, height = source.size[0] - left - right, source.size[1] - top - bottom
    size = config.size or fit_size(max(1, width), max(1, height), native, multiple)
    check_size(*size, multiple)
    return FittedVideo.of(source, config.crop, size)


def class_sources(config: TuneConfig) -> list[VideoSource]:
    """The class pictures of a tuning, each its own source, since they may differ in size."""
    path = Path(config.class_pictures)
    with of_setting("class_pictures"):
        files = (picture_files(path) or (path,)) if config.class_pictures else ()
        return [open_video(file, background=colour_of(config.background)) for file in files]


def found_frames(session: Session, config: EditConfig) -> VideoSource:
    """The frames to edit, with notes on their file."""
    source = find_frames(config)
    for note in source.notes:
        session.note(note)
    if not source.even:
        session.note(f"frames have varying times, {float(source.fps):.3g} a second on average; each keeps its time")
    return source


def encode(model: Model, video: FittedVideo, progress: Callable[[int, int], None]) -> Tensor:
    """Latents of a clip, encoded while its frames are decoded."""
    return model.encode_parts(_batches(model, video, progress))


def posterior(model: Checkpoint, video: FittedVideo, progress: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a clip's latents."""
    parts = [model.encode_posterior(frames) for frames in _batches(model, video, progress)]
    mean, deviation = (torch.cat(list(some)).float() for some in zip(*parts, strict=True))
    return mean, deviation


def _batches(model: Model, video: FittedVideo, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """A clip's frames in 0..1, (f, 3, h, w), in batches for the autoencoder."""
    coming, done = video.frames(), 0
    while frames := list(islice(coming, model.frames_at_once(*video.size) or len(video))):
        yield to_unit(torch.stack(frames))
        done += len(frames)
        progress(done, len(video))


def decode(model: Model, latents: Tensor, frames: int, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """The decoded frames of latents, uint8 (height, width, 3)."""
    done = 0
    for pictures in model.decode_parts(latents, frames):
        yield from to_bytes(pictures)
        done += len(pictures)
        progress(done, frames)


def for_clip(
    model: Model, shape: tuple[int, ...], fps: Fraction | float, frames: Callable[[], Iterator[Tensor]] | None = None,
    guide_frames: Iterable[int] = (),
) -> Model:  # fmt: skip
    """The model for a clip, see `ClipFacts`."""
    from ..hosts.diffusers.model import ClipFacts

    return model.for_clip(ClipFacts(shape, float(fps), frames, tuple(guide_frames)))


def pictures_of(config: EditConfig, frames: int) -> dict[int, str]:
    """The files of an edit's own frames, by their numbers, in a clip of so many frames. Raises ConfigError."""
    found = {0: config.first_frame} if config.first_frame else {}
    for text in config.guide_frame:
        number, _, file = (part.strip() for part in text.partition(":"))
        if not re.fullmatch(r"\d+|last", number) or not file:
            raise ConfigError(f"guide_frame: invalid {text!r}: give a frame and a picture, such as '24: edited.png'")
        at = frames - 1 if number == "last" else int(number)
        if at >= frames:
            raise ConfigError(f"guide_frame: frame {at} is outside the clip, which has {frames} frames")
        if at in found:
            raise ConfigError(f"guide_frame: frame {at} has two pictures: {found[at]} and {file}")
        found[at] = file
    return found


def with_pictures(model: Model, config: EditConfig, video: FittedVideo | None) -> Model:
    """The model for an edit's own prompts: with its own first frame and guide frames, if some are given."""
    pictures = {} if video is None else pictures_of(config, len(video))
    if not pictures or video is None:
        return model
    given = {}
    for at, file in pictures.items():
        with of_setting("guide_frame" if at else "first_frame"):
            source = open_video(file, at_most=1, background=colour_of(config.background))
            given[at] = next(FittedVideo.of(source, video.cut, video.size).frames())

    def frames() -> Iterator[Tensor]:
        return (given.get(at, frame) for at, frame in enumerate(video.frames()))

    return for_clip(model, shape_of(video, model), video.fps, frames, given)


def shape_of(video: FittedVideo, checkpoint: Model) -> tuple[int, int, int, int]:
    width, height = video.size
    frames = checkpoint.latent_frames(len(video))
    return frames, checkpoint.channels, height // checkpoint.factor, width // checkpoint.factor
