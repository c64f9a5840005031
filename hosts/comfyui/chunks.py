"""Parts of a clip: context windows, conditions of some frames, and checks for nodes that need all frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import comfy.context_windows
import comfy.patcher_extension
from torch import Tensor

from ...attention.key_frames import Chunk
from ...attention.packed import Packing
from ...diffusion.denoiser import WeightedFrames
from .hook import Hook, name_of_node, node_of

WrappersMP = comfy.patcher_extension.WrappersMP

FRAME_BY_FRAME = ("fatezero", "easycache")
"""The keys of wrappers around calls that depend only on the call's frames."""
PER_POSITION = {
    "nodes_cfg.CFGNorm", "nodes_custom_sampler.CFGOverride", "nodes_easycache.lazycache_predict_noise_wrapper",
    "nodes_eps.EpsilonScaling", "nodes_eps.TemporalScoreRescaling", "nodes_fresca.FreSca",
    "nodes_pag.PerturbedAttentionGuidance", "nodes_slg.SkipLayerGuidanceDiT",
}  # fmt: skip
"""Guidance of the host's nodes that treats each frame separately, whatever the layout of latents."""
PER_SAMPLE = {"nodes_cfg.CFGZeroStar", "nodes_model_advanced.RescaleCFG", "nodes_tcfg.TCFG"}
"""Guidance that treats each sample of a batch separately: a frame of a UNet, a whole clip of a video transformer."""


def around_predictions(options: dict[str, Any]) -> list[Any]:
    """The wrappers of other nodes around the predictions of a MODEL, from its options."""
    return list(comfy.patcher_extension.get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True))


def windowing(wrappers: dict[str, dict[Any, Any]]) -> list[Any]:
    """The names of a MODEL's wrappers that may call it on parts of a clip (AnimateDiff-Evolved's context options)."""
    around_calls = wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    return [name for name, wrappers in around_calls.items() if wrappers and name not in FRAME_BY_FRAME]


def check_parts(options: dict[str, Any], guided: bool, clip_is_sample: bool) -> None:
    """Raise ValueError, naming the node, for what needs all frames of a clip when calls have only some of them.

    options: the MODEL's. guided: whether its guidance functions run. clip_is_sample: whether the frames of a clip are
    one sample of the host's.
    """
    of_calls = options["transformer_options"]
    names = [f"a node's wrapper {name}" for name in windowing(of_calls.get("wrappers", {}))]
    if of_calls.get("patches", {}).get("forward_timestep_embed_patch"):
        names = ["a motion module of AnimateDiff"]
    if names:
        raise ValueError(
            f"model: {names[0]} needs all frames of a clip, but this run splits them: set chunk_frames to 0 or "
            "window_frames to the clip's length, and remove TokenFlow and Context Windows (AnimateDiff-Evolved has its "
            "own context options)"
        )
    found = mixing_guidance(around_predictions(options) + (_guidance_of(options) if guided else []), clip_is_sample)
    if found:
        raise ValueError(
            f"model: guidance of {node_of(found[0])} may depend on all frames, but chunks, context windows and "
            "TokenFlow's batches have only some: run the whole clip at once, or remove it"
        )


def _guidance_of(options: dict[str, Any]) -> list[Any]:
    one = [options.get("sampler_cfg_function"), options.get("sampler_calc_cond_batch_function")]
    many = [*options.get("sampler_pre_cfg_function", []), *options.get("sampler_post_cfg_function", [])]
    return [hook for hook in one + many if hook is not None]


def mixing_guidance(hooks: Sequence[Any], clip_is_sample: bool = False) -> list[Any]:
    """The guidance functions that may mix the frames of a clip."""
    known = PER_POSITION if clip_is_sample else PER_POSITION | PER_SAMPLE
    return [hook for hook in hooks if name_of_node(hook) not in known or _rescales(hook)]


def _rescales(hook: Any) -> bool:
    """Whether a guidance function of the host scales by a deviation over all frames (Skip Layer Guidance)."""
    return isinstance(hook, FunctionType) and bool(getclosurevars(hook).nonlocals.get("rescaling_scale"))


def windows_of(
    handler: Any, model: Any, x: Tensor, frames: int, sigma: Tensor, options: dict[str, Any], packing: Packing | None
) -> list[WeightedFrames]:
    """The windows of the host's context handler on a clip at a sigma, with the weights of its fuse method, and those of
    a sound packed with it.
    """
    handler.set_step(sigma.to(options["transformer_options"]["sample_sigmas"]), options)
    windows = [window.index_list for window in handler.get_context_windows(model, x, options)]
    weighted = [(window, _window_weights(handler, window, frames, sigma)) for window in windows]
    of_frames = [_with_frame_before(handler, window, weights) for window, weights in weighted]
    if packing is None:
        return [of_frames]
    overlap = {"context_overlap": round(handler.context_overlap * packing.sound / frames)}
    sound = [packing.sound_of(window) for window in windows]
    return [of_frames, [(own, _window_weights(handler, own, packing.sound, sigma, **overlap)) for own in sound]]


def _with_frame_before(handler: Any, frames: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
    """A context window, with the frame before it if the host's handler has `causal_window_fix`."""
    before = frames[0] - 1
    if before < 0 or not getattr(handler, "causal_window_fix", False):
        return frames, weights
    if before in frames:
        raise ValueError(
            f"model: a context window already contains the frame before it ({before}): switch off causal_window_fix"
        )
    return [before, *frames], [0.0, *weights]


def _window_weights(handler: Any, frames: Sequence[int], clip: int, sigma: Tensor, **overlap: int) -> list[float]:
    """The weight of each frame of a context window, by the host's fuse method."""
    if handler.fuse_method.name == comfy.context_windows.ContextFuseMethods.RELATIVE:
        middle, reach = (frames[0] + frames[-1]) / 2, (frames[-1] - frames[0] + 1e-2) / 2
        return [max(1e-2, 1 - abs(frame - middle) / reach) for frame in frames]
    weights = comfy.context_windows.get_context_weights(len(frames), clip, frames, handler, sigma=sigma, **overlap)
    return [float(weight) for weight in weights]


def whole_conditions(conditions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditions of the whole picture, without those that the host adds for areas."""
    return [entry for entry in conditions if "area" not in entry]


@contextmanager
def conditions_of_chunk(hooked: Hook, conditions: list[Any], chunk: Chunk) -> Iterator[list[Any]]:
    """The host's conditions for the frames of a chunk, ControlNet hints included."""
    if chunk.is_whole:
        yield conditions
        return
    frames = list(chunk.frame_indices)
    hints: dict[Any, Tensor] = {}
    for control in (c.get("control") for entries in conditions for c in entries or []):
        while control is not None:
            hint = control.cond_hint_original
            if hint is not None and len(hint) > 1:  # the host repeats shorter hints
                hints[control] = hint
            control = control.previous_controlnet
    try:
        for control, hint in hints.items():
            control.cond_hint_original, control.cond_hint = hint[[f % len(hint) for f in frames]], None
        yield [entries and [hooked.of_chunk(c, chunk) for c in entries] for entries in conditions]
    finally:
        for control, hint in hints.items():
            control.cond_hint_original, control.cond_hint = hint, None
