"""Edits of a window around the edit mask (`--region auto`), laid back over the whole frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import cycle, islice
from typing import TYPE_CHECKING

from ..imports import torch
from ..video.fitted import FittedVideo
from ..video.read import VideoSource
from ..video.region import Region, region_of
from ..video.size import resize_to_fill, to_unit
from .config.settings import OBJECTS, ConfigError, EditConfig, of_setting
from .masks import check_edit_mask, found_mask

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = (0, 0, 0, 0)


@dataclass(frozen=True)
class Windowed(VideoSource):
    """The frames of a video in a moving window. whole: the video, whose sound, times and stored frames it has."""

    whole: VideoSource | None = None
    region: Region | None = None

    def frames(self) -> Iterator[Tensor]:
        assert self.whole is not None and self.region is not None
        yield from self.region.cut(self.whole.frames())


def check_region(config: EditConfig, stored: bool) -> None:
    """Raise ConfigError for a region without a mask to follow, or with settings that refer to whole frames."""
    if config.region == "none":
        return
    if not config.edit_mask:
        raise ConfigError("region is auto, but there is no mask to follow: give --edit-mask")
    if config.keep == "latents":
        raise ConfigError("region is auto, so the edit is laid over whole frames: leave out --keep latents")
    given = {name: getattr(config, name, ()) for name in ("controlnet", "first_frame", *OBJECTS)}
    others = [name for name, one in {"store": stored, "crop": any(config.crop), **given}.items() if one]
    if others:
        raise ConfigError(f"region auto cannot be used with {others[0]}, which refers to whole frames")


def in_region(config: EditConfig, video: VideoSource) -> VideoSource:
    """The frames to edit: with region auto, a window around the edit mask."""
    if config.region == "none":
        return video
    check_edit_mask(config, len(video))
    with of_setting("edit_mask"):
        aspect = config.size[0] / config.size[1] if config.size else 1.0
        region = region_of((frame[..., 0] / 255 for frame in _masks(config, video)), aspect)
    own = {one.name: getattr(video, one.name) for one in fields(VideoSource)}
    return Windowed(**{**own, "size": region.size}, whole=video, region=region)


def window_of_mask(config: EditConfig, video: Windowed, size: tuple[int, int]) -> Tensor:
    """The edit mask in the window of each frame, at a width and height: (frames, height, width) in 0..1."""
    assert video.whole is not None and video.region is not None
    windows = video.region.cut(_masks(config, video.whole))
    return torch.stack([to_unit(resize_to_fill(one[None], *size))[0].mean(0) for one in windows])


def _masks(config: EditConfig, video: VideoSource) -> Iterator[Tensor]:
    """The edit mask of each frame, uint8 at the video's size."""
    found = FittedVideo.of(found_mask("edit_mask", config.edit_mask), _WHOLE, video.size)
    frames = cycle(found.frames()) if len(found) == 1 else found.frames()
    return islice(frames, len(video))
