"""Results with the source's own pixels where an edit changed nothing (`--keep pixels`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attention.masks import GivenMask, changed_latents
from ..imports import av, torch
from ..models.family import frames_of_latents
from ..video.fitted import FittedVideo
from ..video.orientation import SQUARE, Display, Mastering, Orientation, display_matrix
from ..video.read import VideoSource
from ..video.region import Region
from ..video.restore import NO_SIDES, Feather, feather, placed, reach_of, restored_frames
from ..video.size import crop
from ..video.write import METADATA_SUFFIXES, Frame, is_sequence, is_transparent
from .config.settings import ConfigError, EditConfig
from .region import Windowed, check_region

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model
    from ..video.planes import Box


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
class Form:
    """How stored frames with an edit are written. cut: a crop of the shown frame; box: of the stored, see `box_of`.

    pictures: whether they are written as pictures.
    """

    cut: Box
    box: Box
    display: Display
    pictures: bool

    def written(self, frame: av.VideoFrame, edited: av.VideoFrame) -> Frame:
        """A frame with its edit as it is written."""
        from ..video.colour import to_rgba
        from ..video.planes import depth_of

        if not self.pictures or (edited.format.is_rgb and depth_of(edited) > 8):
            return edited
        shown, aspect = Orientation.of(frame), float(self.display.aspect)
        return torch.from_numpy(shown.applied(to_rgba(edited, max(1, round(edited.width * aspect)))))


@dataclass(frozen=True)
class Original:
    """The frames that an edit is laid over. mask: the edit mask, if any.

    form: of stored frames; None where the edit is laid over their 8-bit RGB. note: what the result loses, if anything.
    """

    clip: FittedVideo
    mask: GivenMask | None
    form: Form | None = None
    note: str = ""


def original_of(clip: FittedVideo | None, config: EditConfig, mask: GivenMask | None, path: str) -> Original | None:
    """The frames on which an edit is laid; None where its result is the decoded frames. path: of the result."""
    if clip is None or not keeps_pixels(config, True):
        return None
    source = clip.source.whole if isinstance(clip.source, Windowed) else clip.source
    return Original(clip, mask, *_form_of(source or clip.source, clip.cut, path, config.lossless))


def _form_of(source: VideoSource, cut: Box, path: str, lossless: bool) -> tuple[Form | None, str]:
    """How a source's stored frames with an edit are written to a path, and what is lost."""
    from ..video.colour import has_alpha, shows_through
    from ..video.planes import box_of, depth_of, planar, retagged

    first, is_video = next(source.stored()), not is_sequence(path) and path.lower().endswith(METADATA_SUFFIXES)
    stored, rgb = planar(first), "the edit is laid over 8-bit RGB"
    if stored is None:
        return None, f"{source.path.name} has {first.format.name} frames: {rgb}"
    if has_alpha(stored) and not is_transparent(path):
        if not shows_through(stored):
            return None, ""
        return None, f"{path} cannot be transparent and shows the background: write .webm, .mov, .mkv or .png pictures"
    deep_rgb = stored.format.is_rgb and depth_of(stored) > 8
    if not (has_alpha(stored) or deep_rgb or (is_video and source.index is not None)):
        size = source.size[0] - cut[0] - cut[2], source.size[1] - cut[1] - cut[3]
        return None, _lost(path, av.VideoFrame(*size, "gbrp"), None) if is_video else ""
    if not is_video and deep_rgb and not has_alpha(stored) and not path.lower().endswith((".png", "/", "\\")):
        return None, f"{path} has 8 bits: write .png pictures or .mkv"
    box = box_of(first, cut, source.size)
    if box is None:
        return None, f"crop cuts through stored pixels, so {rgb}: use multiples of 2 and square pixels"
    aspect = source.index.aspect if source.index is not None else Fraction(1)
    display = Display(aspect, display_matrix(first), Mastering.of(first))
    left = av.VideoFrame(first.width - box[0] - box[2], first.height - box[1] - box[3], stored.format.name)
    retagged(left, stored)
    lost = _lost(path, left, display.mastering if lossless else None) if is_video else ""
    return Form(cut, box, display, not is_video), lost


def _lost(path: str, frame: av.VideoFrame, mastering: Mastering | None) -> str:
    """What a video file of frames like one loses. mastering: of HDR, if it is written losslessly."""
    from ..video.encoders import pads

    suffix = Path(path).suffix.lower()
    if pads(suffix, frame):
        return f"{path} gets a column or row more, because the format has no odd sizes: write .mp4 or .mkv"
    if mastering is not None and suffix == ".mkv":
        return f"{path} loses the mastering metadata of HDR, which FFV1 lacks: write .mp4"
    return ""


def recorded_with(config: EditConfig, original: Original | None) -> EditConfig:
    """The settings of a record, which has `keep` if the video's pixels stay."""
    return replace(config, keep="auto" if original is None else "pixels")


def laid(original: Original | None, model: Model, latents: tuple[Tensor, Tensor], edited: Iterable[Tensor]) -> Restored:
    """The frames to write. latents: of edit and clip, (f, c, h, w). edited: decoded, uint8 (h, w, 3)."""
    if original is None:
        return Restored(edited)
    clip, mask = original.clip, original.mask
    changed = changed_latents(*latents).cpu()
    if mask is not None and mask.how != "union":
        changed &= mask.at((changed.shape[1], changed.shape[2]), len(changed)).cpu() > 0
    reach = reach_of(lambda z: model.decode_clip(z, 1), latents[1][:1].to(model.device))
    masks = [changed[i] for i in frames_of_latents(len(clip), model.frames_per_latent)]
    source = clip.source
    whole, region = (source.whole, source.region) if isinstance(source, Windowed) else (source, None)
    if original.form is not None and whole is not None:
        return Restored(_stored_frames(original.form, whole, edited, masks, reach, region), original.form.display)
    laid_on = (
        restored_frames(_cropped(clip), edited, masks, reach)
        if region is None or whole is None
        else region.stitched(whole.frames(), edited, masks, reach)
    )
    return Restored(map(_at_its_size, laid_on))


def _at_its_size(frame: Tensor) -> Frame:
    """A frame that is not padded as it is written. RGB of even sizes never is."""
    from ..video.planes import in_planes

    return in_planes(frame) if any(side % 2 for side in frame.shape[:2]) else frame


def _cropped(clip: FittedVideo) -> Iterator[Tensor]:
    for frame in clip.source.frames():
        yield crop(frame[None], *clip.cut)[0]


def _stored_frames(
    form: Form,
    source: VideoSource,
    edited: Iterable[Tensor],
    masks: Iterable[Tensor],
    reach: int,
    region: Region | None,
) -> Iterator[Frame]:
    from ..video.planes import with_edit

    (left, top, right, bottom), (width, height) = form.cut, source.size
    whole = Region((width - left - right, height - top - bottom), ((left, top),) * len(source))
    place = whole if region is None else region
    for i, (frame, edit, mask) in enumerate(zip(source.stored(), edited, masks, strict=True)):
        picture = placed(edit.movedim(-1, 0).float(), place.size)
        sides = NO_SIDES if region is None else region.sides(i, (height, width))
        weights = feather(mask, (edit.shape[1], edit.shape[0]), place.size, reach, sides)
        inside, rim = (place.on_frame(i, x, source.size) for x in weights)
        laid_on = Feather(inside, rim), source.background, form.box
        yield form.written(frame, with_edit(frame, place.on_frame(i, picture, source.size), *laid_on))
