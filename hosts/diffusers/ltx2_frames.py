"""Frames that condition LTX-2's calls: a clean first frame, and a control video's tokens behind the clip's (IC-LoRA).

As in diffusers' pipelines, a token with the strength s has the noise level (1 - s) sigma, which the model gets for it.
The loops of the library have the clip's latents only, so that no token of a control video is inverted, fused or masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.condition import Condition
from ...models.ltx import GUIDE_SEED

PICTURE = "picture"
"""The extra with the latent of a first frame, (1, c, h, w)."""
CONTROL = "control"
"""The extra with the latents of a control video, (1, c, f, y, x), a factor smaller than the clip's."""
STRENGTH = "control_strength"
"""The extra with the strength of a control video, (1,)."""


@dataclass(frozen=True)
class Call:
    """A call on clips (rows, c, f, h, w) at a timestep.

    frames: the indices of the clips' latent frames. extras: of all rows. sigma: the noise level. fps: frames a second.
    pack: from latents to tokens (rows, n, d). rope: the transformer's positions.
    """

    clips: Tensor
    frames: Sequence[int]
    extras: Mapping[str, Tensor]
    sigma: float
    fps: float
    pack: Callable[[Tensor], Tensor]
    rope: Any

    def inputs(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The call's tokens (rows, n, d), their timesteps, and their positions (rows, 3, n, 2).

        timestep: of each row, (rows,). Without conditioning frames it is the timestep of all tokens, and positions are
        None, the transformer's own.
        """
        picture, control = self.extras.get(PICTURE), self.extras.get(CONTROL)
        if picture is None and control is None:
            return self.pack(self.clips), timestep, None
        clips, levels = self._with_first(picture)
        tokens, shares, places = [self.pack(clips)], [levels], [self._places(clips.shape)]
        if control is not None:
            seen, level = self._seen(control[:, :, list(self.frames)], control.shape)
            tokens.append(self.pack(seen))
            shares.append(level[:, None].expand(tokens[-1].shape[:2]))
            places.append(self._places(seen.shape, clips.shape[-1] // seen.shape[-1]))
        return torch.cat(tokens, 1), timestep[:, None] * torch.cat(shares, 1), torch.cat(places, 2)

    def _with_first(self, picture: Tensor | None) -> tuple[Tensor, Tensor]:
        """The clips with a clean first frame, if one is given, and the share of each token in the noise level."""
        first = torch.tensor([frame == 0 and picture is not None for frame in self.frames], device=self.clips.device)
        first = first.view(1, 1, -1, 1, 1)
        clips = self.clips if picture is None else torch.where(first, picture[:, :, None].to(self.clips), self.clips)
        noisy = (~first).float().expand(len(clips), 1, *clips.shape[2:])
        return clips, self.pack(noisy)[..., 0]

    def _seen(self, control: Tensor, whole: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frames of a control video at their noise level, and the share of each row in the clip's. whole: the shape of
        the video.
        """
        share = 1 - self.extras[STRENGTH]
        noise = torch.randn(1, *whole[1:], generator=torch.Generator().manual_seed(GUIDE_SEED))
        noise = noise[:, :, list(self.frames)].to(control)
        level = (self.sigma * share).view(-1, 1, 1, 1, 1).to(control)
        return (control + level * (noise - control)).to(self.clips), share.float()

    def _places(self, shape: Sequence[int], factor: int = 1) -> Tensor:
        """The positions of a video's tokens. factor: how much larger they are than the clip's."""
        rows, _, *size = shape
        places: Tensor = self.rope.prepare_video_coords(rows, *size, self.clips.device, fps=self.fps)
        places[:, 1:] *= factor
        return places


def led_to_picture(velocity: Tensor, z: Tensor, condition: Condition, sigma: float, frames: Sequence[int]) -> Tensor:
    """A predicted velocity of latents (f, c, h, w), that of the first frame leading to its picture, if one is given."""
    picture = condition.extras.get(PICTURE)
    if picture is None or 0 not in frames:
        return velocity
    at = list(frames).index(0)
    velocity = velocity.clone()
    velocity[at] = (z[at] - picture[0].to(z)) / sigma
    return velocity


def extras_of(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """The extras of the rows of a call. Raises ValueError for rows with different kinds of inputs."""
    first, *others = (set(condition.extras) for condition in conditions)
    for other in others:
        if other != first:
            named = ", ".join(sorted(first ^ other))
            raise ValueError(
                f"source, target and negative prompt have different inputs ({named}): encode all with a model for the "
                "same clip and control video"
            )
    return {name: torch.cat([condition.extras[name] for condition in conditions]) for name in conditions[0].extras}
