"""Frames of a LATENT that condition LTX: guides behind the clip (LTXV Add Guide, IC-LoRA), and clean frames of the clip
(LTXV Img To Video Inplace).

As in the host's samplers, a token with the noise mask m has the noise level m sigma, and the model gets that level. The
loops of the library have the clip without guides, so that no guide is inverted, fused or masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...models.ltx import GUIDE_SEED
from .conditions import KEYFRAMES, HostCondition
from .families import family_of
from .latents import Shapes, into_model, nested, packed, shapes_of, streams, unpacked_parts


@dataclass(frozen=True)
class Guides:
    """The guides and clean frames of a LATENT.

    shapes: of the clip's streams, without guides. mask: the noise mask of clip and guides, (1, 1, f + g, h, w):
    negative for guide tokens that the model leaves out, 1 where the clip is edited. samples: of clip and guides,
    without sound, (1, c, f + g, h, w). scaled: these in the MODEL's scale.
    """

    shapes: Shapes
    mask: Tensor
    samples: Tensor
    scaled: Tensor

    @property
    def length(self) -> int:
        """The latent frames of the clip."""
        return int(self.shapes[0][2])

    @property
    def count(self) -> int:
        """The latent frames of the guides."""
        return int(self.samples.shape[2]) - self.length

    @property
    def all_shapes(self) -> Shapes:
        """The shapes of the streams, with guides."""
        video, *sound = self.shapes
        return [(*video[:2], video[2] + self.count, *video[3:]), *sound]

    def call_mask(self) -> Tensor:
        """The noise mask of the model's calls, packed."""
        video, *sound = (tuple(shape) for shape in self.all_shapes)
        return packed(nested([self.mask.expand(video), *map(torch.ones, sound)]))

    def edit_mask(self, mask: Any) -> Any:
        """The part of the LATENT's noise mask that limits edits: neither guides nor clean frames. None for no limit."""
        if mask is None:
            return None
        video, *sound = streams(mask)
        if bool((self._of_clip < 1).any()):
            video = torch.ones_like(video)
        parts = [video[:, :, : self.length] if video.ndim == 5 else video, *sound]
        return nested(parts) if any(bool((part < 1).any()) for part in parts) else None

    def with_guides(self, x: Tensor, guides: Tensor | None = None) -> Tensor:
        """The packed clip with guides behind it, by default without noise."""
        video, *sound = unpacked_parts(x, self.shapes)
        guides = self.scaled[:, :, self.length :] if guides is None else guides
        return packed(nested([torch.cat([video, guides.to(video)], 2), *sound]))

    def without_guides(self, x: Tensor) -> Tensor:
        video, *sound = unpacked_parts(x, self.all_shapes)
        return packed(nested([video[:, :, : self.length], *sound]))

    def samples_with_guides(self, samples: Any) -> Any:
        """LATENT samples of the clip with its clean frames, and with the guides behind it."""
        video, *sound = streams(samples)
        video = self._cleaned(video, self.samples)
        return nested([torch.cat([video, self.samples[:, :, self.length :].to(video)], 2), *sound])

    def finished(self, x: Tensor) -> Tensor:
        """The packed clip with its clean frames, and with the guides behind it."""
        video, *sound = unpacked_parts(x, self.shapes)
        return self.with_guides(packed(nested([self._cleaned(video, self.scaled), *sound])))

    def without_clean_frames(self) -> Guides:
        return replace(self, mask=torch.cat([torch.ones_like(self._of_clip), self.mask[:, :, self.length :]], 2))

    def _cleaned(self, video: Tensor, own: Tensor) -> Tensor:
        """A video whose clean frames are bit for bit those of `own`."""
        return torch.where((self._of_clip == 0).to(video.device), own[:, :, : self.length].to(video), video)

    def seen(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The packed clip at a noise level as the model gets it: guides and clean frames at their own levels."""
        level = sigma.cpu() * self.mask[:, :, self.length :].clamp(0, 1)
        guides = self.scaled[:, :, self.length :]
        return self.with_guides(self._mixed(x), guides + level * (self._noise - guides))

    @cached_property
    def _noise(self) -> Tensor:
        shape = self.scaled[:, :, self.length :].shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(GUIDE_SEED))

    @property
    def _of_clip(self) -> Tensor:
        """The clip's noise mask."""
        return self.mask[:, :, : self.length]

    def predicted(self, clean: Tensor) -> Tensor:
        """The predicted clean clip, from the model's prediction for `seen`."""
        return self._mixed(self.without_guides(clean))

    def _mixed(self, x: Tensor) -> Tensor:
        """The packed latents x where the clip's mask is 1, and the clip where it is 0."""
        video, *sound = unpacked_parts(x, self.shapes)
        own, mask = self.scaled[:, :, : self.length].to(video), self._of_clip.to(video)
        return packed(nested([video * mask + own * (1 - mask), *sound]))


def split_latent(model: Any, latent: Any, mask: Any, source: HostCondition) -> tuple[Any, Any, Guides | None]:
    """(clip, mask of its edits, guides and clean frames) of LATENT samples with their noise mask; None for none.

    The mask keeps frames clean if the model can and it has one value for each frame (1, 1, f, 1, 1). Raises ValueError
    for guides without a noise mask.
    """
    video, *sound = streams(latent)
    own = None if mask is None else streams(mask)[0]
    by_frame = own is not None and own.ndim == 5 and own.shape[2] == video.shape[2]
    tokens, can_clean = guide_tokens(source), family_of(model).clean_frames
    if not tokens and not (by_frame and can_clean):
        return latent, mask, None
    count, rest = divmod(tokens, prod(video.shape[3:]))
    if own is None or not by_frame or rest or count >= video.shape[2]:
        raise ValueError(
            f"latent: {video.shape[2]} latent frames of {video.shape[4]}x{video.shape[3]} do not hold the source's "
            f"{tokens} guide tokens with their noise mask: connect the LATENT of the node that added the guides (LTXV "
            "Add Guide)"
        )
    frames = video.shape[2] - count
    levels = comfy.utils.reshape_mask(own[:1, :1].float().cpu(), (1, 1, *video.shape[2:]))
    if not can_clean or _varies(levels[:, :, :frames]):
        levels = torch.cat([torch.ones_like(levels[:, :, :frames]), levels[:, :, frames:]], 2)
    if not count and bool((levels == 1).all()):
        return latent, mask, None
    clip = nested([video[:, :, :frames], *sound])
    scaled = unpacked_parts(into_model(model, latent), shapes_of(latent))[0]
    guides = Guides(shapes_of(clip), levels, video.cpu(), scaled.cpu())
    return clip, guides.edit_mask(mask), guides


def with_guides(guides: Guides | None, samples: Any) -> Any:
    """LATENT samples of the clip with guides behind it."""
    return samples if guides is None else guides.samples_with_guides(samples)


def guide_tokens(condition: HostCondition) -> int:
    """The tokens of guides that a prompt places."""
    found = (options.get(KEYFRAMES) for text, options in condition.conditioning if text is not None)
    return max((0 if places is None else int(places.shape[2]) for places in found), default=0)


def check_guides(guides: Guides | None, conditions: Sequence[HostCondition]) -> None:
    """Raise ValueError for prompts whose guides are not those of the inverted LATENT."""
    tokens = 0 if guides is None else guides.count * prod(guides.samples.shape[3:])
    for condition in conditions:
        if guide_tokens(condition) != tokens:
            raise ValueError(
                f"{condition.role.partition('.')[0]}: places {guide_tokens(condition)} guide tokens, but the inversion "
                f"has {tokens}: add the same guides to source, positive and negative (LTXV Add Guide)"
            )


def limits_frames(mask: Any, frames: int) -> bool:
    """Whether a noise mask changes only a part of the first frames, instead of whole ones."""
    levels = streams(mask)[0]
    return bool((levels < 1).any()) if levels.ndim < 5 else _varies(levels[:, :, :frames])


def _varies(levels: Tensor) -> bool:
    """Whether the mask of a frame has several values."""
    return bool((levels.amax((3, 4)) > levels.amin((3, 4))).any())
