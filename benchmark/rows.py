"""The methods of the benchmark: FateZero, its ablations, and alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import GivenMask
from ..demo.scenes import SIZE
from ..diffusion.ddim import ddim_move
from ..diffusion.denoiser import Guidance
from ..diffusion.edit import edit_many
from ..diffusion.invert import Inversion, invert
from ..diffusion.parts import Edit, Injection
from ..files.temporal_layers import load_temporal_layers
from ..hosts.diffusers import with_temporal_layers
from ..hosts.diffusers.checkpoint import Checkpoint
from ..hosts.diffusers.load import demo_video_model, open_model
from ..hosts.diffusers.model import Model
from ..methods.flow_edit import FlowEditSettings, draw
from ..methods.flow_mask import FlowMaskSettings
from ..methods.flow_smoothing import FlowSmoothing
from ..methods.kv_edit import KVEditSettings
from ..methods.plug_and_play import PnPSettings
from ..methods.tokenflow import TokenFlowSettings
from ..methods.tune_a_video import State, TuneSettings, tune
from ..models import FAMILIES
from ..recipes.presets import methods_of
from ..recipes.recipe import Recipe
from ..video.flow import flow_estimator
from ..video.motion import Motion, smooth_along
from .cases import AnyCase


@dataclass(frozen=True)
class Method:
    """A row of the table.

    run: edits a trial's clip without an inversion. Otherwise `settings` override those of the case's preset (the
    paper's, or ours with `plus`) or of another `preset`, if `fused`. masked: with the true mask of what changes as
    the edit mask. smoothing: along the source's flow, in each step; steady: of the resulting frames. layers:
    temporal layers on the image model, "fresh" or the bundled ones ("demo"), `tuned` on the clip for that many steps.
    transformer: use the demo's video transformer, with the LoRA `lora`. steps: of the schedule, if not the run's.
    order: of the solver. drawn: FlowEdit instead of an inversion.
    sdedit_seed: start from random noise of each frame. blind: invert with the empty prompt. guidance: of an edit
    without fusion, if not the run's. guidance_until: see `Edit`.
    """

    name: str
    run: Callable[[Trial], Tensor] | None = None
    fused: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    plus: bool = False
    key_frames: tuple[str | int, ...] = ("self", "middle")
    clip_norm: bool = False
    injection: Injection | None = None
    propagation: TokenFlowSettings | None = None
    masked: bool = False
    smoothing: float = 0.0
    steady: float = 0.0
    layers: str = ""
    tuned: int = 0
    transformer: bool = False
    lora: str = ""
    steps: int | None = None
    order: int = 1
    drawn: FlowEditSettings | None = None
    strength: float = 1.0
    sdedit_seed: int | None = None
    blind: bool = False
    guidance: float | None = None
    guidance_until: float = 1.0


@dataclass
class Trial:
    """One case with a model, to run methods on."""

    checkpoint: Model
    case: AnyCase
    steps: int
    guidance_scale: float = 7.5
    video: Path | None = None
    """The folder of the video transformer; the demo's, if none is given."""
    states: dict[tuple[str, int], State] = field(default_factory=dict)
    """Tuning states of this clip, by layers and steps; longer tunings resume from them."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, Checkpoint):
            self.latents, self.deviation = self.checkpoint.encode_posterior(self.case.clip.frames)
        else:
            self.latents = self.checkpoint.encode_clip(self.case.clip.frames)
        self.source, self.target, self.negative = (
            self.checkpoint.encode_prompt(text, SIZE, SIZE)
            for text in (self.case.source.caption, self.case.target.caption, "")
        )

    def invert(self, method: Method) -> Inversion:
        source, memory = (
            self.negative if method.blind else self.source,
            "recompute" if method.transformer else "queries_keys",
        )
        if method.drawn is not None:
            steps = method.steps or self.steps
            return draw(self.checkpoint.denoiser, self.latents, source, steps, method.drawn, method.key_frames)
        return invert(
            self.checkpoint.denoiser, self.latents, source, self.steps, method.key_frames, method.clip_norm, memory,
            order=method.order, prompt=self.case.source.caption,
        )  # fmt: skip

    def on_transformer(self, lora: str = "") -> Trial:
        """The same case on the video transformer."""
        if self.video is not None:
            return replace(self, checkpoint=demo_video_model(self.video, self.latents.device))
        demo = next(family.demo for family in FAMILIES if family.spans_clip)
        return replace(self, checkpoint=open_model(demo, self.latents.device, lora=lora or None))

    def tuned(self, layers: str, steps: int) -> Trial:
        """The same case on a copy of the model with temporal layers, tuned on the clip for so many steps."""
        assert isinstance(self.checkpoint, Checkpoint)
        checkpoint = replace(self.checkpoint, unet=deepcopy(self.checkpoint.unet))
        with_temporal_layers(checkpoint.unet, load_temporal_layers("demo") if layers == "demo" else None)
        if steps:
            fewer = [done for of, done in self.states if of == layers and done < steps]
            tune(
                checkpoint.denoiser, self.latents, self.source, TuneSettings(steps, learning_rate=RATE),
                deviation=self.deviation, resume=self.states[layers, max(fewer)] if fewer else None,
                keep=lambda state: self.states.update({(layers, steps): state}), keep_every=steps,
            )  # fmt: skip
        return replace(self, checkpoint=checkpoint)

    def recipe(self, method: Method) -> Recipe:
        """The case's preset, the method's settings, and the words that draw a mask; an edit of style has none."""
        case, own = self.case, dict(method.settings)
        source, target = case.source.caption, case.target.caption
        if not method.fused or method.injection is not None:
            scale = method.guidance or self.guidance_scale
            recipe = Recipe(source, target, guidance_scale=scale, injection=method.injection)
        else:
            words = dict(zip(("blend_source", "blend_target"), case.blend_words, strict=True))
            own |= words if any(words.values()) else {"blend_self_attention": False, "blend_latents": False}
            recipe = Recipe.of_preset(
                method.preset or case.preset + ("+" if method.plus else ""), source, target, **own
            )
        mask = GivenMask(torch.maximum(case.clip.mask, case.truth.mask)) if method.masked else None
        return replace(
            recipe,
            mask=mask,
            propagation=method.propagation,
            smoothing=self.smoothing(method),
            strength=method.strength,
            guidance_until=method.guidance_until,
            sdedit_seed=method.sdedit_seed,
        )

    def edit(self, method: Method) -> Edit:
        recipe = self.recipe(method)
        return recipe.edit(self.target, self.negative, recipe.pair(self.checkpoint.tokenizer))

    def smoothing(self, method: Method) -> FlowSmoothing | None:
        return FlowSmoothing(method.smoothing, self.motion) if method.smoothing else None

    @cached_property
    def motion(self) -> Motion:
        """The source's motion in pixels, from DIS."""
        _, estimate = flow_estimator("dis")
        return Motion.of(self.case.clip.frames, estimate)

    def finished(self, method: Method, frames: Tensor) -> Tensor:
        """A method's decoded frames, smoothed if it has `steady`."""
        if not method.steady:
            return frames
        return smooth_along(self.case.clip.frames, frames, self.motion, method.steady).clamp(0, 1)


def edited(trial: Trial, methods: Sequence[Method]) -> dict[str, Tensor]:
    """The latents of every method; methods share models, inversions and passes where possible."""
    found = {method.name: method.run(trial) for method in methods if method.run is not None}
    alike: dict[tuple[str, int, bool, str], list[Method]] = {}
    for m in methods:
        if m.run is None:
            alike.setdefault((m.layers, m.tuned, m.transformer, m.lora), []).append(m)
    for (layers, steps, transformer, lora), of_model in alike.items():
        own = trial.on_transformer(lora) if transformer else trial.tuned(layers, steps) if layers else trial
        found |= edited_alike(own, of_model)
    return found


def edited_alike(trial: Trial, methods: Sequence[Method]) -> dict[str, Tensor]:
    """The latents of every method, all on the trial's model."""
    found: dict[str, Tensor] = {}
    passes: dict[tuple[Any, ...], list[Method]] = {}
    for method in methods:
        key = (method.key_frames, method.clip_norm, method.blind, method.order, method.drawn, method.steps)
        passes.setdefault(key, []).append(method)
    for alike in passes.values():
        inversion = trial.invert(alike[0])
        results = edit_many(trial.checkpoint.denoiser, inversion, [trial.edit(method) for method in alike])
        found |= {method.name: latents for method, latents in zip(alike, results, strict=True)}
    return found


@torch.no_grad()
def denoised(
    trial: Trial, start: Tensor, condition: Condition, key_frames: KeyFrames, first: int = 0, clip_norm: bool = False
) -> Tensor:
    """Guided DDIM from step `first` on, without fusion; the latents of every level, noisy to clean."""
    denoiser = trial.checkpoint.denoiser
    schedule, chunk = denoiser.schedule(trial.steps), Chunk.whole(len(start))
    levels = [start]
    with denoiser.hooked(clip_norm):
        for step in range(first, trial.steps):
            guidance = Guidance(trial.negative, Control(key_frames, chunk), trial.guidance_scale)
            control, level = Control(key_frames, chunk), trial.steps - step
            noise = denoiser.predict_noise(levels[-1], schedule.timesteps[step], condition, control, guidance)
            levels.append(ddim_move(levels[-1], noise, schedule.alphas[level], schedule.alphas[level - 1]))
    return torch.stack(levels)


def autoencoded(trial: Trial) -> Tensor:
    """The source through the autoencoder: the upper bound of preservation."""
    return trial.latents


def sdedit(strength: float) -> Callable[[Trial], Tensor]:
    """SDEdit (arXiv 2108.01073) of single frames: add noise up to a share of the schedule, then denoise."""

    def run(trial: Trial) -> Tensor:
        first = trial.steps - max(1, round(strength * trial.steps))
        alpha = trial.checkpoint.denoiser.schedule(trial.steps).alphas[trial.steps - first]
        noise = torch.randn(trial.latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(trial.latents)
        start = alpha**0.5 * trial.latents + (1 - alpha) ** 0.5 * noise
        return denoised(trial, start, trial.target, KeyFrames(("self",)), first)[-1]

    return run


def _keys(*entries: str | int) -> Method:
    return Method(f"key frames {', '.join(map(str, entries))}", key_frames=entries)


PAPER = "FateZero (paper)"

BEST = "FateZero+"

_ALONE: dict[str, Any] = {"fused": False, "key_frames": ("self",)}

METHODS: tuple[Method, ...] = (
    Method("autoencoder only", run=autoencoded),
    Method("DDIM inversion + prompt", fused=False),
    *(Method(f"SDEdit {s}", run=sdedit(s)) for s in (0.4, 0.6, 0.8)),
    *(Method(f"SDEdit {s}, noise of each frame", strength=s, sdedit_seed=1, **_ALONE) for s in (0.4, 0.6, 0.8)),
    Method("attention of the reconstruction", settings={"attention_from": "reconstruction"}),
    Method(PAPER),
    Method("no self fusion", settings={"self_replace_steps": 0.0, "blend_self_attention": False}),
    Method("full self fusion", settings={"self_replace_steps": 1.0, "blend_self_attention": False}),
    Method("blended self fusion", preset="shape"),
    Method("latent blending", settings={"blend_latents": True}),
    Method("latent blending, authors' code", settings={"blend_latents": "authors"}),
    Method("clip norm", clip_norm=True),
    _keys("self"),  # without spatio-temporal attention
    _keys("middle"),
    _keys("first"),
    _keys("previous", "first"),
    _keys("self", "middle", -1, 1),
    Method("guidance 5", settings={"guidance_scale": 5.0}),
    Method(BEST, plus=True),
    Method("FateZero+, guidance 7.5", plus=True, settings={"guidance_scale": 7.5}),
    Method("FateZero+, guided in 0.6 of the steps", plus=True, guidance_until=0.6),
    Method("FateZero (paper), guided in 0.6 of the steps", guidance_until=0.6),
    Method(
        "FateZero+, mask of attention",
        plus=True,
        settings={"mask_from": "attention", "blend_threshold": 0.3, "separate_words": 0.0},
    ),
    Method("FateZero+, words mixed", plus=True, settings={"separate_words": 0.0}),
    Method("FateZero+, latents up to 0.8", plus=True, settings={"blend_latents_until": 0.8}),
)

METHODS += tuple(
    Method(declared.title, preset=preset, masked=declared.needs_mask)
    for declared in methods_of("injection")
    for preset in declared.presets
    if declared.name not in ("fatezero", "pnp")
)
"""Further injections, each as it declares itself."""
PNP = PnPSettings()
EXTENDED = TokenFlowSettings(1, "linear")
"""Every frame is a pivot and attends to all frames: extended attention only."""
FLOW = TokenFlowSettings(4)
FIXED = TokenFlowSettings(4, pivot_choice="fixed")
EQ_7 = TokenFlowSettings(4, "paper")
ONE = ("self",)
LONG = (
    Method("PnP", injection=PNP, key_frames=ONE),
    Method("PnP, extended attention", injection=PNP, key_frames=ONE, propagation=EXTENDED),
    Method("PnP, TokenFlow", injection=PNP, key_frames=ONE, propagation=FLOW),
    Method("SDEdit 0.6, TokenFlow", strength=0.6, sdedit_seed=1, **_ALONE, propagation=FLOW),
    Method("PnP, TokenFlow, fixed pivots", injection=PNP, key_frames=ONE, propagation=FIXED),
    Method("PnP, TokenFlow, the paper's weights", injection=PNP, key_frames=ONE, propagation=EQ_7),
    Method("PnP, flow smoothing", injection=PNP, key_frames=ONE, smoothing=0.8),
    Method("FateZero (paper), TokenFlow", propagation=FLOW),
    Method("FateZero+, extended attention", plus=True, propagation=EXTENDED),
    Method("FateZero+, TokenFlow", plus=True, propagation=FLOW),
    Method("FateZero+, flow smoothing", plus=True, smoothing=0.8),
    Method("FateZero+, flow smoothing, steady", plus=True, smoothing=0.8, steady=0.8),
    Method("FateZero+, flow smoothing 0.9, steady 0.9", plus=True, smoothing=0.9, steady=0.9),
    Method("FateZero+, TokenFlow, flow smoothing", plus=True, propagation=FLOW, smoothing=0.8),
)
"""Rows on temporal consistency, for clips of 16 frames and more."""
METHODS += LONG

RATE = 3e-4
"""Learning rate of tuning: ten times the authors', for a model with a thousandth of the weights."""


def _on_video(name: str, layers: str = "fresh", tuned: int = 150, **more: Any) -> Method:
    """A row on a model with temporal layers, with the key frames and clip norm of their training."""
    return Method(name, layers=layers, tuned=tuned, key_frames=("first", "previous"), clip_norm=True, **more)


_AS_PAPER: dict[str, Any] = {"fused": False, "blind": True, "guidance": 12.5}
TUNED = (
    *(_on_video(f"Tune-A-Video, {steps} steps", tuned=steps, **_AS_PAPER) for steps in (0, 50, 150)),
    _on_video("FateZero (paper), tuned 150 steps"),
    *(_on_video(f"FateZero+, tuned {steps} steps", tuned=steps, plus=True) for steps in (0, 50, 150)),
    _on_video("video model, inversion + prompt", "demo", 0, fused=False),
    _on_video("FateZero+, video model", "demo", 0, plus=True),
    _on_video("FateZero+, video model tuned 50 steps", "demo", 50, plus=True),
)
"""Rows with temporal layers: tuned on the clip from scratch, trained on many moving scenes, or both."""
METHODS += TUNED

_FLOW_EDIT = FlowEditSettings()


def _on_transformer(name: str, **more: Any) -> Method:
    """A row on the demo's video transformer."""
    return Method(f"Wan: {name}", transformer=True, **more)


def _in_steps(
    name: str,
    steps: int,
    source_guidance: float,
    guidance: float,
    lora: str = "",
    gain: float = 1.0,
    strength: float = 0.7,
) -> Method:
    """A row of FlowEdit in some number of steps."""
    drawn = FlowEditSettings(source_guidance, gain=gain)
    return _on_transformer(name, fused=False, drawn=drawn, guidance=guidance, strength=strength, steps=steps, lora=lora)


TRANSFORMER = (
    _on_transformer("inversion + prompt", fused=False, guidance=5.0),
    _on_transformer("inversion of second order + prompt", fused=False, guidance=5.0, order=2),
    _on_transformer("FateZero (paper)", settings={"guidance_scale": 5.0}),
    _on_transformer("FateZero+", plus=True),
    _on_transformer("FateZero+, second order", plus=True, order=2),
    _on_transformer("inversion + prompt in a mask", fused=False, guidance=5.0, masked=True),
    _on_transformer("KV-Edit", injection=KVEditSettings(), guidance=5.0, masked=True),
    _on_transformer("KV-Edit, guidance 2.5", injection=KVEditSettings(), guidance=2.5, masked=True),
    _on_transformer("KV-Edit, all tokens", injection=KVEditSettings(tokens="all"), guidance=5.0, masked=True),
    _on_transformer("FlowEdit", fused=False, drawn=_FLOW_EDIT, guidance=10.0, strength=0.7),
    _on_transformer("FlowEdit under the flow mask", injection=FlowMaskSettings(), drawn=_FLOW_EDIT, guidance=10.0,
                    strength=0.7),
    _on_transformer("FlowEdit under FateZero's mask", plus=True, drawn=_FLOW_EDIT, settings={
        "guidance_scale": 10.0, "cross_replace_steps": 0.0, "self_replace_steps": 0.0,
    }, strength=0.7),
    _on_transformer(
        "FlowEdit with FateZero+", plus=True, drawn=_FLOW_EDIT, settings={"guidance_scale": 10.0}, strength=0.7
    ),
    _in_steps("FlowEdit, 30 steps", 30, 4.0, 10.0),
    _in_steps("FlowEdit, 30 steps, guidance 5", 30, 5.0, 5.0),
    _in_steps("FlowEdit, 7 steps, guidance 5", 7, 5.0, 5.0),
    _in_steps("FlowEdit, 7 steps, guidance 1", 7, 1.0, 1.0),
    _in_steps("FlowEdit, 7 steps with the LoRA", 7, 1.0, 1.0, "demo-few-steps"),
    _in_steps("FlowEdit, 7 steps with the LoRA, gain 1.3", 7, 1.0, 1.0, "demo-few-steps", 1.3),
    _in_steps("few_steps", 7, 1.0, 1.0, "demo-few-steps", 1.3, 0.75),
    _in_steps("few_steps, 4 steps", 4, 1.0, 1.0, "demo-few-steps", 1.3, 0.75),
    _in_steps("FlowEdit, 4 steps with the LoRA", 4, 1.0, 1.0, "demo-few-steps"),
    Method("DDIM inversion of second order + prompt", fused=False, order=2),
    Method("FateZero+, second order", plus=True, order=2),
)  # fmt: skip
"""Rows with a video model, with FlowEdit on it, and with second-order solvers."""
METHODS += TRANSFORMER

QUICK = ("autoencoder only", "DDIM inversion + prompt", "SDEdit 0.6", PAPER, "full self fusion", BEST)
"""The methods of `--quick`."""
