"""New clips from noise: sampling with classifier-free guidance, without a source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, ClipCalls, KeyFrames, Windows
from ..imports import no_grad
from .denoiser import Denoiser, Guidance, check_finite, keys_on
from .invert import Progress
from .steering import ClipSteering, FollowingSteering, Recording

if TYPE_CHECKING:
    from torch import Tensor


@no_grad
def generate(
    denoiser: Denoiser,
    noise: Tensor,
    text: Tensor | Condition,
    negative: Tensor | Condition,
    steps: int = 50,
    guidance_scale: float = 7.5,
    key_frames: KeyFrames | Iterable[str | int] | str | int | None = None,
    clip_norm: bool | None = None,
    *,
    layout: ClipSteering | None = None,
    attention: Recording | None = None,
    chunk_frames: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Generate latents (frames, c, h, w) from noise of this shape. Only video models give consistent frames.

    text, negative: embeddings of the prompts. layout: where objects should be (`LayoutGuidance`), whose gradients may
    be computed in chunks of `chunk_frames`; for an `OwnLayout` the clip is generated without guidance first.
    attention: records the frames' attention in every step (`WordAttention`). key_frames, clip_norm: None for those of
    the model's training. progress: called with (steps done, total steps). Raises ValueError for inputs that do not fit
    the model, ArithmeticError for numbers out of range.
    """
    if isinstance(layout, FollowingSteering):
        recorded, halves = layout.recorder(), _halves(progress)
        plain = (denoiser, noise, text, negative, steps, guidance_scale, key_frames, clip_norm)
        layout.check_fits(len(noise), Condition.of(text, "text").text_tokens)
        generate(*plain, attention=recorded, chunk_frames=chunk_frames, progress=halves[0])
        layout, progress = layout.following(recorded), halves[1]
    own_keys, own_norm = denoiser.trained_with
    keys = keys_on(denoiser, own_keys if key_frames is None else key_frames)
    clip_norm = (own_norm if clip_norm is None else clip_norm) and not denoiser.spans_clip
    calls = ClipCalls(keys, clip_norm, Windows.of(chunk_frames))
    schedule, chunk, sites = denoiser.schedule(steps), Chunk.whole(len(noise)), denoiser.sites(*noise.shape[-2:])
    z = noise.to(denoiser.device)
    positive, unwanted = (Condition.of(t, name).to(z) for t, name in ((text, "text"), (negative, "negative")))
    if denoiser.embeds_guidance:
        positive = positive.with_guidance(guidance_scale)
    if layout is not None:
        layout.check_fits(len(z), positive.text_tokens)
        if attention is not None and not layout.moves_latents:
            raise ValueError("forward guidance replaces attention, which cannot be recorded: set mode to backward")
    with denoiser.hooked(clip_norm):
        for step, timestep in enumerate(schedule.timesteps):
            control = Control(keys, chunk)
            if layout is not None and layout.guides(step, steps):
                alpha = schedule.alphas[steps - step]
                z = layout.moved(denoiser, z, timestep, alpha, positive, calls)
                control = layout.control(keys, chunk)
            if attention is not None:
                control = attention.recorder(keys, chunk, sites, positive.text_tokens)
            guidance = None
            if not denoiser.embeds_guidance:
                guidance = Guidance(unwanted, Control(keys, chunk), guidance_scale)
            predicted = denoiser.predict_noise(z, timestep, positive, control, guidance)
            if attention is not None:
                attention.record(control, timestep)
            z = schedule.move(z, predicted, steps - step, steps - step - 1)
            check_finite(z, f"latents of step {step + 1}")
            if progress:
                progress(step + 1, steps)
    return z


def _halves(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """The progress of each of two equal runs."""
    if progress is None:
        return None, None
    return lambda done, of: progress(done, 2 * of), lambda done, of: progress(of + done, 2 * of)
