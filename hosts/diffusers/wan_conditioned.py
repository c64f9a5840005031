"""Wan's models with inputs besides text, on diffusers: image-to-video, and VACE's control video."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...attention.condition import FIRST, Condition
from ...models.wan import WAN_I2V, WAN_VACE
from .blocks import BlockDenoiser
from .flow import FlowDenoiser, FlowModel
from .wan import VideoTransformerDenoiser, WanModel, network_at


class ConditionedDenoiser(VideoTransformerDenoiser):
    """A Wan model with inputs besides text for one clip, as the loops of `fatezero.diffusion` call it.

    Attention to a picture's embedding, and VACE's own blocks, are the model's. Raises ValueError for attention
    processors that compute something else.
    """

    layout = FlowDenoiser.layout

    def __init__(self, model: ConditionedWan) -> None:
        self.model, self.family, self.transformers = model, model.family, model.networks  # type: ignore[misc]
        self.boundary = model.boundary
        BlockDenoiser.__init__(self, model.networks, model.scheduler)

    @property
    def channels(self) -> int:
        return self.model.channels

    def velocities(self, clips: Tensor, conditions: Sequence[Condition], timestep: float) -> Tensor:
        extras = {
            name: torch.cat([condition.extras[name] for condition in conditions]).to(clips)
            for name in conditions[0].extras
        }
        frames = self._rows[0].chunk.frame_indices
        return self.model.velocities(clips, self.texts(conditions).to(clips), extras, timestep, frames)


class ConditionedWan(FlowModel, WanModel):
    """A Wan model whose conditions have inputs for each latent frame, in `extras`."""

    text_dim = "text_dim"
    frames_meet = True

    @property
    def channels(self) -> int:
        return int(self.transformer.config["out_channels"])

    @property
    def clip_frames(self) -> int:
        """The number of frames that the latents hold."""
        return (self.facts.shape[0] - 1) * self.frames_per_latent + 1

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs besides text, the same for every prompt."""
        raise NotImplementedError

    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        return replace(super().encode_prompt(prompt, width, height, blocks), extras=self.inputs)

    @abstractmethod
    def velocities(
        self, clips: Tensor, texts: Tensor, extras: Mapping[str, Tensor], timestep: float, frames: Sequence[int]
    ) -> Tensor:
        """The predicted velocities of clips (rows, channels, f, h, w). extras: the inputs besides text, of each row.
        frames: their indices in the clip.
        """

    def velocity(self, z: Tensor, timestep: float, condition: Condition, frames: Sequence[int]) -> Tensor:
        clips = rearrange(z, "f c y x -> 1 c f y x")
        found = self.velocities(clips, condition.embeddings, condition.extras, timestep, frames)
        return rearrange(found, "1 c f y x -> f c y x")

    def called(self, clips: Tensor, times: Tensor, texts: Tensor, **inputs: Any) -> Tensor:
        """The transformer's output for clips (rows, channels, f, h, w)."""
        network = network_at(self.networks, self.boundary, self.scheduler, float(times.max()))
        output: Tensor = network(clips, times, texts, return_dict=False, **inputs)[0]
        return output

    def times(self, timestep: float, rows: int) -> Tensor:
        return torch.full((rows,), timestep, device=self.denoiser.device)

    @cached_property
    def denoiser(self) -> ConditionedDenoiser:  # type: ignore[override]
        return ConditionedDenoiser(self)


@dataclass(frozen=True)
class WanImageToVideo(ConditionedWan):
    """Wan 2.1 and 2.2 image-to-video, whose picture is the clip's first frame, in both branches of an edit.

    Models for a first and a last frame (FLF2V) get the clip's last frame too. Wan 2.2's 5B takes the picture as the
    first latent, clean at every level.
    """

    family = WAN_I2V
    pipelines = ("WanImageToVideoPipeline",)
    kinds = (WanTransformer3DModel,)
    needs_frames = takes_first_frame = True

    @cached_property
    @torch.no_grad()
    def inputs(self) -> dict[str, Tensor]:
        """picture: the input for each latent frame, (1, channels, f, h, w), or a clean first latent, `FIRST`. seen:
        CLIP's embedding, if the model takes one. Raises ValueError without the clip's frames.
        """
        if self.facts.frames is None:
            raise ValueError(f"{self.family.title} needs the frames of the clip")
        pictures = list(self._pictures(self.facts.frames()))
        first, *last = (picture.permute(2, 0, 1)[None].to(self.device) / 127.5 - 1 for picture in pictures)
        _, channels, height, width = self.facts.shape
        _, picture, *_ = self.pipeline.prepare_latents(
            first, 1, channels, height * self.factor, width * self.factor, self.clip_frames, torch.float32,
            self.device, latents=torch.zeros(1, device=self.device), last_image=last[0] if last else None,
        )  # fmt: skip
        if self._starts_clean:
            return {FIRST: picture[:, :, 0]}
        if self.transformer.config["image_dim"] is None:
            return {"picture": picture}
        seen = self.pipeline.encode_image([Image.fromarray(one.numpy()) for one in pictures], self.device)
        return {"picture": picture, "seen": seen.flatten(0, 1)[None]}

    def _pictures(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """The clip's first frame, and its last one for a model that takes both."""
        yield next(frames)
        if self._takes_last:
            yield from deque(frames, 1)

    def velocities(
        self, clips: Tensor, texts: Tensor, extras: Mapping[str, Tensor], timestep: float, frames: Sequence[int]
    ) -> Tensor:
        if self._starts_clean:
            return self._with_first_latent(clips, texts, extras[FIRST][:, :, None], timestep, frames)
        seen = extras.get("seen")
        if seen is not None:
            seen = seen.reshape(len(seen) * (2 if self._takes_last else 1), -1, seen.shape[-1])
        inputs = torch.cat([clips, extras["picture"][:, :, list(frames)]], 1)
        return self.called(inputs, self.times(timestep, len(clips)), texts, encoder_hidden_states_image=seen)

    @property
    def _starts_clean(self) -> bool:
        return bool(self.pipeline.config.get("expand_timesteps"))

    @property
    def _takes_last(self) -> bool:
        return self.transformer.config["pos_embed_seq_len"] is not None

    def _with_first_latent(
        self, clips: Tensor, texts: Tensor, picture: Tensor, timestep: float, frames: Sequence[int]
    ) -> Tensor:
        """Wan 2.2's 5B: the first latent is the picture's at timestep 0; its velocity leads to the picture."""
        total = self.scheduler.config["num_train_timesteps"]
        first = torch.tensor([frame == 0 for frame in frames], device=clips.device)
        is_first = first.view(1, 1, -1, 1, 1)
        _, down, across = self.transformer.config["patch_size"]
        patches = clips.shape[-2] // down * (clips.shape[-1] // across)
        times = torch.where(first, 0.0, timestep).repeat_interleave(patches).expand(len(clips), -1)
        predicted = self.called(torch.where(is_first, picture, clips), times, texts)
        return torch.where(is_first, (clips - picture) / (timestep / total), predicted)


@dataclass(frozen=True)
class WanVace(ConditionedWan):
    """Wan VACE, without a control video unless `with_control` gives one.

    control: uint8 frames (f, h, w, 3) that the clip follows, such as depth, poses or scribbles. strength: a factor on
    its effect.
    """

    family = WAN_VACE
    pipelines = ("WanVACEPipeline",)
    kinds = (WanVACETransformer3DModel,)
    takes_control = True

    control: Tensor | None = field(default=None, kw_only=True)
    strength: float = field(default=1.0, kw_only=True)

    @cached_property
    @torch.no_grad()
    def inputs(self) -> dict[str, Tensor]:
        """control: the control video and its mask of ones, as the pipeline encodes them, (1, channels, f, h, w)."""
        _, _, height, width = self.facts.shape
        video = torch.zeros(1, 3, self.clip_frames, height * self.factor, width * self.factor, device=self.device)
        if self.control is not None:
            video += self._given_control().to(self.device)
        mask, no_references = torch.ones_like(video), [list[Tensor]()]
        latents = self.pipeline.prepare_video_latents(video, mask, no_references, None, self.device)
        masks = self.pipeline.prepare_masks(mask, no_references)
        return {"control": torch.cat([latents, masks.to(latents)], 1)}

    def _given_control(self) -> Tensor:
        """The control video in -1..1, (1, 3, f, h, w), with its last frame repeated to complete the last latent."""
        assert self.control is not None
        at = torch.arange(self.clip_frames).clamp(max=len(self.control) - 1)
        return rearrange(self.control[at].float() / 127.5 - 1, "f y x c -> 1 c f y x")

    def with_control(
        self, name: str, frames: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
        variant: str | None = None,
    ) -> WanVace:  # fmt: skip
        self.check_control(strength, start, end)
        return replace(self, control=frames, strength=strength)

    def control_steps(self, steps: int) -> int:
        return 0 if self.control is None else steps

    def velocities(
        self, clips: Tensor, texts: Tensor, extras: Mapping[str, Tensor], timestep: float, frames: Sequence[int]
    ) -> Tensor:
        control = extras["control"][:, :, list(frames)]
        scale = control.new_full((len(self.transformer.config["vace_layers"]),), self.strength)
        return self.called(
            clips, self.times(timestep, len(clips)), texts, control_hidden_states=control,
            control_hidden_states_scale=scale,
        )  # fmt: skip
