"""Train the demo checkpoint from nothing on the demo world, on a CPU or a GPU.

Four stages, each skipped when its result already lies in the state folder: the
autoencoder, the pixel classifier (the judge), the UNet with its text encoder, and the
same again with a grounding loss that draws the cross-attention of a word to its object.
The third and fourth save optimiser and average every few minutes and go on from there;
batches depend on the seed and the step alone, so an interrupted run ends where an
uninterrupted one would, up to rounding.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import model as demo
from .scenes import Scene, random_motion, render, scenes


@dataclass(frozen=True)
class TrainSettings:
    """How long and on how much; the defaults made the bundled checkpoint."""

    seed: int = 0
    images: int = 40_000
    vae_steps: int = 2_500
    vae_batch: int = 8
    vae_rate: float = 8e-4
    classifier_steps: int = 2_500
    unet_steps: int = 9_000
    grounded_steps: int = 1_500
    unet_batch: int = 32
    unet_rate: float = 6e-4
    text_dropout: float = 0.1
    grounding: float = 0.02
    average: float = 0.999
    save_every: int = 500
    compile: bool = True


Report = Callable[[str], None]
M = TypeVar("M", bound=nn.Module)


# --- the data -------------------------------------------------------------------------


def _draw(job: tuple[int, int, int | None]) -> tuple[Tensor, Tensor, list[Scene]]:
    """One worker's share of pictures: each a random frame of a random clip."""
    seed, count, things = job
    torch.set_num_threads(1)
    stream = scenes(seed, held_out=False, things=things)
    random = Random(seed)
    frames, masks, seen = [], [], []
    for _ in range(count):
        scene, _ = next(stream)
        clip = render(scene, random_motion(random, len(scene.things)), frames=1)
        frames.append((clip.frames[0] * 255).round().byte())
        cover = F.avg_pool2d(clip.masks[:, 0], 4)
        masks.append(F.pad(cover, (0, 0, 0, 0, 0, 2 - len(cover))).mul(255).round().byte())
        seen.append(scene)
    return torch.stack(frames), torch.stack(masks), seen


@dataclass
class Pictures:
    """frames (n, 3, 64, 64) and object coverage on the latent grid (n, 2, 16, 16), uint8."""

    frames: Tensor
    masks: Tensor
    scenes: list[Scene]

    @classmethod
    def drawn(cls, seed: int, count: int, things: int | None = None) -> Pictures:
        """`count` pictures of scenes that are not held out, drawn by every core."""
        share = 1000
        jobs = [(seed * 100_003 + n, min(share, count - n), things) for n in range(0, count, share)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            parts = pool.map(_draw, jobs, chunksize=1)
        return cls(
            torch.cat([p[0] for p in parts]),
            torch.cat([p[1] for p in parts]),
            [scene for p in parts for scene in p[2]],
        )


def _batch(seed: int, step: int, size: int, count: int) -> tuple[Tensor, torch.Generator]:
    """The pictures of a step and the generator of its other chances."""
    generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
    return torch.randint(count, (size,), generator=generator), generator


def _rate(step: int, steps: int, warmup: int = 200, tail: float = 0.3) -> float:
    """Warm up, hold, and fall to zero by a cosine over the last `tail` of the steps."""
    fall = max(0.0, (step - (1 - tail) * steps) / (tail * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


def _optimiser(parameters: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16)


def _compiled(function: Callable, settings: TrainSettings) -> Callable:
    return torch.compile(function) if settings.compile else function


# --- autoencoder ----------------------------------------------------------------------


def train_vae(pictures: Pictures, settings: TrainSettings, device: torch.device, report: Report) -> AutoencoderKL:
    """L1 + MSE + L1 of the gradients + a small KL; then give the latents unit variance."""
    torch.manual_seed(settings.seed)
    vae = demo.build_vae().to(device)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():  # start almost without noise, or the decoder learns to ignore the latents
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    optimiser = _optimiser(list(vae.parameters()), settings.vae_rate)

    def loss_of(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        y = vae.decode(mean + posterior.std * noise).sample
        mse = F.mse_loss(y, x)
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, x) + mse + edges + 1e-5 * kl, mse

    for step in range(settings.vae_steps):
        chosen, generator = _batch(settings.seed + 1, step, settings.vae_batch, len(pictures.frames))
        x = pictures.frames[chosen].to(device).float() / 127.5 - 1
        noise = torch.randn(len(x), 4, demo.LATENT_SIZE, demo.LATENT_SIZE, generator=generator).to(device)
        _set_rate(optimiser, settings.vae_rate * _rate(step, settings.vae_steps, tail=0.5))
        loss, mse = loss_of(x, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            report(f"vae {step + 1}/{settings.vae_steps}: {-10 * math.log10(mse.item() / 4):.2f} dB")
    _standardise(vae, pictures.frames[:2048], device)
    return vae.eval()


@torch.no_grad()
def _standardise(vae: AutoencoderKL, frames: Tensor, device: torch.device) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions at either side.

    Afterwards `LATENT_SCALE * latent` has mean 0 and variance 1 in every channel, which is
    what a host that multiplies by 0.18215 expects, and the reconstruction is unchanged.
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
    """Cross entropy over every head, on rendered frames with noise, blur and shifts of light."""
    torch.manual_seed(settings.seed)
    judge = demo.SceneClassifier().to(device)
    optimiser = _optimiser(list(judge.parameters()), 2e-3)
    answers = {
        name: torch.tensor([words.index(demo.labels(s)[name]) for s in pictures.scenes])
        for name, words in judge.HEADS.items()
    }
    for step in range(settings.classifier_steps):
        chosen, generator = _batch(settings.seed + 2, step, 64, len(pictures.frames))
        x = pictures.frames[chosen].float() / 255
        x = x + 0.06 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        if torch.rand((), generator=generator) < 0.3:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = (x * (0.92 + 0.16 * torch.rand(len(x), 3, 1, 1, generator=generator))).clamp(0, 1).to(device)
        logits = judge(x)
        loss = sum((F.cross_entropy(logits[n], a[chosen].to(device)) for n, a in answers.items()), torch.zeros(()))
        _set_rate(optimiser, 2e-3 * _rate(step, settings.classifier_steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            report(f"classifier {step + 1}/{settings.classifier_steps}: loss {loss.item():.4f}")
    return judge.eval()


# --- UNet and text encoder ------------------------------------------------------------


class GroundedProcessor(AttnProcessor):
    """Cross attention that keeps its map, for the grounding loss; (batch*heads, tokens, 77)."""

    def __init__(self) -> None:
        super().__init__()
        self.map: Tensor | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        assert encoder_hidden_states is not None
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        self.map = attn.get_attention_scores(query, key)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(self.map, value)))


def word_columns(tokenizer: CLIPTokenizer, scene: Scene) -> Tensor:
    """(2, 77) of booleans: the caption's columns that name each thing's shape."""
    words = scene.caption.split()
    columns = torch.zeros(2, 77, dtype=torch.bool)
    starts = [sum(len(tokenizer.tokenize(w)) for w in words[:i]) + 1 for i in range(len(words))]
    nouns = [i for i, word in enumerate(words) if word in demo.SHAPES]
    for thing, noun in enumerate(nouns):
        columns[thing, starts[noun]] = True
    return columns


def grounding_loss(maps: list[Tensor], columns: Tensor, masks: Tensor) -> Tensor:
    """TokenCompose's token and pixel losses (arXiv 2312.03626, Eq. 4 and 5).

    maps: per layer (batch*heads, tokens, 77). columns (batch, 2, 77): a thing's noun.
    masks (batch, 2, 16, 16) in 0..1.
    """
    batch, total = len(columns), torch.zeros((), device=masks.device)
    present = columns.any(-1).float()
    for attention in maps:
        side = math.isqrt(attention.shape[1])
        heads = attention.float().unflatten(0, (batch, -1)).mean(1)
        noun = torch.einsum("bnc,btc->btn", heads, columns.float())
        truth = F.adaptive_avg_pool2d(masks, side).flatten(2)
        inside = (noun * truth).sum(-1) / noun.sum(-1).clamp(min=1e-6)
        token = (1 - inside) ** 2
        shown = noun / noun.amax(-1, keepdim=True).clamp(min=1e-6)
        pixel = F.binary_cross_entropy(shown.clamp(1e-4, 1 - 1e-4), truth, reduction="none").mean(-1)
        total = total + ((token + 0.5 * pixel) * present).sum() / present.sum().clamp(min=1)
    return total / max(len(maps), 1)


@dataclass
class Painter:
    """The two networks that learn together, and their running averages."""

    unet: UNet2DConditionModel
    text: CLIPTextModel

    def parameters(self) -> list[nn.Parameter]:
        return [*self.unet.parameters(), *self.text.parameters()]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor.contiguous()
            for part, module in (("unet", self.unet), ("text", self.text))
            for name, tensor in ((f"{part}.{k}", v) for k, v in module.state_dict().items())
        }

    def load(self, tensors: dict[str, Tensor], prefix: str) -> None:
        for part, module in (("unet", self.unet), ("text", self.text)):
            start = f"{prefix}.{part}."
            module.load_state_dict({k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)})


def train_painter(
    latents: Tensor,
    pictures: Pictures,
    tokenizer: CLIPTokenizer,
    state: Path,
    settings: TrainSettings,
    device: torch.device,
    report: Report,
    grounded: bool = False,
    start: Painter | None = None,
) -> Painter:
    """Predict epsilon from noised latents and captions, min-SNR weighted (arXiv 2303.09556).

    `grounded` adds the grounding loss and goes on from `start`. Returns the averages.
    """
    steps = settings.grounded_steps if grounded else settings.unet_steps
    name = "grounded" if grounded else "painter"
    peak = settings.unet_rate / 3 if grounded else settings.unet_rate
    torch.manual_seed(settings.seed)
    live = start or Painter(demo.build_unet(), demo.build_text_encoder(tokenizer))
    live.unet.to(device).train()
    live.text.to(device).train()
    average = deepcopy(live)
    optimiser = _optimiser(live.parameters(), peak)
    done = _resume(state / f"{name}.safetensors", live, average, optimiser)

    processors = {
        key: GroundedProcessor() if grounded and "attn2" in key else AttnProcessor()
        for key in live.unet.attn_processors
    }
    live.unet.set_attn_processor(processors)
    kept = [p for p in processors.values() if isinstance(p, GroundedProcessor)]
    ids = demo.token_ids(tokenizer, [s.caption for s in pictures.scenes] + [""])
    alphas = demo.build_scheduler().alphas_cumprod.to(device)

    def loss_of(z: Tensor, noise: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        signal = alphas[t].view(-1, 1, 1, 1)
        with _autocast(device):
            states = live.text(text).last_hidden_state
            predicted = live.unet(signal.sqrt() * z + (1 - signal).sqrt() * noise, t, states).sample
        weight = (5 / (signal / (1 - signal))).clamp(max=1)
        error = (predicted.float() - noise) ** 2
        return (weight * error).mean(), error.mean(), [p.map for p in kept if p.map is not None]

    loss_of = _compiled(loss_of, settings)
    columns = torch.stack([word_columns(tokenizer, s) for s in pictures.scenes]) if grounded else None
    seen = 0.0
    for step in range(done, steps):
        chosen, generator = _batch(settings.seed + (4 if grounded else 3), step, settings.unet_batch, len(latents))
        z = latents[chosen].to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        t = torch.randint(1000, (len(z),), generator=generator)
        blind = torch.rand(len(z), generator=generator) < settings.text_dropout
        text = torch.where(blind[:, None], ids[-1], ids[chosen]).to(device)
        _set_rate(optimiser, peak * _rate(step, steps, tail=0.8 if grounded else 0.3))
        loss, error, maps = loss_of(z, noise, t.to(device), text)
        if columns is not None:
            where = columns[chosen] & ~blind[:, None, None]
            masks = pictures.masks[chosen].to(device).float() / 255
            loss = loss + settings.grounding * grounding_loss(maps, where.to(device), masks)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(settings.average, (step + 1) / (step + 10)) if not grounded else settings.average
            torch._foreach_lerp_([p.data for p in average.parameters()], [p.data for p in live.parameters()], 1 - decay)
        seen = error.item() if step == done else 0.98 * seen + 0.02 * error.item()
        if step % 100 == 99:
            report(f"{name} {step + 1}/{steps}: error {seen:.4f}")
        if (step + 1) % settings.save_every == 0 or step + 1 == steps:
            _save_state(state / f"{name}.safetensors", live, average, optimiser, step + 1)
    average.unet.eval()
    average.text.eval()
    return average


def _save_state(path: Path, live: Painter, average: Painter, optimiser: torch.optim.Optimizer, step: int) -> None:
    tensors = {**live.tensors("live"), **average.tensors("average")}
    for i, parameter in enumerate(live.parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"adam.{i}.{key}"] = optimiser.state[parameter][key]
    temporary = path.with_suffix(".partial")
    save_file({k: v.detach().cpu() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def _resume(path: Path, live: Painter, average: Painter, optimiser: torch.optim.Optimizer) -> int:
    """Load a saved state; the number of steps done."""
    if not path.exists():
        return 0
    tensors, step = load_file(path), _saved_step(path)
    live.load(tensors, "live")
    average.load(tensors, "average")
    for i, parameter in enumerate(live.parameters()):
        optimiser.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{k: tensors[f"adam.{i}.{k}"].to(parameter.device) for k in ("exp_avg", "exp_avg_sq")},
        }
    return step


def _saved_step(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


# --- the whole ------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    vae: AutoencoderKL,
    painter: Painter,
    judge: demo.SceneClassifier,
) -> None:
    """Write diffusers' folder layout in fp16, with the judge beside it."""
    for module, name in ((vae, "vae"), (painter.unet, "unet"), (painter.text, "text_encoder")):
        deepcopy(module).cpu().half().save_pretrained(folder / name, safe_serialization=True)
    demo.build_tokenizer(folder / "tokenizer")
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
    (folder / "judge").mkdir(exist_ok=True)
    save_file({k: v.half().cpu() for k, v in judge.state_dict().items()}, folder / "judge" / "model.safetensors")


def train(folder: Path, state: Path, settings: TrainSettings, device: torch.device, report: Report = print) -> None:
    """Every stage in turn; the checkpoint lands in `folder`, what a resume needs in `state`."""
    state.mkdir(parents=True, exist_ok=True)
    tokenizer = demo.build_tokenizer(state / "tokenizer")
    report(f"drawing {settings.images} pictures")
    pictures = Pictures.drawn(settings.seed, settings.images)

    vae = _cached(
        state / "vae.safetensors", demo.build_vae(), lambda: train_vae(pictures, settings, device, report)
    ).to(device)

    def judge_stage() -> demo.SceneClassifier:
        single = Pictures.drawn(settings.seed + 1, settings.images // 2, things=1)
        return train_classifier(single, settings, device, report)

    judge = _cached(state / "judge.safetensors", demo.SceneClassifier(), judge_stage).to(device)
    latents = _cached_latents(state / "latents.safetensors", vae, pictures.frames)
    pictures.frames = pictures.frames[:0]  # 500 MB no longer needed
    arguments = (latents, pictures, tokenizer, state, settings, device, report)
    painter = train_painter(*arguments)
    save_checkpoint(folder, vae, painter, judge)
    if settings.grounded_steps:
        painter = train_painter(*arguments, grounded=True, start=painter)
        save_checkpoint(folder, vae, painter, judge)
    report(f"checkpoint written to {folder}")


def _cached_latents(path: Path, vae: AutoencoderKL, frames: Tensor) -> Tensor:
    if not path.exists():
        save_file({"latents": encode(vae, frames)}, path)
    return load_file(path)["latents"]


def _cached(path: Path, empty: M, make: Callable[[], M]) -> M:
    """The stage's module from the state folder, or made now and left there."""
    if path.exists():
        empty.load_state_dict(load_file(path))
        return empty.eval()
    made = make()
    save_file({k: v.contiguous().cpu() for k, v in made.state_dict().items()}, path)
    return made
