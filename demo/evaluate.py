"""The figures of the model card: the demo checkpoint on held-out scenes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, pairwise
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.prompt import PromptEdit
from ..diffusion.ddim import ddim_move, guide
from ..diffusion.edit import edit
from ..diffusion.generate import generate
from ..diffusion.invert import invert
from ..diffusion.source import source_heat
from ..hosts.diffusers.checkpoint import Checkpoint
from ..hosts.diffusers.model import Model
from ..metrics.preservation import intersection_over_union, psnr
from ..metrics.temporal import warp_error
from ..video.flow import Estimator, flow_estimator
from ..video.motion import visible
from .judge import close_up
from .model import SceneClassifier, labels
from .scenes import SIZE, random_motion, random_scene, render, scenes


def judge_accuracy(judge: SceneClassifier, count: int = 1000, seed: int = 77) -> float:
    """Share of new rendered scenes of one thing whose words the judge all reads correctly."""
    random = Random(seed)
    sampled = [random_scene(random, things=1) for _ in range(count)]
    frames = torch.cat([render(scene, random_motion(random), frames=1).frames for scene in sampled])
    return sum(words == labels(scene) for words, scene in zip(judge.read(frames), sampled, strict=True)) / count


def close_up_accuracy(
    judge: SceneClassifier, coder: Checkpoint | None = None, count: int = 200, seed: int = 78
) -> float:
    """Share of things, two per scene, whose colour, shape and texture the judge reads correctly in a close-up.

    Newly rendered, and with a `coder` passed through its autoencoder.
    """
    random = Random(seed)
    right = []
    for scene in (random_scene(random, things=2) for _ in range(count)):
        motion = random_motion(random, 2)
        frames = render(scene, motion, frames=1).frames
        if coder is not None:
            frames = coder.decode_latents(coder.encode_frames(frames)).cpu()
        for thing, track in zip(scene.things, motion.tracks, strict=True):
            (read,) = judge.read(close_up(frames, track))
            right.append((read["colour"], read["shape"], read["texture"]) == (thing.colour, thing.shape, thing.texture))
    return sum(right) / len(right)


@torch.no_grad()
def paint(checkpoint: Checkpoint, captions: list[str], steps: int = 30, guidance: float = 5.0, seed: int = 0) -> Tensor:
    """Generate pictures from captions with DDIM: (n, 3, 64, 64) in 0..1."""
    schedule = checkpoint.denoiser.schedule(steps)
    generator = torch.Generator().manual_seed(seed)
    side = SIZE // checkpoint.factor
    z = torch.randn(len(captions), 4, side, side, generator=generator).to(checkpoint.unet.device)
    text = torch.cat([checkpoint.encode_prompt(c, SIZE, SIZE).embeddings for c in captions])
    empty = checkpoint.encode_prompt("", SIZE, SIZE).embeddings.expand_as(text)
    for i, timestep in enumerate(schedule.timesteps):
        both = checkpoint.unet(torch.cat([z, z]), timestep, torch.cat([empty, text])).sample
        negative, positive = both.chunk(2)
        noise = guide(negative, positive, guidance)
        z = ddim_move(z, noise, schedule.alphas[-1 - i], schedule.alphas[-2 - i])
    return checkpoint.decode_latents(z)


def painting_accuracy(
    checkpoint: Checkpoint, judge: SceneClassifier, count: int = 200, batch: int = 50
) -> dict[str, float]:
    """Share of held-out captions of one thing whose generated picture the judge reads correctly, by head."""
    chosen = [scene for scene, _ in islice(scenes(123, held_out=True, things=1), count)]
    frames = torch.cat(
        [paint(checkpoint, [s.caption for s in chosen[at : at + batch]], seed=at) for at in range(0, count, batch)]
    )
    words = judge.read(frames)
    return {
        head: sum(s[head] == labels(scene)[head] for s, scene in zip(words, chosen, strict=True)) / count
        for head in judge.HEADS
    }


def replay_psnr(checkpoint: Model, clips: int = 6, steps: int = 50) -> tuple[float, float]:
    """PSNR in dB to the source, of the autoencoder's round trip and of inversion and replay at guidance 1."""
    sources, coded, replayed = [], [], []
    for scene, motion in islice(scenes(321, held_out=True), clips):
        frames = render(scene, motion, 8).frames
        latents = checkpoint.encode_clip(frames)
        text = checkpoint.encode_prompt(scene.caption, SIZE, SIZE)
        inversion = invert(checkpoint.denoiser, latents, text, steps)
        sources.append(frames)
        coded.append(checkpoint.decode_clip(latents, len(frames)))
        replay = edit(checkpoint.denoiser, inversion, text, guidance_scale=1)
        replayed.append(checkpoint.decode_clip(replay, len(frames)))
    source = torch.cat(sources)
    return psnr(torch.cat(coded), source), psnr(torch.cat(replayed), source)


def map_overlap(checkpoint: Checkpoint, clips: int = 12, steps: int = 20) -> tuple[float, float]:
    """Mean IoU of the object word's cross-attention with the true mask, and the best threshold.

    Maps of the noun on the finest grid, averaged over heads, layers and every fourth step of the inversion, each frame
    divided by its maximum. The true mask is the cells that the object covers by more than half.
    """
    heats, truths = [], []
    for scene, motion in islice(scenes(231, held_out=True, things=1), clips):
        clip = render(scene, motion, 4)
        text = checkpoint.encode_prompt(scene.caption, SIZE, SIZE)
        inversion = invert(checkpoint.denoiser, checkpoint.encode_frames(clip.frames), text, steps)
        prompt = PromptEdit(
            scene.caption, scene.caption, checkpoint.tokenizer, blend_words=([scene.things[0].shape], [])
        )
        heat = torch.stack(
            [source_heat(checkpoint.denoiser, inversion, prompt, step) for step in range(2, steps, 4)]
        ).mean(0)
        heats.append(heat / heat.amax((1, 2), keepdim=True))
        truths.append(F.adaptive_avg_pool2d(clip.mask, (heat.shape[1], heat.shape[2])) > 0.5)
    heat, truth = torch.cat(heats).cpu(), torch.cat(truths)
    scores = [
        (sum(intersection_over_union(h > t, m) for h, m in zip(heat, truth, strict=True)) / len(heat), t)
        for t in (n / 20 for n in range(1, 20))
    ]
    return max(scores)


def moving_figures(
    checkpoint: Model, judge: SceneClassifier, clips: int = 24, frames: int = 16, steps: int = 30, guidance: float = 5.0
) -> dict[str, float]:
    """Figures of clips generated from held-out captions: correct words by kind and in total, warp error, motion.

    The warp error (x 1000) uses DIS's flow of the clip itself; figures `rendered` are those of rendered clips.
    """
    _, estimate = flow_estimator("dis")
    sampled, side = list(islice(scenes(456, held_out=True, things=1), clips)), SIZE // checkpoint.factor
    rows = []
    for n, (scene, _) in enumerate(sampled):
        noise = torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(n))
        text, empty = (checkpoint.encode_prompt(words, SIZE, SIZE) for words in (scene.caption, ""))
        latents = generate(checkpoint.denoiser, noise, text, empty, steps, guidance)
        made = checkpoint.decode_clip(latents, frames)
        motion = random_motion(Random(n), 1, frames)
        right = torch.tensor([[s[head] == labels(scene)[head] for head in judge.HEADS] for s in judge.read(made)])
        shares = (*right.float().mean(0).tolist(), right.all(1).float().mean().item())
        rows.append((*shares, *_moves(made, estimate), *_moves(render(scene, motion, frames).frames, estimate)))
    kinds = tuple(f"frames whose {head} is right" for head in judge.HEADS)
    names = (
        *kinds,
        "frames wholly right",
        "warp",
        "pixels moved a frame",
        "warp, rendered",
        "pixels moved a frame, rendered",
    )
    return dict(zip(names, torch.tensor(rows).mean(0).tolist(), strict=True))


def _moves(frames: Tensor, estimate: Estimator) -> tuple[float, float]:
    """The warp error (x 1000) along a clip's own flow, and the flow's mean length in pixels."""
    pairs = list(pairwise(frames))
    forward, backward = (torch.stack([estimate(*p) for p in some]) for some in (pairs, [(b, a) for a, b in pairs]))
    return 1000 * warp_error(frames, forward, visible(forward, backward)), forward.norm(dim=1).mean().item()


def evaluate(checkpoint: Checkpoint, judge: SceneClassifier, report: Callable[[str], None] = print) -> dict[str, float]:
    """All figures of the model card."""
    figures = {"judge right on rendered scenes": judge_accuracy(judge)}
    figures["judge right on two things from close"] = close_up_accuracy(judge)
    figures["the same through the autoencoder"] = close_up_accuracy(judge, checkpoint)
    figures |= {f"{head} right on held-out captions": v for head, v in painting_accuracy(checkpoint, judge).items()}
    figures["autoencoder dB"], figures["inversion and replay dB"] = replay_psnr(checkpoint)
    figures["cross-attention IoU"], figures["at threshold"] = map_overlap(checkpoint)
    for name, value in figures.items():
        report(f"{name}: {value:.3f}")
    return figures
