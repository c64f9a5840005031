"""Train the demo world's video transformer from nothing on its moving scenes, as rectified flow (arXiv 2209.03003).

Mostly single frames first, then clips of all lengths. The latents of the clips and the state of the training lie in a
folder, and a run that was stopped goes on from there as if it had not been.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hosts.diffusers.checkpoint import Checkpoint
from .temporal import TemporalSettings, captions_of, draw_latents
from .training import Plan, Report, train_weights
from .video_model import SHIFT, VideoPainter, build_tokenizer, save_video_model, token_ids

NOISY_SHIFT = 8.0
"""Of the sigmas of every other clip: outlines and paths are settled where there is hardly anything but noise."""
LENGTHS = (1, 8, 16)
"""Frames of the clips of a step."""


@dataclass(frozen=True)
class VideoSettings:
    """How long and on how much; the defaults made the bundled transformer."""

    seed: int = 0
    clips: int = 3_000
    steps: int = 8_000
    frames: int = 32
    """Of all clips of a step."""
    rate: float = 1e-3
    text_dropout: float = 0.1
    average: float = 0.999
    save_every: int = 250


def length_at(step: int, settings: VideoSettings, random: torch.Generator) -> int:
    """Frames of a step's clips: mostly one in the first half, then all lengths."""
    shares = (0.7, 0.2, 0.1) if step < settings.steps / 2 else (0.2, 0.4, 0.4)
    return LENGTHS[int(torch.multinomial(torch.tensor(shares), 1, generator=random))]


@dataclass(frozen=True)
class Batch:
    """Clips (clips, 4, frames, 16, 16), noise of their shape, a sigma for each, and which caption tells it."""

    clips: Tensor
    noise: Tensor
    sigmas: Tensor
    captions: Tensor


def batch_at(latents: Tensor, step: int, settings: VideoSettings) -> Batch:
    """The batch of a step, which depends on the seed and the step alone; the last caption is the empty one."""
    random = torch.Generator().manual_seed(settings.seed * 10_000_019 + step)
    length = length_at(step, settings, random)
    count = settings.frames // length
    chosen = torch.randint(len(latents), (count,), generator=random)
    first = torch.randint(latents.shape[1] - length + 1, (count,), generator=random)
    clips = (
        torch.stack([latents[c, f : f + length] for c, f in zip(chosen, first, strict=True)]).float().transpose(1, 2)
    )
    u = torch.randn(count, generator=random).sigmoid()
    blind = torch.rand(count, generator=random) < settings.text_dropout
    shift = torch.where(torch.rand(count, generator=random) < 0.5, SHIFT, NOISY_SHIFT)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return Batch(clips, torch.randn(clips.shape, generator=random), sigmas, torch.where(blind, len(latents), chosen))


def train_video(
    folder: Path, state: Path, settings: VideoSettings, device: torch.device, report: Report = print
) -> None:
    """Train the transformer with its text encoder and write their running averages to `folder`."""
    state.mkdir(parents=True, exist_ok=True)
    drawn = TemporalSettings(clips=settings.clips)
    kept = state / "clips.safetensors"
    if not kept.exists():
        save_file({"latents": draw_latents(Checkpoint.load("demo", device).vae, drawn, report)}, kept)
    latents = load_file(kept)["latents"]
    tokenizer = build_tokenizer()
    ids, mask = token_ids(tokenizer, [*captions_of(drawn), ""])

    torch.manual_seed(settings.seed)
    live = VideoPainter(tokenizer).to(device)

    def error_of(step: int) -> Tensor:
        batch = batch_at(latents, step, settings)
        clips, noise, sigmas = (x.to(device) for x in (batch.clips, batch.noise, batch.sigmas))
        s = sigmas.view(-1, 1, 1, 1, 1)
        text = (x[batch.captions].to(device) for x in (ids, mask))
        error = (live((1 - s) * clips + s * noise, sigmas, *text) - (noise - clips)).square().mean()
        error.backward()
        return error

    plan = Plan(
        "video transformer", state / "transformer.safetensors", settings.steps, settings.rate, settings.average,
        settings.save_every,
    )  # fmt: skip
    train_weights(dict(live.named_parameters()), plan, error_of, report)
    save_video_model(folder, live.eval(), tokenizer)
    report(f"video transformer written to {folder}")
