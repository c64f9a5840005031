"""The area of an edit, from both prompts: where their predictions differ and their words get attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.control import AttentionSite
from ..attention.key_frames import Chunk
from ..attention.masks import over_maximum, token_heat
from ..imports import F, torch
from ..store.records import Recorder
from ..store.store import AttentionStore
from ..store.streams import video_of, video_shape
from .denoiser import Denoiser, frames_of, joined
from .source import attention_to

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (0.35, 0.5, 0.65, 0.8)
"""Levels at which the prompts are compared, as shares of the steps."""
SIGMAS = (0.49, 0.62, 0.73, 0.83)
"""The same for a flow, as sigmas, because its levels depend on the shift."""


def difference_levels(steps: int) -> list[int]:
    """The compared levels of a DDIM run, counted from the clean end."""
    return sorted({int(share * steps) for share in LEVELS})


def levels_compared(store: AttentionStore) -> list[int]:
    """The levels of a store at which the prompts are compared."""
    if store.formulation == "ddim":
        return difference_levels(store.steps)
    sigmas = {level: 1 - store.alphas[level] for level in range(min(1, store.steps - 1), store.steps)}
    return sorted({min(sigmas, key=lambda level: abs(sigmas[level] - sigma)) for sigma in SIGMAS})


@dataclass(frozen=True)
class PromptHeat:
    """Heat maps of an edit from its two prompts.

    edit: how strongly each place belongs to the edit, (frames, h, w), at least 0. tokens: the source's attention to
    each of its tokens, averaged over the levels, (frames, tokens, y, x); None without blend words. words: each prompt's
    attention to its own blend words, if any, (frames, y, x).
    """

    edit: Tensor
    tokens: Tensor | None
    words: list[Tensor]


def _at_level(
    denoiser: Denoiser,
    store: AttentionStore,
    z: Tensor,
    level: int,
    condition: Condition,
    sites: Sequence[AttentionSite],
    chunks: Sequence[Sequence[Chunk]],
    named: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The prediction of a text on the latents z of a level, and its attention to each token in some layers.

    (frames, c, h, w) and (frames, tokens, y, x), None for no layers. named: the tokens to compute on a video
    transformer.
    """
    step, names = store.step_at(level), {site.name for site in sites}
    if denoiser.spans_clip and sites:
        named = range(condition.text_tokens) if named is None else named
        return attention_to(denoiser, store, z, step, condition, sites, chunks[step], named)
    recorders = [Recorder(store.key_frames, chunk, names) for chunk in chunks[step]]
    parts = [denoiser.predict_noise(frames_of(z, r.chunk), store.timesteps[step], condition, r) for r in recorders]
    noise = joined(chunks[step], parts)
    if not sites:
        return noise, None
    maps = [token_heat(r.step.maps(sites, denoiser.dtype)) for r in recorders]
    return noise, joined(chunks[step], maps).to(z)


def source_tokens_heat(
    denoiser: Denoiser, store: AttentionStore, sites: Sequence[AttentionSite], chunks: Sequence[Sequence[Chunk]]
) -> Tensor:
    """The source's attention to each of its tokens in some layers of one grid, averaged over a few levels.

    (frames, tokens, y, x). One UNet call per level; the denoiser must be hooked.
    """
    heats = []
    for level in levels_compared(store):
        z = store.level(level).to(denoiser.device)
        _, heat = _at_level(denoiser, store, z, level, store.source, sites, chunks)
        heats += [] if heat is None else [heat]
    return torch.stack(heats).mean(0)


def prompt_heat(
    denoiser: Denoiser,
    store: AttentionStore,
    target: Condition,
    tokens: tuple[Sequence[int], Sequence[int]],
    sites: Sequence[AttentionSite],
    chunks: Sequence[Sequence[Chunk]],
) -> PromptHeat:
    """Compare the two prompts on the inversion's latents.

    `edit` is D sqrt(A). D is the mean over channels of |eps_target - eps_source| (DiffEdit, arXiv 2210.11427). A is the
    maximum of both prompts' cross-attention to their own blend words (`tokens`, in the layers `sites`), which separates
    objects; the root evens out the attention to backgrounds. Both are averaged over a few levels and divided by their
    maximum in the frame. Without tokens, `edit` is D. Two UNet calls per level; the denoiser must be hooked.
    """
    size = video_shape(store)[1:]
    differences: list[Tensor] = []
    attended: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level in levels_compared(store):
        z, noise = store.level(level).to(denoiser.device), []
        prompts = store.source, target.compared.with_guidance_of(store.source)
        for condition, own, heats in zip(prompts, tokens, attended, strict=True):
            predicted, heat = _at_level(denoiser, store, z, level, condition, sites if own else (), chunks, own)
            noise.append(predicted)
            heats += [] if heat is None else [heat]
        differences.append(over_maximum(video_of(store, noise[0] - noise[1]).abs().mean(1)))
    difference = over_maximum(torch.stack(differences).mean(0))
    of_source, of_target = (torch.stack(heats).mean(0) if heats else None for heats in attended)
    both = ((of_source, tokens[0]), (of_target, tokens[1]))
    words = [heat[:, list(own)].sum(1) for heat, own in both if heat is not None]
    attention = [over_maximum(heat) for heat in words]
    if not attention:
        return PromptHeat(difference, None, [])
    where = F.interpolate(torch.stack(attention).amax(0)[:, None], size=size, mode="bilinear", align_corners=False)
    return PromptHeat(difference * where[:, 0].sqrt(), of_source, words)
