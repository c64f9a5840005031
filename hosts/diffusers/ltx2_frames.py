"""Frames that condition LTX-2's calls: a clean first frame, and behind the clip's tokens those of guide frames and of a
control video (IC-LoRA).

As in diffusers' pipelines, a token with the strength s has the noise level (1 - s) sigma, which the model gets for it.
The loops of the library have the clip's latents only, so that no token behind them is inverted, fused or masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.condition import FIRST, Condition
from ...models.ltx import GUIDE_SEED

GUIDES = "guides"
"""The extra with the latents of other frames, (1, c, k, h, w)."""
NUMBERS = "guide_numbers"
"""The extra with their frame numbers, (1, k)."""
CONTROL = "control"
"""The extra with the latents of a control video, (1, c, f, y, x), a factor smaller than the clip's."""
STRENGTH = "control_strength"
"""The extra with the strength of a control video, (1,)."""


@dataclass(frozen=True)
class Call:
    """A call on clips (rows, c, f, h, w) at a timestep.

    frames: the indices of the clips' latent frames. extras: of all rows. sigma: the noise level. fps: frames a second.
    stride: frames of a latent. pack: from latents to tokens (rows, n, d). rope: the transformer's positions.
    """

    clips: Tensor
    frames: Sequence[int]
    extras: Mapping[str, Tensor]
    sigma: float
    fps: float
    stride: int
    pack: Callable[[Tensor], Tensor]
    rope: Any

    def inputs(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The call's tokens (rows, n, d), their timesteps, and their positions (rows, 3, n, 2).

        timestep: of each row, (rows,). Without conditioning frames it is the timestep of all tokens, and positions are
        None, the transformer's own.
        """
        picture, control = self.extras.get(FIRST), self.extras.get(CONTROL)
        if picture is None and control is None and GUIDES not in self.extras:
            return self.pack(self.clips), timestep, None
        clips, levels = self._with_first(picture)
        tokens, shares, places = [self.pack(clips)], [levels], [self._places(clips.shape)]

        def behind(latents: Tensor, share: Tensor, at: Tensor) -> None:
            tokens.append(self.pack(latents.to(clips)))
            shares.append(share[:, None].expand(tokens[-1].shape[:2]))
            places.append(at)

        for number, latents in self._guides():
            at = self._places(latents.shape)
            at[:, 0] += number / self.fps
            behind(latents, levels.new_zeros(len(latents)), at)
        if control is not None:
            seen, level = self._seen(control[:, :, list(self.frames)], control.shape)
            behind(seen, level, self._places(seen.shape, clips.shape[-1] // seen.shape[-1]))
        return torch.cat(tokens, 1), timestep[:, None] * torch.cat(shares, 1), torch.cat(places, 2)

    def _guides(self) -> Iterator[tuple[int, Tensor]]:
        """The guide frames among the frames of the call, each with its number from the first of these."""
        if GUIDES not in self.extras:
            return
        first, last = (self.frames[at] * self.stride for at in (0, -1))
        for number, latents in zip(self.extras[NUMBERS][0].tolist(), self.extras[GUIDES].split(1, 2), strict=True):
            if first - self.stride < number <= last:
                yield max(int(number) - first, 0), latents

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
        share = 1 - self.extras[STRENGTH].float()
        if not share.any():
            return control, share
        noise = torch.randn(1, *whole[1:], generator=torch.Generator().manual_seed(GUIDE_SEED))
        noise = noise[:, :, list(self.frames)].to(control)
        level = (self.sigma * share).view(-1, 1, 1, 1, 1).to(control)
        return control + level * (noise - control), share

    def _places(self, shape: Sequence[int], factor: int = 1) -> Tensor:
        """The positions of a video's tokens. factor: how much larger they are than the clip's."""
        rows, _, *size = shape
        places: Tensor = self.rope.prepare_video_coords(rows, *size, self.clips.device, fps=self.fps)
        places[:, 1:] *= factor
        return places


def led_to_picture(velocity: Tensor, z: Tensor, condition: Condition, sigma: float, frames: Sequence[int]) -> Tensor:
    """A predicted velocity of latents (f, c, h, w), that of the first frame leading to its picture, if one is given."""
    picture = condition.extras.get(FIRST)
    if picture is None or 0 not in frames:
        return velocity
    at = list(frames).index(0)
    velocity = velocity.clone()
    velocity[at] = (z[at] - picture[0].to(z)) / sigma
    return velocity


def extras_of(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """The extras of the rows of a call. Raises ValueError for rows with different kinds of inputs."""
    shapes = [{name: value.shape for name, value in condition.extras.items()} for condition in conditions]
    for other in shapes:
        if other != shapes[0]:
            named = ", ".join(sorted({name for name, _ in other.items() ^ shapes[0].items()}))
            raise ValueError(
                f"source, target and negative prompt have different inputs ({named}): encode all with a model for the "
                "same clip, guide frames and control video"
            )
    found = {name: torch.cat([condition.extras[name] for condition in conditions]) for name in shapes[0]}
    if NUMBERS in found and bool((found[NUMBERS] != found[NUMBERS][:1]).any()):
        raise ValueError(f"source, target and negative prompt have different guide frames: {found[NUMBERS].tolist()}")
    return found
