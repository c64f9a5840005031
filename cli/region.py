"""Edits of a window around what changes (`--region auto`), laid back over the whole frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from ..imports import F, torch
from ..methods.flow_mask import area_of_prompts
from ..models.family import frames_of_latents
from ..video.fitted import FittedVideo
from ..video.read import VideoSource
from ..video.region import Region, region_of, searched_region
from ..video.restore import placed
from ..video.size import resize_to_fill, to_unit
from .config.settings import OBJECTS, ConfigError, EditConfig, of_setting
from .frames import encode, fit_frames, for_clip, shape_of
from .masks import check_masks, found_mask

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model
    from .session import Session

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
    """Raise ConfigError for a region with settings that refer to whole frames."""
    if config.region == "none":
        return
    if config.keep == "latents":
        raise ConfigError("region is auto, so the edit is laid over whole frames: leave out --keep latents")
    given = {
        name: getattr(config, name, ()) for name in ("controlnet", "control", "first_frame", "guide_frame", *OBJECTS)
    }
    others = [name for name, one in {"store": stored, "crop": any(config.crop), **given}.items() if one]
    if others:
        raise ConfigError(f"region auto cannot be used with {others[0]}, which refers to whole frames")


def in_region(config: EditConfig, video: VideoSource) -> VideoSource:
    """The frames to edit: with region auto, a window around the edit mask, if one is given."""
    if config.region == "none" or not config.edit_mask:
        return video
    check_masks(config, len(video))
    with of_setting("edit_mask"):
        masks = (frame[..., 0] / 255 for frame in _masks(config, video))
        return _windowed(video, region_of(masks, _aspect(config)))


def in_region_of_prompts(
    session: Session, model: Model, configs: Sequence[EditConfig], video: VideoSource
) -> VideoSource:
    """The frames to edit: with region auto and no edit mask, a window around where the edits will change the clip.

    See `area_of_prompts`; the model must fit the whole frames, scaled to its size.
    """
    config = configs[0]
    if config.region == "none" or config.edit_mask:
        return video
    aspect, whole = _aspect(config), video.size

    def area(region: Region) -> Iterator[Tensor]:
        window = _windowed(video, region)
        clip = fit_frames(replace(config, size=None), window, model.multiple, model.native_size)
        own = for_clip(model, shape_of(clip, model), clip.fps, clip.frames)
        texts = (config.source, *(one.target for one in configs))
        source, *targets = (own.encode_prompt(text, *clip.size, own.blocks(text)) for text in texts)
        latents = encode(own, clip, lambda done, total: None).to(own.device)
        found = area_of_prompts(own.denoiser, latents, source, targets, config.steps, config.keys).cpu()
        for i in frames_of_latents(len(clip), own.frames_per_latent):
            yield _on_source(found[i], clip.size, window.size)

    region = searched_region(area, whole, len(video), aspect)
    width, height = region.size
    session.say(f"region: {width}x{height} pixels of {whole[0]}x{whole[1]}, where the prompts disagree")
    return _windowed(video, region)


def _on_source(mask: Tensor, fitted: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A mask of latents (h, w) on the source's frame, of which the clip shows a fitted part: (height, width)."""
    shown = F.interpolate(mask[None, None], size=fitted[::-1], mode="nearest-exact")[0]
    return placed(shown, size)[0]


def _aspect(config: EditConfig) -> float:
    return config.size[0] / config.size[1] if config.size else 1.0


def _windowed(video: VideoSource, region: Region) -> Windowed:
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
