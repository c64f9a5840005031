"""Train the demo checkpoint from scratch on rendered scenes, on a CPU or a GPU.

Three stages, each skipped if its result is in the state folder: the autoencoder, the pixel classifier (the judge), and
the UNet with its text encoder. The third saves optimizer and average every few minutes and resumes from them. Batches
depend only on the seed and the step, so an interrupted run gives the same result, up to rounding.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from . import model as demo
from .judge import close_up
from .scenes import SIZE, VOCABULARY, Motion, Scene, random_motion, render, scenes
from .training import Plan, Report, optimiser_of, rate_at, set_rate, train_weights


@dataclass(frozen=True)
class TrainSettings:
    """Training settings; the defaults produced the bundled checkpoint."""

    seed: int = 0
    images: int = 40_000
    vae_steps: int = 2_500
    vae_batch: int = 8
    vae_rate: float = 8e-4
    classifier_steps: int = 5_000
    unet_steps: int = 11_000
    unet_batch: int = 32
    unet_rate: float = 6e-4
    text_dropout: float = 0.1
    average: float = 0.999
    save_every: int = 500
    compile: bool = True


M = TypeVar("M", bound=nn.Module)


# --- the data -------------------------------------------------------------------------


Job = tuple[int, int, int | None]
"""A worker's job: seed, number of pictures, things in each."""


def _jobs(seed: int, count: int, things: int | None) -> list[Job]:
    share = 1000
    return [(seed * 100_003 + n, min(share, count - n), things) for n in range(0, count, share)]


def _scenes(job: Job) -> list[Scene]:
    """The scenes of a job, not rendered."""
    seed, count, things = job
    return [scene for scene, _ in islice(scenes(seed, held_out=False, things=things), count)]


def _with_motion(job: Job) -> Iterator[tuple[Scene, Motion]]:
    """The scenes of a job, each with its motion."""
    random = Random(job[0])
    return ((scene, random_motion(random, len(scene.things))) for scene in _scenes(job))


def _render(job: Job) -> Tensor:
    """The pictures of a job, uint8."""
    return torch.cat([in_bytes(render(scene, motion, frames=1).frames) for scene, motion in _with_motion(job)])


def _subjects(job: Job) -> Iterator[tuple[Scene, Motion, int]]:
    """Scenes and motions of a job, with the thing to show in a close-up: first and second in turn."""
    return ((scene, motion, n % len(scene.things)) for n, (scene, motion) in enumerate(_with_motion(job)))


def _render_close(job: Job) -> Tensor:
    """Close-ups of one thing per picture of a job."""
    shown = ((render(scene, motion, frames=1).frames, motion.tracks[at]) for scene, motion, at in _subjects(job))
    return torch.cat([in_bytes(close_up(frames, track)) for frames, track in shown])


def _scenes_close(job: Job) -> list[Scene]:
    """The scenes of the close-ups."""
    return [replace(scene, things=(scene.things[at],)) for scene, _, at in _subjects(job)]


def in_bytes(frames: Tensor) -> Tensor:
    return (frames * 255).round().byte()


@dataclass
class Pictures:
    """Frames (n, 3, 64, 64), uint8, and their scenes."""

    frames: Tensor
    scenes: list[Scene]

    @classmethod
    def rendered(cls, seed: int, count: int, things: int | None = None, close: bool = False) -> Pictures:
        """`count` pictures of scenes that are not held out, or close-ups of their things, rendered on all cores."""
        jobs = _jobs(seed, count, things)
        with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            frames = pool.map(_render_close if close else _render, jobs, chunksize=1)
        return cls(torch.cat(frames), [s for job in jobs for s in (_scenes_close(job) if close else _scenes(job))])

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(torch.cat([self.frames, other.frames]), self.scenes + other.scenes)


def batch_of(seed: int, step: int, size: int, count: int) -> tuple[Tensor, torch.Generator]:
    """The pictures of a step, and the generator for its other random numbers."""
    generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
    return torch.randint(count, (size,), generator=generator), generator


def noise_weight(signal: Tensor) -> Tensor:
    """The error's weight at a cumulative alpha: min-SNR's, increased where there is more noise than signal."""
    ratio = signal / (1 - signal)
    return (5 / ratio).clamp(max=1) * ratio.rsqrt().clamp(min=1)


# --- autoencoder ----------------------------------------------------------------------


def train_vae(pictures: Pictures, settings: TrainSettings, device: torch.device, report: Report) -> AutoencoderKL:
    """Minimize L1 + MSE + L1 of the gradients + a small KL, then standardize the latents."""
    torch.manual_seed(settings.seed)
    vae = demo.build_vae().to(device)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():  # start with little noise, or the decoder learns to ignore the latents
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    optimiser = optimiser_of(list(vae.parameters()), settings.vae_rate)

    for step in range(settings.vae_steps):
        chosen, generator = batch_of(settings.seed + 1, step, settings.vae_batch, len(pictures.frames))
        x = pictures.frames[chosen].to(device).float() / 127.5 - 1
        noise = torch.randn(len(x), 4, demo.LATENT_SIZE, demo.LATENT_SIZE, generator=generator).to(device)
        set_rate(optimiser, settings.vae_rate * rate_at(step, settings.vae_steps, tail=0.5))
        loss, mse = vae_loss(vae, x, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            report(f"vae {step + 1}/{settings.vae_steps}: {-10 * math.log10(mse.item() / 4):.2f} dB")
    standardise(vae, pictures.frames[:2048], device)
    return vae.eval()


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The autoencoder's loss on pictures in -1..1, and its squared error."""
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    y = vae.decode(mean + posterior.std * noise).sample
    mse = F.mse_loss(y, x)
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(y, x) + mse + edges + 1e-5 * kl, mse


@torch.no_grad()
def standardise(vae: AutoencoderKL, frames: Tensor, device: torch.device) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions on both sides.

    Then `LATENT_SCALE * latent` has mean 0 and variance 1 in every channel, as hosts that multiply by 0.18215 expect,
    and the reconstruction is unchanged.
    """
    means = torch.cat([vae.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean for x in frames.split(64)])
    mean = means.mean((0, 2, 3))
    unit = means.std((0, 2, 3)) * demo.LATENT_SCALE
    inward, outward = vae.quant_conv, vae.post_quant_conv
    assert inward is not None and outward is not None and inward.bias is not None and outward.bias is not None
    inward.weight[:4] /= unit.view(4, 1, 1, 1)
    inward.bias[:4] = (inward.bias[:4] - mean) / unit
    inward.bias[4:] -= 2 * unit.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= unit.view(1, 4, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: Tensor, batch: int = 64) -> Tensor:
    """uint8 frames (n, 3, 64, 64) to scaled latents (n, 4, 16, 16)."""
    device = vae.device
    parts = [vae.encode(x.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for x in frames.split(batch)]
    return (torch.cat(parts) * demo.LATENT_SCALE).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Scaled latents to frames in 0..1."""
    parts = [vae.decode(z.to(vae.device) / demo.LATENT_SCALE).sample.cpu() for z in latents.split(batch)]
    return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)


# --- the judge ------------------------------------------------------------------------


def train_classifier(
    pictures: Pictures, settings: TrainSettings, device: torch.device, report: Report
) -> demo.SceneClassifier:
    """Minimize cross entropy over all heads, on rendered frames with noise, blur, and changes of light and position."""
    torch.manual_seed(settings.seed)
    judge = demo.SceneClassifier().to(device)
    optimiser = optimiser_of(list(judge.parameters()), 2e-3)
    classes = {
        name: torch.tensor([words.index(demo.labels(s)[name]) for s in pictures.scenes])
        for name, words in judge.HEADS.items()
    }
    for step in range(settings.classifier_steps):
        chosen, generator = batch_of(settings.seed + 2, step, 64, len(pictures.frames))
        x = _augmented(pictures.frames[chosen].float() / 255, generator)
        x = x + 0.06 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        if torch.rand((), generator=generator) < 0.3:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = (x * (0.92 + 0.16 * torch.rand(len(x), 3, 1, 1, generator=generator))).clamp(0, 1).to(device)
        logits = judge(x)
        loss = sum((F.cross_entropy(logits[n], a[chosen].to(device)) for n, a in classes.items()), torch.zeros(()))
        set_rate(optimiser, 2e-3 * rate_at(step, settings.classifier_steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            report(f"classifier {step + 1}/{settings.classifier_steps}: loss {loss.item():.4f}")
    return judge.eval()


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture scaled by up to a tenth and shifted by up to three pixels."""
    size = 1 + 0.1 * (2 * torch.rand(len(x), generator=generator) - 1)
    shift = 3 * 2 / SIZE * (2 * torch.rand(len(x), 2, generator=generator) - 1)
    frame = torch.cat([torch.eye(2) * size.view(-1, 1, 1), shift[:, :, None]], -1)
    return F.grid_sample(x, F.affine_grid(frame, list(x.shape), False), padding_mode="border", align_corners=False)


# --- UNet and text encoder ------------------------------------------------------------


class Painter(nn.Module):
    """The two networks trained together."""

    def __init__(self, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel | None = None) -> None:
        super().__init__()
        self.unet, self.text = unet or demo.build_unet(), demo.build_text_encoder(tokenizer)


def train_painter(
    latents: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    state: Path,
    settings: TrainSettings,
    device: torch.device,
    report: Report,
) -> Painter:
    """Predict epsilon from noised latents and captions, min-SNR weighted (arXiv 2303.09556).

    Below a signal-to-noise ratio of one, the weight grows with its inverse square root: outlines are decided at high
    noise, to which plain epsilon loss gives little weight, and on so small a grid colours bind in two thousand steps
    but shapes do not.

    Resumes from the state folder if possible. Returns the running averages.
    """
    torch.manual_seed(settings.seed)
    live = Painter(tokenizer).to(device).train()
    live.unet.set_attn_processor(AttnProcessor())  # on a CPU, fused kernels do not speed up heads this narrow
    ids = demo.token_ids(tokenizer, [*captions, ""])
    alphas = demo.build_scheduler().alphas_cumprod.to(device)

    def loss_of(z: Tensor, noise: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        signal = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            states = live.text(text).last_hidden_state
            predicted = live.unet(signal.sqrt() * z + (1 - signal).sqrt() * noise, t, states).sample
        error = (predicted.float() - noise) ** 2
        return (noise_weight(signal) * error).mean(), error.mean()

    if settings.compile:
        loss_of = torch.compile(loss_of)

    def error_of(step: int) -> Tensor:
        chosen, generator = batch_of(settings.seed + 3, step, settings.unet_batch, len(latents))
        z = latents[chosen].to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        t = torch.randint(1000, (len(z),), generator=generator)
        no_text = torch.rand(len(z), generator=generator) < settings.text_dropout
        loss, error = loss_of(z, noise, t.to(device), torch.where(no_text[:, None], ids[-1], ids[chosen]).to(device))
        loss.backward()
        return error

    plan = Plan(
        "unet", state / "painter.safetensors", settings.unet_steps, settings.unet_rate, settings.average,
        settings.save_every, report_every=100,
    )  # fmt: skip
    train_weights(dict(live.named_parameters()), plan, error_of, report)
    return live.eval()


# --- the whole ------------------------------------------------------------------------


def save_checkpoint(folder: Path, vae: AutoencoderKL, painter: Painter, words: Iterable[str] = VOCABULARY) -> None:
    """Write diffusers' folder layout in fp16."""
    for module, name in ((vae, "vae"), (painter.unet, "unet"), (painter.text, "text_encoder")):
        deepcopy(module).cpu().half().save_pretrained(folder / name, safe_serialization=True)
    demo.build_tokenizer(folder / "tokenizer", words)
    demo.build_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def train(folder: Path, state: Path, settings: TrainSettings, device: torch.device, report: Report = print) -> None:
    """Run all stages; writes the checkpoint to `folder` and the state for resuming to `state`."""
    state.mkdir(parents=True, exist_ok=True)
    tokenizer = demo.build_tokenizer(state / "tokenizer")
    seed, images = settings.seed, settings.images

    @cache
    def pictures() -> Pictures:
        report(f"rendering {images} pictures")
        return Pictures.rendered(seed, images)

    def single_things() -> Pictures:
        """Pictures of one thing, whole or close up, for the judge."""
        return Pictures.rendered(seed + 1, images // 2, things=1) + Pictures.rendered(
            seed + 2, images // 2, 2, close=True
        )

    vae = _cached(
        state / "vae.safetensors", demo.build_vae(), lambda: train_vae(pictures(), settings, device, report)
    ).to(device)
    judge = _cached(
        state / "judge.safetensors",
        demo.SceneClassifier(),
        lambda: train_classifier(single_things(), settings, device, report),
    )
    if not (state / "latents.safetensors").exists():
        save_file({"latents": encode(vae, pictures().frames)}, state / "latents.safetensors")
    pictures.cache_clear()  # frees half a gigabyte
    latents = load_file(state / "latents.safetensors")["latents"]
    captions = [scene.caption for job in _jobs(seed, images, None) for scene in _scenes(job)]
    painter = train_painter(latents, captions, tokenizer, state, settings, device, report)
    save_checkpoint(folder, vae, painter)
    (folder / "judge").mkdir(exist_ok=True)
    save_file({k: v.half().cpu() for k, v in judge.state_dict().items()}, folder / "judge" / "model.safetensors")
    report(f"checkpoint written to {folder}")


def _cached(path: Path, empty: M, make: Callable[[], M]) -> M:
    """A stage's module from the state folder, or trained now and saved there."""
    if path.exists():
        empty.load_state_dict(load_file(path))
        return empty.eval()
    made = make()
    save_file({k: v.contiguous().cpu() for k, v in made.state_dict().items()}, path)
    return made
