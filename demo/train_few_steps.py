"""Distil the demo's video transformer into a LoRA that samples in 4 to 8 steps without guidance.

The student's velocity at sigma is the teacher's mean guided velocity down to the next sigma of a schedule of 4 to 8
steps, so that guidance (arXiv 2210.03142) and steps (arXiv 2202.00512) are distilled at once. The inputs are noised
clips with their own captions, and with others, because an edit evaluates the source clip under the target prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from ..diffusion.ddim import guide
from ..files.whole import whole_file
from ..hosts.diffusers.wan import SmallWan
from ..models.wan import WAN, original_name
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, STYLES, TEXTURES, Scene
from .temporal import TemporalSettings, captions_of, render_latents
from .training import Plan, Report, train_weights
from .video_model import shifted

LENGTHS = (8, 8, 8, 16)
"""Possible clip lengths of a step, in frames, equally likely."""
STEPS = range(4, 9)
"""Numbers of sampling steps that the LoRA is for."""


@dataclass(frozen=True)
class FewStepsSettings:
    """Training settings; the defaults produced the bundled LoRA."""

    seed: int = 0
    clips: int = 200
    steps: int = 700
    frames: int = 16
    """Total frames of a step's clips."""
    rank: int = 8
    guidance: float = 5.0
    """Guidance of the teacher."""
    rate: float = 3e-3
    average: float = 0.99
    save_every: int = 25


# --- the data -------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noised clips (clips, 4, frames, 16, 16), their sigmas and the next ones (clips,), and captions."""

    noised: Tensor
    sigmas: Tensor
    next: Tensor
    captions: list[str]


def batch_at(latents: Tensor, captions: list[str], step: int, settings: FewStepsSettings) -> Batch:
    """The batch of a step, which depends only on the seed and the step."""
    seed = settings.seed * 10_000_019 + step
    random, words = torch.Generator().manual_seed(seed), Random(seed)
    length = words.choice(LENGTHS)
    count = settings.frames // length
    chosen = [words.randrange(len(latents)) for _ in range(count)]
    first = [words.randrange(latents.shape[1] - length + 1) for _ in range(count)]
    clips = torch.stack([latents[c, f : f + length] for c, f in zip(chosen, first, strict=True)])
    clips = clips.float().transpose(1, 2)
    of = [words.choice(STEPS) for _ in range(count)]
    left = [words.randint(1, steps) for steps in of]
    sigmas, after = (
        shifted(torch.tensor([(at - by) / steps for at, steps in zip(left, of, strict=True)])) for by in (0, 1)
    )
    s = _by_clip(sigmas)
    noised = (1 - s) * clips + s * torch.randn(clips.shape, generator=random)
    return Batch(noised, sigmas, after, [_prompt(captions, c, words) for c in chosen])


def _by_clip(sigmas: Tensor) -> Tensor:
    return sigmas.view(-1, 1, 1, 1, 1)


def _power(x: Tensor) -> Tensor:
    """The mean square of each clip."""
    return x.square().mean((1, 2, 3, 4))


def _prompt(captions: list[str], clip: int, random: Random) -> str:
    """A clip's caption, one with a word changed, another clip's, or none."""
    kind = random.choices(("own", "changed", "other", "none"), (0.4, 0.4, 0.1, 0.1))[0]
    if kind == "changed":
        scene = Scene.parse(captions[clip])
        changed = (_changed(scene, random) for _ in iter(int, 1))
        return next(other for other in changed if not other.held_out and other != scene).caption
    return {"own": captions[clip], "other": random.choice(captions), "none": ""}[kind]


def _changed(scene: Scene, random: Random) -> Scene:
    words = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES}
    picture = {"background": tuple(BACKGROUNDS), "style": tuple(STYLES)}
    word = random.choice([*words, *picture])
    if word in words:
        return scene.with_thing(random.randrange(len(scene.things)), **{word: random.choice(words[word])})
    return Scene(
        scene.things, **{"background": scene.background, "style": scene.style, word: random.choice(picture[word])}
    )


# --- the model ------------------------------------------------------------------------


def new_lora(transformer: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """Factors `down` and `up` of the change of each linear layer in the blocks; no change at first."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in transformer.named_modules():
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            down, up = torch.empty(rank, layer.in_features), torch.zeros(layer.out_features, rank)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            found |= {f"{name}.down": nn.Parameter(down), f"{name}.up": nn.Parameter(up)}
    return found


def changed_weights(transformer: nn.Module, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the layers with their change: W + up down."""
    names = [name.removesuffix(".up") for name in lora if name.endswith(".up")]
    weight = transformer.get_parameter
    return {f"{n}.weight": weight(f"{n}.weight") + lora[f"{n}.up"] @ lora[f"{n}.down"] for n in names}


def save_lora(path: Path, lora: Mapping[str, Tensor], settings: FewStepsSettings) -> None:
    """Write the LoRA in fp16, with the names of Wan's own code, and its use in the metadata."""
    tensors = {}
    for name, factor in lora.items():
        layer, _, kind = name.rpartition(".")
        key = f"diffusion_model.{original_name(layer)}"
        tensors[f"{key}.lora_{kind}.weight"] = factor.detach().cpu().half().contiguous()
    about = {
        "base_model": WAN.demo,
        "network_alpha": str(settings.rank),
        "guidance": "1",
        "steps": json.dumps([*STEPS]),
    }
    with whole_file(path) as partial:
        save_file(tensors, partial, about)


# --- the training ---------------------------------------------------------------------


def train_few_steps(
    output: Path, state: Path, settings: FewStepsSettings, device: torch.device, report: Report = print
) -> None:
    """Train the LoRA and write its running average to `output`; resumes from the state folder."""
    state.mkdir(parents=True, exist_ok=True)
    model = SmallWan.of_folder(WAN.demo_folder, device)
    data, clips_file = TemporalSettings(clips=settings.clips), state / "clips.safetensors"
    if not clips_file.exists():
        save_file({"latents": render_latents(model.vae, data, report)}, clips_file)
    latents, captions = load_file(clips_file)["latents"], captions_of(data)

    torch.manual_seed(settings.seed)
    transformer = model.transformer
    lora = {name: nn.Parameter(factor.to(device)) for name, factor in new_lora(transformer, settings.rank).items()}

    def text_of(prompts: list[str]) -> Tensor:
        return torch.cat([model.encode_prompt(prompt, SIZE, SIZE).embeddings for prompt in prompts]).to(device)

    def velocity(z: Tensor, sigmas: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        inputs = (z, 1000 * sigmas, text)
        found: Tensor = functional_call(transformer, dict(weights), inputs, {"return_dict": False})[0]
        return found

    @torch.no_grad()
    def taught(z: Tensor, sigmas: Tensor, after: Tensor, text: Tensor) -> Tensor:
        """The mean guided velocity between two sigmas, by the midpoint method."""
        empty, middle = text_of([""]).expand_as(text), (sigmas + after) / 2

        def guided(z: Tensor, sigmas: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                both = velocity(torch.cat([z, z]), torch.cat([sigmas, sigmas]), torch.cat([empty, text]), {})
            negative, positive = both.float().chunk(2)
            return guide(negative, positive, settings.guidance)

        return guided(z + _by_clip(middle - sigmas) * guided(z, sigmas), middle)

    def error_of(step: int) -> Tensor:
        batch = batch_at(latents, captions, step, settings)
        z, sigmas, after = (x.to(device) for x in (batch.noised, batch.sigmas, batch.next))
        text = text_of(batch.captions)
        own, target = velocity(z, sigmas, text, changed_weights(transformer, lora)), taught(z, sigmas, after, text)
        error = (_power(own - target) / _power(target)).mean()
        error.backward()
        return error

    plan = Plan(
        "few-step LoRA", state / "few_steps.safetensors", settings.steps, settings.rate, settings.average,
        settings.save_every, report_every=25,
    )  # fmt: skip
    train_weights(lora, plan, error_of, report)
    save_lora(output, lora, settings)
    report(f"few-step LoRA written to {output}")
