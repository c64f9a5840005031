"""Results with the source's own pixels where an edit changed nothing (`--keep pixels`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..attention.masks import GivenMask, changed_latents
from ..models.family import frames_of_latents
from ..video.fitted import FittedVideo
from ..video.orientation import SQUARE, Display, display_matrix
from ..video.read import VideoSource
from ..video.region import Region
from ..video.restore import Feather, feather, placed, reach_of, restored_frames
from ..video.size import crop
from ..video.write import METADATA_SUFFIXES, Frame, is_sequence
from .config.settings import ConfigError, EditConfig
from .region import Windowed, check_region

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model


def keeps_pixels(config: EditConfig, has_video: bool) -> bool:
    """Whether a result has the source's pixels. has_video: they are there, also with a store.

    Raises ConfigError where that was chosen and is not possible.
    """
    limited = config.planned_recipe().limited or config.places_objects or config.region == "auto"
    if config.keep == "pixels" and not limited:
        raise ConfigError(
            "keep is pixels, but no mask limits this edit: give --edit-mask, or a preset that keeps latents "
            "outside its mask, such as attribute+, shape+ or flow_mask"
        )
    if config.keep == "pixels" and not has_video:
        raise ConfigError("keep is pixels, but a store has no frames: give the video too")
    return config.keep != "latents" and limited and has_video


def refuse_kept(configs: Sequence[EditConfig], stored: bool) -> None:
    """Raise ConfigError for a choice of `keep` or `region` that is not possible. stored: with a store."""
    for config in configs:
        check_region(config, stored)
        keeps_pixels(config, bool(config.video))


@dataclass(frozen=True)
class Restored:
    """Frames to write, and how they are shown."""

    frames: Iterable[Any]
    display: Display = SQUARE


@dataclass(frozen=True)
class Original:
    """The frames that an edit is laid over. mask: the edit mask, if any."""

    clip: FittedVideo
    mask: GivenMask | None


def original_of(config: EditConfig, mask: GivenMask | None, clip: FittedVideo | None) -> Original | None:
    """The frames on which an edit is laid; None where its result is the decoded frames."""
    return Original(clip, mask) if clip is not None and keeps_pixels(config, True) else None


def recorded_with(config: EditConfig, original: Original | None) -> EditConfig:
    """The settings of a record, which has `keep` if the video's pixels stay."""
    return replace(config, keep="auto" if original is None else "pixels")


def laid(
    original: Original | None, model: Model, latents: tuple[Tensor, Tensor], edited: Iterable[Tensor], path: str
) -> Restored:
    """The frames to write to a path. latents: of edit and clip, (f, c, h, w). edited: decoded, uint8 (h, w, 3)."""
    if original is None:
        return Restored(edited)
    clip, mask = original.clip, original.mask
    changed = changed_latents(*latents).cpu()
    if mask is not None and mask.how != "union":
        changed &= mask.at((changed.shape[1], changed.shape[2]), len(changed)).cpu() > 0
    reach = reach_of(lambda z: model.decode_clip(z, 1), latents[1][:1].to(model.device))
    masks = [changed[i] for i in frames_of_latents(len(clip), model.frames_per_latent)]
    display = None if is_sequence(path) or not path.lower().endswith(METADATA_SUFFIXES) else _display(clip)
    source = clip.source
    whole, region = (source.whole, source.region) if isinstance(source, Windowed) else (source, None)
    if display is not None and whole is not None:
        return Restored(_stored_frames(whole, edited, masks, reach, region), display)
    if region is not None and whole is not None:
        return Restored(region.stitched(whole.frames(), edited, masks, reach))
    return Restored(restored_frames(_cropped(clip), edited, masks, reach))


def _cropped(clip: FittedVideo) -> Iterator[Tensor]:
    for frame in clip.source.frames():
        yield crop(frame[None], *clip.cut)[0]


def _display(clip: FittedVideo) -> Display | None:
    """How a clip's stored frames are shown; None where an edit is laid over their RGB: pictures, HDR, transparent and
    cropped clips.
    """
    from ..video.planes import is_kept

    if clip.source.index is None or any(clip.cut):
        return None
    first = next(clip.source.stored())
    return Display(clip.source.index.aspect, display_matrix(first)) if is_kept(first) else None


def _stored_frames(
    source: VideoSource, edited: Iterable[Tensor], masks: Iterable[Tensor], reach: int, region: Region | None
) -> Iterator[Frame]:
    from ..video.planes import with_edit

    whole = Region(source.size, ((0, 0),) * len(source)) if region is None else region
    for i, (frame, edit, mask) in enumerate(zip(source.stored(), edited, masks, strict=True)):
        picture = placed(edit.movedim(-1, 0).float(), whole.size)
        weights = feather(mask, (edit.shape[1], edit.shape[0]), whole.size, reach, whole.sides(i, source.size[::-1]))
        inside, rim = (whole.on_frame(i, x, source.size) for x in weights)
        yield with_edit(frame, whole.on_frame(i, picture, source.size), Feather(inside, rim))
