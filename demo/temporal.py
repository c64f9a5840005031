"""Train temporal layers for the demo checkpoint on moving scenes, which makes it a text-to-video model.

Of the image model only the queries of attention are trained, as in Tune-A-Video. The layers are FateZero's, with full
convolutions over frames, because only these distinguish the order of frames. The clips' latents and the training state
are saved in a folder, from which an interrupted run resumes with the same result.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..attention.key_frames import KeyFrames
from ..diffusion.training import clip_loss
from ..files.temporal_layers import training_metadata
from ..hosts.diffusers import with_temporal_layers
from ..hosts.diffusers.checkpoint import Checkpoint
from ..hosts.diffusers.temporal import queries_of, save_temporal_layers, temporal_layers
from .scenes import SIZE, Scene, random_motion, random_scene, render
from .train import encode, in_bytes, noise_weight
from .training import Plan, Report, train_weights

KEYS = KeyFrames(("first", "previous"))
"""The key frames for training, editing and generating."""


@dataclass(frozen=True)
class TemporalSettings:
    """Training settings; the defaults produced the bundled layers."""

    seed: int = 0
    clips: int = 3_000
    frames: int = 16
    """Frames of a clip. Steps alternate between two clips of half the length and one whole clip."""
    steps: int = 2_400
    rate: float = 1e-3
    text_dropout: float = 0.1
    average: float = 0.998
    save_every: int = 250


# --- the data -------------------------------------------------------------------------


Job = tuple[int, int, int]
"""A worker's job: seed, number of clips, frames of each."""


def _jobs(settings: TemporalSettings, share: int = 50) -> list[Job]:
    starts = range(0, settings.clips, share)
    return [(settings.seed * 100_003 + at, min(share, settings.clips - at), settings.frames) for at in starts]


def _scenes(job: Job) -> list[Scene]:
    """The scenes of a job, without held-out captions."""
    seed, count, _ = job
    random = Random(f"clips {seed}")
    sampled = (random_scene(random) for _ in iter(int, 1))
    return list(islice((scene for scene in sampled if not scene.held_out), count))


def _render(job: Job) -> Tensor:
    """The clips of a job: (clips, frames, 3, 64, 64), uint8."""
    seed, _, frames = job
    random = Random(f"motions {seed}")
    motions = ((scene, random_motion(random, len(scene.things), frames)) for scene in _scenes(job))
    return torch.stack([in_bytes(render(scene, motion, frames).frames) for scene, motion in motions])


def captions_of(settings: TemporalSettings) -> list[str]:
    """The caption of each clip."""
    return [scene.caption for job in _jobs(settings) for scene in _scenes(job)]


def render_latents(vae: AutoencoderKL, settings: TemporalSettings, report: Report) -> Tensor:
    """The latents of all clips, (clips, frames, 4, 16, 16) in float16; rendered on all cores."""
    jobs, parts = _jobs(settings), list[Tensor]()
    with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for frames in pool.imap(_render, jobs):
            parts.append(encode(vae, frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).half())
            if len(parts) % 10 == 0:
                report(f"clips {sum(map(len, parts))}/{settings.clips}")
    return torch.cat(parts)


# --- the training -----------------------------------------------------------------------


def train_temporal(
    output: Path, state: Path, settings: TemporalSettings, device: torch.device, report: Report = print
) -> None:
    """Train temporal layers and write their running average to `output`; resumes from the state folder."""
    state.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.load("demo", device)
    clips = state / "clips.safetensors"
    if not clips.exists():
        save_file({"latents": render_latents(checkpoint.vae, settings, report)}, clips)
    latents = load_file(clips)["latents"]
    captions = captions_of(settings)

    torch.manual_seed(settings.seed)
    unet = with_temporal_layers(checkpoint.unet, kind="fatezero")
    trained = trained_weights(unet)
    for weight in trained.values():
        weight.requires_grad_(True)
    plan = Plan(
        "temporal layers", state / "temporal.safetensors", settings.steps, settings.rate, settings.average,
        settings.save_every,
    )  # fmt: skip
    train_weights(trained, plan, lambda step: _step(checkpoint, latents, captions, step, settings), report)
    save_temporal_layers(
        unet.half(), output, training_metadata(KEYS.entries, True) | {"trained on": f"{settings.clips} moving scenes"}
    )
    report(f"temporal layers written to {output}")


def trained_weights(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """All temporal layers of a UNet, and the queries of its attention."""
    layers = temporal_layers(unet)
    assert layers is not None
    return queries_of(unet) | layers.named()


def _step(checkpoint: Checkpoint, latents: Tensor, captions: list[str], step: int, settings: TemporalSettings) -> float:
    """Accumulate the gradients of a step over its clips, each at its own timestep; returns the unweighted error.

    The loss is weighted by noise as in `train.train_painter`, because motion is decided at high noise.
    """
    random = torch.Generator().manual_seed(settings.seed * 10_000_019 + step)
    clips = 1 if step % 2 else 2
    frames, errors = settings.frames // clips, []
    for _ in range(clips):
        at, first, timestep = (
            int(torch.randint(top, (), generator=random)) for top in (len(latents), settings.frames - frames + 1, 1000)
        )
        z = latents[at, first : first + frames].float()
        noise = torch.randn(z.shape, generator=random).to(checkpoint.unet.device)
        with_text = float(torch.rand((), generator=random)) >= settings.text_dropout
        condition = checkpoint.encode_prompt(captions[at] if with_text else "", SIZE, SIZE)
        denoiser = checkpoint.denoiser
        with torch.enable_grad(), denoiser.hooked(clip_norm=True):
            error = clip_loss(denoiser, z.to(noise), noise, timestep, condition, KEYS)
            (noise_weight(denoiser.scheduler.alphas_cumprod[timestep]) * error / clips).backward()
        errors.append(error.item())
    return sum(errors) / clips
