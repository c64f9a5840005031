"""Small real models and their inputs, shared by the tests."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from fatezero import FusionSettings, PromptEdit
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import KeyFrames
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.edit import EditPass
from fatezero.diffusion.invert import Inversion
from fatezero.diffusion.parts import Edit
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.store.store import AttentionStore

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = 16
"""Width of the small UNets' text."""


def small_unet(seed: int = 0, **options) -> UNet2DConditionModel:
    """A random UNet of SD's layout in float64: attention on the full and half grid, or as set by `options`."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **options}).double().eval().requires_grad_(False)


THREE_LEVELS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
"""Options for attention on the full, the half and the quarter grid."""


def random_latents(frames: int = 3, height: int = 16, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(frames, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_text(seed: int, columns: int = 77) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, columns, TEXT, dtype=torch.float64, generator=generator)


def reference_denoiser() -> DiffusersDenoiser:
    """The UNet of the reference results, in float64, with weights drawn as theirs were."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    random = torch.Generator().manual_seed(11)
    for name, weight in unet.named_parameters():
        module = unet.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.GroupNorm | nn.LayerNorm):  # norms stay at 1 and 0
            weight.data = _scale(name, weight) * torch.randn(weight.shape, generator=random)
        for shape in _temporal(name, module, len(weight)):
            torch.randn(shape, generator=random)
    return DiffusersDenoiser(unet.double().eval(), build_scheduler())


def _scale(name: str, weight: torch.Tensor) -> float:
    """The standard deviation of a weight of the reference UNet."""
    if weight.ndim == 1:
        return 0.02
    if name.endswith(("to_q.weight", "to_k.weight")):
        return 0.35
    return (0.25 if name == "conv_out.weight" else 1.0) * weight[0].numel() ** -0.5


def _temporal(name: str, module: nn.Module, channels: int) -> list[tuple[int, ...]]:
    """Shapes of the temporal weights drawn after a weight of the reference UNet, later set to the identity."""
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name.endswith("bias"):
        return [(4, channels, 3), (channels, 4, 3)]
    return [(channels, channels)] * 4 + [(channels,)] if name.endswith("attn2.to_out.0.bias") else []


def reference_video_unet() -> UNet3DConditionModel:
    """The UNet of the reference results of layout guidance, in single precision, with weights drawn as theirs were."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=32, block_out_channels=(16, 16, 32, 32), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    for weight in unet.parameters():
        if not weight.any():  # norms' biases and the last temporal convolutions, which would do nothing at zero
            weight.data = 0.02 * torch.randn(weight.shape)
    return unet.eval()


def reference_edit(source: str, case: dict[str, Any]) -> tuple[PromptEdit, FusionSettings]:
    """The prompts and fusion of one of FateZero's reference results, a case of `cases.json`."""
    prompt = PromptEdit(
        source,
        case["target"],
        CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer"),
        mode="replace" if case["replace"] else "refine",
        blend_words=tuple(case["blend"]) if "blend" in case else None,
        reweight=dict(zip(*case.get("eq", ([], [])), strict=True)),
    )
    fusion = FusionSettings(
        cross_replace_steps=case["cross"],
        self_replace_steps=case["self"],
        blend_self_attention="blend" in case and case.get("blend_self", True),
        blend_latents="authors" if case.get("blend_latents") else False,
        blend_threshold=case.get("th", [0.3])[0],
        max_tokens=1024,
    )
    return prompt, fusion


def reference_keys(case: dict[str, Any]) -> tuple[str | int, ...]:
    """The key frames of a reference result."""
    return tuple("middle" if entry == "mid" else entry for entry in case["kv"])


def levels_of(tensors: dict[str, torch.Tensor], name: str, steps: int) -> torch.Tensor:
    """A reference's latents at all levels, in float64; NaN for levels not in the file."""
    found = {level: tensors[f"{name}.{level}"].double() for level in range(steps + 1) if f"{name}.{level}" in tensors}
    missing = torch.full_like(next(iter(found.values())), torch.nan)
    return torch.stack([found.get(level, missing) for level in range(steps + 1)])


def reference_inversion(
    denoiser: DiffusersDenoiser,
    tensors: dict[str, torch.Tensor],
    source: torch.Tensor,
    steps: int,
    key_frames: tuple[str | int, ...],
    clip_norm: bool = False,
    prompt: str | None = None,
) -> Inversion:
    """The inversion of a reference result."""
    schedule = denoiser.schedule(steps)
    levels = levels_of(tensors, "inverted", steps)
    return Inversion(
        AttentionStore(
            memory="recompute",
            levels=levels,
            source=Condition(source),
            timesteps=schedule.timesteps,
            alphas=tuple(schedule.alphas.tolist()),
            key_frames=KeyFrames(key_frames),
            clip_norm=clip_norm,
            model=denoiser.identity(),
            prompt=prompt,
        )
    )


def stepped(
    denoiser: DiffusersDenoiser, inversion: Inversion, settings: Edit, step: int, before: torch.Tensor | None = None
) -> torch.Tensor:
    """The latents after one step of an edit. before: the latents before it; None at the start of the edit."""
    with EditPass(denoiser, inversion, [settings], in_order=False) as run:
        zs = run.start if before is None else [before.double()]
        return run.move(zs, step, run.predict(zs, step))[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def in_thread(work: Callable[[], Any]) -> Any:
    """A function's result or exception, run in another thread."""
    found: list[Any] = []

    def caught() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return found[0]


def forked(work: Callable[[], None]) -> int:
    """The exit status of a forked process that does the work; 1 if it fails. On one thread, as others are not
    copied."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
