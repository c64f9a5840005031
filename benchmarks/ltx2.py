"""The cost of an edit on LTX-2 relative to plain guided sampling, with the shapes of LTX-2.

Plain sampling calls diffusers' transformer once per prompt, with video and sound isolated. Memory is the size of live
tensors on torch's meta device: 121 frames of 1280x704, 14,080 tokens of the video. Times are those of a narrow
transformer of a few blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import (
    attend_without_data,
    edit_steps,
    machine,
    random_model,
    side_by_side,
    table,
    weight_bytes,
    write_section,
)
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline, LTX2VideoTransformer3DModel
from torch import Tensor

from fatezero import FusionSettings, PromptEdit, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk
from fatezero.attention.prompt import Alignment
from fatezero.files.safetensors import format_bytes
from fatezero.hosts.diffusers.ltx2 import Ltx2
from fatezero.hosts.diffusers.memory import LiveBytes
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.methods.fatezero_branch import Fuser, StepPlan
from fatezero.models.ltx import TEXT_TOKENS, Words
from fatezero.store.records import SourceStep

FULL = (16, 128, 22, 40)
"""The latents of 121 frames of 1280x704."""
NAMES = {
    "plain": "plain guided sampling, diffusers' own model",
    "beside": "edit, the source beside, block by block",
    "before": "edit, the source before, its queries and keys kept",
}


NARROW = {
    "num_attention_heads": 4, "cross_attention_dim": 512, "audio_num_attention_heads": 4,
    "audio_cross_attention_dim": 256, "caption_channels": 480, "num_layers": 3,
}  # fmt: skip
"""A transformer of an eighth of LTX-2's width."""
SMALL = (5, 128, 12, 20)


def random_ltx2(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, **options: object) -> Ltx2:
    """A random LTX-2 for a clip. options: of the transformer."""
    network = random_model(lambda: LTX2VideoTransformer3DModel(**options), device, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = SimpleNamespace(spatial_compression_ratio=32, temporal_compression_ratio=8)
    model = Ltx2("LTX-2", vae, scheduler, device, (), (), network, pipeline=LTX2Pipeline)
    return model.for_clip(ClipFacts(shape, 24.0))


def meta_model(**options: object) -> Ltx2:
    """LTX-2 without data, for a clip of full size."""
    return random_ltx2(FULL, torch.device("meta"), torch.bfloat16, **options)


def time_ratio(steps: int, rounds: int) -> float:
    """The time of an edit that fuses all attention, relative to plain guided sampling."""
    device, dtype = torch.device("cpu"), torch.float32
    model, random = random_ltx2(SMALL, device, dtype, **NARROW), torch.Generator().manual_seed(1)
    z = torch.randn(SMALL, generator=random)
    ones = torch.ones(1, TEXT_TOKENS)

    def text() -> Condition:
        words, sound = (torch.randn(1, TEXT_TOKENS, NARROW["caption_channels"], generator=random) for _ in range(2))
        return Condition(words, {"sound": sound, "mask": ones})

    source, target, negative = text(), text(), text()
    inversion = invert(model.denoiser, z, source, steps)
    prompt = PromptEdit("a red square on water", "a blue star on water", Words(lambda words: list(words.encode())))
    fusion = FusionSettings(1.0, 1.0)
    works = {
        "plain": lambda: edit(model.denoiser, inversion, target, negative, 5.0),
        "fused": lambda: edit(model.denoiser, inversion, target, negative, 5.0, prompt, fusion),
    }
    taken = side_by_side(works, device, rounds)
    return float(taken["fused"].of(taken["plain"]))


def guided_steps(model: Ltx2, z: Tensor, text: Condition) -> dict[str, Callable[[], None]]:
    """A step with guidance: plain, and as an edit."""
    tokens, plan = text.text_tokens, StepPlan(True, True, False, False)
    alignment = Alignment(*(torch.empty(shape, device="meta") for shape in ((tokens, tokens), (tokens,), (tokens,))))

    @torch.no_grad()
    def plain() -> None:
        for _ in range(2):
            model.velocity(z, 500.0, text.to(z), Chunk.whole(len(z)).frame_indices)

    def fused(source: SourceStep) -> Control:
        return Fuser(source, alignment.to(z), FusionSettings(), plan)

    return {"plain": plain} | edit_steps(model.denoiser, z, text, fused)


def peaks(model: Ltx2) -> dict[str, int]:
    """The most bytes of live tensors in each kind of step, without weights."""
    channels = model.transformer.config["caption_channels"]
    z = torch.empty(model.facts.shape, device="meta", dtype=torch.bfloat16)
    words, sound = (torch.empty(1, TEXT_TOKENS, channels, device="meta", dtype=torch.bfloat16) for _ in range(2))
    text, found = Condition(words, {"sound": sound, "mask": torch.ones(1, TEXT_TOKENS)}), {}
    for name in NAMES:
        with attend_without_data(), LiveBytes(model.transformer) as live:
            guided_steps(model, z, text)[name]()
        found[name] = live.most
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ratio, model = time_ratio(given.steps, given.rounds), meta_model()
    weights, found = weight_bytes(model.transformer), peaks(model)
    rows = [
        [shown, format_bytes(found[name]), format_bytes(weights + found[name]),
         f"{(weights + found[name]) / (weights + found['plain']):.3f}"]
        for name, shown in NAMES.items()
    ]  # fmt: skip
    tokens = SMALL[0] * SMALL[2] * SMALL[3]
    text = (
        f"{machine(torch.device('cpu'), torch.float32)}. {NARROW['num_layers']} blocks of an eighth of LTX-2's width, "
        f"{tokens} tokens of the video, {given.steps} steps with guidance, median of {given.rounds} rounds: an edit "
        f"that fuses all attention in all steps takes {ratio:.2f} of plain sampling's time. The source's branch is a "
        "third call.\n\n"
        "Bytes alive in a guided step of the whole LTX-2 in bfloat16, 121 frames of 1280x704, from shapes:\n\n"
        f"{table(['work', 'activations', 'with weights', 'of plain'], rows)}"
    )
    write_section("LTX-2: cpu, float32", text)


if __name__ == "__main__":
    main()
