"""Train the demo's video transformer from scratch on moving scenes, as rectified flow (arXiv 2209.03003).

First mostly on single frames, then on clips of all lengths. The clips' latents and the training state are saved in a
folder, from which an interrupted run resumes with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hosts.diffusers.checkpoint import Checkpoint
from .temporal import TemporalSettings, captions_of, render_latents
from .training import Plan, Report, train_weights
from .video_model import SHIFT, VideoPainter, build_tokenizer, save_video_model, shifted, token_ids

NOISY_SHIFT = 8.0
"""Shift of half of the clips' sigmas: outlines and paths are decided at very high noise."""
LENGTHS = (1, 8, 16)
"""Possible clip lengths of a step, in frames."""


@dataclass(frozen=True)
class VideoSettings:
    """Training settings; the defaults produced the bundled transformer."""

    seed: int = 0
    clips: int = 3_000
    steps: int = 8_000
    frames: int = 32
    """Total frames of a step's clips."""
    rate: float = 1e-3
    text_dropout: float = 0.1
    average: float = 0.999
    save_every: int = 250


def length_at(step: int, settings: VideoSettings, random: torch.Generator) -> int:
    """The length of a step's clips: mostly one frame in the first half, then all lengths."""
    shares = (0.7, 0.2, 0.1) if step < settings.steps / 2 else (0.2, 0.4, 0.4)
    return LENGTHS[int(torch.multinomial(torch.tensor(shares), 1, generator=random))]


@dataclass(frozen=True)
class Batch:
    """Clips (clips, 4, frames, 16, 16) with noise of the same shape, sigmas and caption indices."""

    clips: Tensor
    noise: Tensor
    sigmas: Tensor
    captions: Tensor


def batch_at(latents: Tensor, step: int, settings: VideoSettings) -> Batch:
    """The batch of a step, which depends only on the seed and the step; the last caption is empty."""
    random = torch.Generator().manual_seed(settings.seed * 10_000_019 + step)
    length = length_at(step, settings, random)
    count = settings.frames // length
    chosen = torch.randint(len(latents), (count,), generator=random)
    first = torch.randint(latents.shape[1] - length + 1, (count,), generator=random)
    clips = (
        torch.stack([latents[c, f : f + length] for c, f in zip(chosen, first, strict=True)]).float().transpose(1, 2)
    )
    sigmas, no_text = draw_sigmas(count, settings.text_dropout, random)
    return Batch(clips, torch.randn(clips.shape, generator=random), sigmas, torch.where(no_text, len(latents), chosen))


def draw_sigmas(count: int, text_dropout: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noise of a step's clips, and which of them have no text."""
    u = torch.randn(count, generator=random).sigmoid()
    no_text = torch.rand(count, generator=random) < text_dropout
    shift = torch.where(torch.rand(count, generator=random) < 0.5, SHIFT, NOISY_SHIFT)
    return shifted(u, shift), no_text


def train_video(
    folder: Path, state: Path, settings: VideoSettings, device: torch.device, report: Report = print
) -> None:
    """Train the transformer and its text encoder, and write their running averages to `folder`."""
    state.mkdir(parents=True, exist_ok=True)
    data = TemporalSettings(clips=settings.clips)
    clips_file = state / "clips.safetensors"
    if not clips_file.exists():
        save_file({"latents": render_latents(Checkpoint.load("demo", device).vae, data, report)}, clips_file)
    latents = load_file(clips_file)["latents"]
    tokenizer = build_tokenizer()
    ids, mask = token_ids(tokenizer, [*captions_of(data), ""])

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
