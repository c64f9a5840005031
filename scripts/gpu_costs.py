"""Time and memory of edits relative to plain guided sampling, of attention kernels, and of compiled models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_checks import relative
from gpu_machine import Clip, Machine, Measured, UnavailableError, Units, unet_clip, wan_clip
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fatezero import (
    FlowSmoothing,
    FusionSettings,
    PnPSettings,
    PromptEdit,
    StoreSettings,
    TokenFlowSettings,
    draw,
    edit,
    invert,
)
from fatezero.attention.condition import Condition
from fatezero.attention.control import attention
from fatezero.benchmarks.common import flops_of_call, guided_steps, matrix_rate, prompt_pair, side_by_side, timed
from fatezero.demo.video_model import build_tokenizer
from fatezero.hosts.diffusers.unet import xformers_attention
from fatezero.recipes.cost import Calls
from fatezero.recipes.recipe import Recipe
from fatezero.video.motion import Motion

STEPS = 50
"""Steps that times are extrapolated to."""
GB = 1e9

# --- an edit relative to plain sampling -----------------------------------------------------

COST: Units = {
    "time": "s",
    "of plain": "x",
    "of plain, 50 steps": "x",
    "with its inversion, 50 steps": "x",
    "beyond the model": "GB",
    "plain, beyond the model": "GB",
    "memory of plain": "x",
}


def cost(
    at: Machine,
    clip: Clip,
    inverted: Callable[[], Any],
    edited: Callable[[Any], Any],
    calls: Callable[[int], Calls],
) -> Measured:
    """An edit with an existing store; calls: of the model, by steps."""
    inversion = inverted()
    works = {"plain": clip.plain, "inversion": inverted, "edit": lambda: edited(inversion)}
    taken = side_by_side(works, at.device, at.rounds, at.seconds)
    plain, own = taken["plain"], taken["edit"]
    few, many = calls(clip.steps), calls(STEPS)
    scaled = own.of(plain) * (many.edit + many.source) / (few.edit + few.source) * clip.steps / STEPS
    beyond = own.bytes + bytes_on_device(at, inversion)
    return Measured(
        {
            "time": own.median,
            "of plain": own.of(plain),
            "of plain, 50 steps": scaled,
            "with its inversion, 50 steps": scaled + (taken["inversion"].of(plain) if many.invert else 0),
            "beyond the model": beyond / GB,
            "plain, beyond the model": plain.bytes / GB,
            "memory of plain": (clip.weights + beyond) / (clip.weights + plain.bytes),
        },
        clip.shape,
        clip.denoiser.dtype,
        f"{clip.steps} steps, scaled to {STEPS} by calls of the model",
    )


def bytes_on_device(at: Machine, inversion: Any) -> int:
    """Bytes of an inversion's store on the device."""
    plan = inversion.store.plan
    away = plan is not None and plan.place != "device" and at.cuda
    return 0 if away else inversion.store.nbytes


def unet_edit(
    at: Machine,
    fusion: Any,
    prompt: PromptEdit | None = None,
    guidance: float = 7.5,
    keys: str | tuple[str, ...] = ("self", "middle"),
    memory: str = "recompute",
    propagation: TokenFlowSettings | None = None,
    smoothed: bool = False,
    of: Clip | None = None,
    **more: Any,
) -> Measured:
    """An edit on a UNet; more: arguments of `unet_clip`."""
    clip = of or unet_clip(at, **more)
    frames = len(clip.latents)
    settings = StoreSettings(memory, max_tokens=1024)
    smoothing = FlowSmoothing(0.8, random_motion(clip.latents)) if smoothed else None

    def calls(steps: int) -> Calls:
        kept = settings.kept_steps(steps) if memory != "recompute" else 0
        recipe = Recipe(injection=fusion, propagation=propagation, guidance_scale=guidance)
        return recipe.calls(steps, kept, frames)

    def edited(inversion: Any) -> Tensor:
        return edit(
            clip.denoiser, inversion, clip.target, clip.negative, guidance, prompt, fusion, propagation=propagation,
            smoothing=smoothing,
        )  # fmt: skip

    def inverted() -> Any:
        return invert(clip.denoiser, clip.latents, clip.source, clip.steps, keys, memory=settings)

    return cost(at, clip, inverted, edited, calls)


def random_motion(latents: Tensor) -> Motion:
    """A motion of a few cells, on the latents' grid."""
    frames, _, height, width = latents.shape
    random = torch.Generator().manual_seed(2)
    flows = [2 * torch.randn(frames - 1, 2, height, width, generator=random) for _ in range(2)]
    visible = torch.ones(frames - 1, height, width)
    return Motion(*(t.to(latents.device) for t in (*flows, visible, visible)))


def of_preset(preset: str, max_tokens: int | None) -> tuple[FusionSettings, float]:
    """A preset's fusion and guidance."""
    recipe = Recipe.of_preset(preset)
    return replace(recipe.injection, max_tokens=max_tokens), recipe.guidance_scale


def unet_preset(at: Machine, preset: str, **more: Any) -> Measured:
    """FateZero's presets on a UNet."""
    fusion, guidance = of_preset(preset, 1024)
    return unet_edit(at, fusion, prompt_pair(not preset.startswith("style")), guidance, **more)


def unet_pnp(at: Machine) -> Measured:
    return unet_edit(at, PnPSettings(), keys="self")


def unet_tokenflow(at: Machine) -> Measured:
    batch = 2 if at.tiny else 8
    return unet_edit(at, PnPSettings(), keys="self", propagation=TokenFlowSettings(batch), frames=16)


def unet_xformers(at: Machine) -> Measured:
    clip = unet_clip(at)
    try:
        clip.denoiser.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        raise UnavailableError("xformers is not installed, or finds no GPU") from error
    return unet_preset(at, "style", of=clip)


WORDS = ("a red square on water", "a blue star on water")


def wan_prompt() -> PromptEdit:
    return PromptEdit(*WORDS, build_tokenizer(), "refine", (["square"], ["star"]))


def wan_preset(at: Machine, preset: str, memory: str = "recompute", **more: Any) -> Measured:
    """FateZero's presets on a video transformer; more: arguments of `wan_clip`."""
    clip = wan_clip(at, **more)
    (fusion, guidance), prompt = of_preset(preset, None), wan_prompt()

    def calls(steps: int) -> Calls:
        kept = 0 if memory == "recompute" else steps
        return Recipe(injection=fusion, guidance_scale=guidance).calls(steps, kept, spans_clip=True)

    return cost(
        at,
        clip,
        lambda: invert(clip.denoiser, clip.latents, clip.source, clip.steps, memory=memory),
        lambda of: edit(clip.denoiser, of, clip.target, clip.negative, guidance, prompt, fusion),
        calls,
    )


def wan_flow_edit(at: Machine, **more: Any) -> Measured:
    clip = wan_clip(at, **more)
    recipe = Recipe.of_preset("flow_edit")
    guidance, strength, settings = recipe.guidance_scale, recipe.strength, recipe.noise
    return cost(
        at,
        clip,
        lambda: draw(clip.denoiser, clip.latents, clip.source, clip.steps, settings),
        lambda of: edit(clip.denoiser, of, clip.target, clip.negative, guidance, strength=strength),
        lambda steps: recipe.calls(steps, spans_clip=True),
    )


# --- stores -----------------------------------------------------------------------------------

STORE: Units = {
    "inversion": "s",
    "of plain inversion": "x",
    "edit": "s",
    "of plain sampling": "x",
    "store": "GB",
    "store of 50 steps": "GB",
    "beyond the model": "GB",
}


def store(at: Machine, memory: str, place: str = "auto", keys: tuple[str, ...] = ("self", "middle")) -> Measured:
    """SD 1.5's inversion with a memory, and a style edit from it."""
    clip, (fusion, guidance), prompt = unet_clip(at), of_preset("style", 1024), prompt_pair(False)
    settings = StoreSettings(memory, place, max_tokens=1024)  # type: ignore[arg-type]

    def inverted() -> Any:
        return invert(clip.denoiser, clip.latents, clip.source, clip.steps, keys, memory=settings)

    inversion = inverted()
    assert clip.plain_inversion is not None
    works = {
        "plain inversion": clip.plain_inversion,
        "inversion": inverted,
        "plain": clip.plain,
        "edit": lambda: edit(clip.denoiser, inversion, clip.target, clip.negative, guidance, prompt, fusion),
    }
    taken = side_by_side(works, at.device, at.rounds, at.seconds)
    kept = inversion.store
    by_step = 0 if kept.backend is None else kept.backend.nbytes / clip.steps
    return Measured(
        {
            "inversion": taken["inversion"].median,
            "of plain inversion": taken["inversion"].of(taken["plain inversion"]),
            "edit": taken["edit"].median,
            "of plain sampling": taken["edit"].of(taken["plain"]),
            "store": kept.nbytes / GB,
            "store of 50 steps": (kept.levels.nbytes / (clip.steps + 1) * (STEPS + 1) + by_step * STEPS) / GB,
            "beyond the model": (taken["edit"].bytes + bytes_on_device(at, inversion)) / GB,
        },
        f"{clip.shape}, key frames {'+'.join(keys)}, store {'' if kept.plan is None else kept.plan.place}",
        clip.denoiser.dtype,
        f"{clip.steps} of {STEPS} steps",
    )


RATE: Units = {
    "inversion": "s",
    "sampling": "s",
    "matrix products": "TFLOP/s",
    "of that rate": "x",
    "sampling, beyond the model": "GB",
}


def plain(at: Machine) -> Measured:
    """Plain DDIM, and its share of the matrix product rate."""
    clip = unet_clip(at)
    assert clip.plain_inversion is not None
    works = {"inversion": clip.plain_inversion, "sampling": clip.plain}
    taken, dtype = side_by_side(works, at.device, at.rounds, at.seconds), clip.denoiser.dtype
    rate = matrix_rate(at.device, dtype, 256 if at.tiny else None)
    frames, size = len(clip.latents), 8 * clip.latents.shape[-1]
    flops = 2 * clip.steps * flops_of_call("tiny" if at.tiny else "sd15", frames, size)
    return Measured(
        {
            "inversion": taken["inversion"].median * STEPS / clip.steps,
            "sampling": taken["sampling"].median * STEPS / clip.steps,
            "matrix products": rate / 1e12,
            "of that rate": flops / taken["sampling"].median / rate,
            "sampling, beyond the model": taken["sampling"].bytes / GB,
        },
        clip.shape,
        dtype,
        f"{clip.steps} steps, scaled to {STEPS}",
    )


# --- one step of a video transformer --------------------------------------------------------

STEP: Units = {
    "plain": "s",
    "source beside": "s",
    "of plain": "x",
    "source before": "s",
    "plain, beyond the model": "GB",
    "source beside, beyond": "GB",
    "source before, beyond": "GB",
    "memory of plain, beside": "x",
    "memory of plain, before": "x",
}


def wan_step(at: Machine, **more: Any) -> Measured:
    """A guided step that fuses all attention, its source evaluated in the same call or before it."""
    clip = wan_clip(at, **more)
    fusion, prompt = of_preset("style", None)[0], wan_prompt()
    works = guided_steps(clip.denoiser, clip.latents, Condition(clip.source), prompt, fusion)
    taken = side_by_side(works, at.device, at.rounds, at.seconds)
    base, beside, before = (taken[name] for name in ("plain", "beside", "before"))
    whole = clip.weights + base.bytes
    return Measured(
        {
            "plain": base.median,
            "source beside": beside.median,
            "of plain": beside.of(base),
            "source before": before.median,
            "plain, beyond the model": base.bytes / GB,
            "source beside, beyond": beside.bytes / GB,
            "source before, beyond": before.bytes / GB,
            "memory of plain, beside": (clip.weights + beside.bytes) / whole,
            "memory of plain, before": (clip.weights + before.bytes) / whole,
        },
        clip.shape,
        clip.denoiser.dtype,
        "one step",
    )


# --- attention's kernels ---------------------------------------------------------------------

KERNEL: Units = {"time": "ms", "of torch's choice": "x", "difference": ""}
LAYERS: dict[str, tuple[str, tuple[int, int, int, int], int]] = {
    "SD 1.5": ("float16", (8, 8, 4096, 40), 2),
    "Wan 1.3B": ("bfloat16", (1, 12, 32760, 128), 1),
}
"""Precision, queries (frames, heads, tokens, channels), and key frames of a self-attention layer."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@torch.no_grad()
def kernel(at: Machine, layer: str, name: str) -> Measured:
    """A kernel compared with the one that torch chooses."""
    precision, (frames, heads, tokens, channels), key_frames = LAYERS[layer]
    dtype, times = at.half(precision), 1 if at.tiny else 10
    if at.tiny:
        frames, tokens = min(frames, 2), 64
    if name == "math":
        at.need(3 * 4 * frames * heads * tokens**2 * key_frames)
    q, k, v = (
        torch.randn(frames, heads, n * tokens, channels, device=at.device, dtype=dtype)
        for n in (1, key_frames, key_frames)
    )
    attend = xformers_attention if name == "xformers" else attention

    def own() -> Tensor:
        if name == "xformers":
            return attend(q, k, v)
        with sdpa_kernel([BACKENDS[name]]):
            return attend(q, k, v)

    def often(work: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                work()

        return run

    chosen = attention(q, k, v)
    try:
        difference = relative(own(), chosen)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = str(error).strip().partition("\n")[0]
        raise UnavailableError("xformers is not installed" if isinstance(error, ImportError) else why) from error
    works = {"chosen": often(lambda: attention(q, k, v)), "own": often(own)}
    taken = side_by_side(works, at.device, at.rounds, at.seconds)
    return Measured(
        {
            "time": 1e3 * taken["own"].median / times,
            "of torch's choice": taken["own"].of(taken["chosen"]),
            "difference": difference,
        },
        f"{frames} x {heads} heads, {tokens} queries, {key_frames * tokens} keys, {channels} channels",
        dtype,
    )


# --- torch.compile ---------------------------------------------------------------------------

COMPILED: Units = {"eager": "s", "compiled": "s", "of eager": "x", "first call": "s", "difference": ""}


def compiled(at: Machine, clips: Callable[[Machine], Clip], edits: bool) -> Measured:
    """Plain sampling, or an edit, with and without compiling a model's repeated blocks."""
    backend = "inductor" if at.cuda else "eager"  # on a CPU, check only the tracing
    eager, own = clips(at), clips(at)
    (own.denoiser.transformers[0] if own.spans_clip else own.denoiser.unet).compile_repeated_blocks(backend=backend)
    (fusion, guidance), prompt = of_preset("style", 1024), wan_prompt() if own.spans_clip else prompt_pair(False)

    def work(clip: Clip) -> Callable[[], Tensor]:
        if not edits:
            return clip.plain
        inversion = invert(clip.denoiser, clip.latents, clip.source, clip.steps)
        return lambda: edit(clip.denoiser, inversion, clip.target, clip.negative, guidance, prompt, fusion)

    as_it_is, made = work(eager), list[Tensor]()
    first = timed(lambda: made.append(work(own)()), at.device)
    taken = side_by_side({"eager": as_it_is, "compiled": work(own)}, at.device, at.rounds, at.seconds)
    return Measured(
        {
            "eager": taken["eager"].median,
            "compiled": taken["compiled"].median,
            "of eager": taken["compiled"].of(taken["eager"]),
            "first call": first,
            "difference": relative(made[0], as_it_is()),
        },
        f"{own.shape}, {backend}",
        own.denoiser.dtype,
        f"{own.steps} steps",
    )


def compiled_unet(at: Machine, edits: bool) -> Measured:
    return compiled(at, lambda at: unet_clip(at, steps=5), edits)


def compiled_wan(at: Machine, edits: bool) -> Measured:
    return compiled(at, lambda at: wan_clip(at, blocks=2, latents=(9, 60, 104), steps=3), edits)
