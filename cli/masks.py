"""Edit masks and object masks in files. One picture covers all frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..attention.masks import GivenMask, mask_by_latent
from ..imports import torch
from ..models.family import frames_of_latents
from ..video.fitted import FittedVideo
from ..video.read import VideoSource, open_video
from ..video.size import crop_on, to_unit
from .config.paths import files_of
from .config.settings import ConfigError, EditConfig, of_setting

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model


def found_mask(name: str, file: str, frames: int | None = None) -> VideoSource:
    """A mask's frames: one, or the first `frames`. Raises ConfigError, naming the setting, for fewer."""
    with of_setting(name):
        still = len(open_video(file, at_most=2)) == 1
        return open_video(file, count=1 if still else frames)


def check_masks(config: EditConfig, frames: int) -> None:
    """Raise ConfigError for a mask with neither one frame nor the clip's number of frames."""
    for what, file in files_of(config).items():
        if what.partition(" ")[0] in ("edit_mask", "mask", "object_mask"):
            found = len(found_mask(what, file))
            if found not in (1, frames):
                raise ConfigError(f"{what}: {file} has {found} frames; give one, or {frames} like the clip")


def fitted_like(
    crop: tuple[int, int, int, int], size: tuple[int, int], clip: VideoSource | None
) -> Callable[[VideoSource], FittedVideo]:
    """A function that crops and scales pictures like a clip. Without the clip they are taken to have its size."""
    return lambda found: FittedVideo.of(found, crop if clip is None else crop_on(crop, clip.size, found.size), size)


def edit_mask(
    checkpoint: Model, config: EditConfig, crop: tuple[int, int, int, int], size: tuple[int, int],
    video: VideoSource | None = None,
) -> GivenMask | None:  # fmt: skip
    """The edit mask, cropped and scaled like the clip, if any. video: the clip's."""
    from .region import Windowed, window_of_mask

    if not config.edit_mask:
        return None
    if isinstance(video, Windowed):
        return GivenMask(_by_latent(window_of_mask(config, video, size), checkpoint), config.mask_mode)
    with of_setting("edit_mask"):
        fit = fitted_like(crop, size, video)
        mask = grey(fit(found_mask("edit_mask", config.edit_mask)))
    return GivenMask(mask if len(mask) == 1 else _by_latent(mask, checkpoint), config.mask_mode)


def grey(video: VideoSource | FittedVideo) -> Tensor:
    """The brightness of frames, (frames, height, width) in 0..1."""
    return torch.stack([to_unit(frame[None])[0].mean(0) for frame in video.frames()])


def _by_latent(mask: Tensor, checkpoint: Model) -> Tensor:
    """A mask of frames as a mask of latents."""
    return mask_by_latent(mask, frames_of_latents(len(mask), checkpoint.frames_per_latent))
