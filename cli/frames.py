"""A clip on its way into a model and out of it: frames found, fitted, encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ..imports import torch
from ..video.fitted import FittedVideo
from ..video.read import VideoSource, open_video
from ..video.size import check_size, fit_size, to_bytes, to_unit
from ..video.which import colour_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.checkpoint import Checkpoint
    from .config.settings import EditConfig, TuneConfig
    from .session import AnyCheckpoint, Session


def find_frames(config: EditConfig | TuneConfig, default: int | None = None) -> VideoSource:
    """The frames of a run, found in their file and not decoded. default: how many at most, where nothing says; None
    for all."""
    at_most = default if config.count is None and config.end is None else None
    return open_video(
        config.video, config.start, config.stride, config.count or None, at_most, end=config.end, fps=config.frame_rate,
        background=colour_of(config.background),
    )  # fmt: skip


def fit_frames(config: EditConfig | TuneConfig, source: VideoSource, multiple: int, native: int) -> FittedVideo:
    """The frames to edit as a model takes them; ValueError for a cut or a size it cannot take."""
    left, top, right, bottom = config.crop
    width, height = source.size[0] - left - right, source.size[1] - top - bottom
    size = config.size or fit_size(max(1, width), max(1, height), native, multiple)
    check_size(*size, multiple)
    return FittedVideo.of(source, config.crop, size)


def found_frames(session: Session, config: EditConfig) -> VideoSource:
    """The frames to edit, with what should be known of their file said."""
    source = find_frames(config)
    for note in source.notes:
        session.note(note)
    if not source.even:
        session.note(f"frames come at varying times, {float(source.fps):.3g} a second on average; each keeps its own")
    return source


def encode(checkpoint: AnyCheckpoint, video: FittedVideo, progress: Callable[[int, int], None]) -> Tensor:
    """Latents of a clip's frames, as they are decoded."""
    from ..hosts.diffusers.checkpoint import Checkpoint

    if isinstance(checkpoint, Checkpoint):
        return posterior(checkpoint, video, progress)[0]
    latents = checkpoint.encode_clip(to_unit(torch.stack(list(video.frames()))))
    progress(len(video), len(video))
    return latents


def posterior(
    checkpoint: Checkpoint, video: FittedVideo, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a clip's latents, its frames encoded as they are decoded."""
    parts: list[tuple[Tensor, Tensor]] = []
    done = 0
    coming, at_once = video.frames(), checkpoint.frames_at_once(*video.size)
    while frames := list(islice(coming, at_once)):
        parts.append(checkpoint.encode_posterior(to_unit(torch.stack(frames))))
        done += len(frames)
        progress(done, len(video))
    mean, deviation = (torch.cat(list(some)).float() for some in zip(*parts, strict=True))
    return mean, deviation


def decode(
    checkpoint: AnyCheckpoint, latents: Tensor, frames: int, progress: Callable[[int, int], None]
) -> Iterator[Tensor]:
    """The frames of latents, uint8 (height, width, 3), one after another."""
    from ..hosts.diffusers.checkpoint import Checkpoint

    if not isinstance(checkpoint, Checkpoint):
        yield from to_bytes(checkpoint.decode_clip(latents, frames))
        progress(frames, frames)
        return
    height, width = (side * checkpoint.factor for side in latents.shape[-2:])
    done = 0
    for some in latents.split(checkpoint.frames_at_once(height, width)):
        yield from to_bytes(checkpoint.decode_latents(some))
        done += len(some)
        progress(done, len(latents))


def shape_of(video: FittedVideo, checkpoint: AnyCheckpoint) -> tuple[int, int, int, int]:
    width, height = video.size
    frames = checkpoint.latent_frames(len(video))
    return frames, checkpoint.channels, height // checkpoint.factor, width // checkpoint.factor
