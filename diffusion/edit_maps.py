"""What an edit attends to and where its masks are, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk
from ..attention.prompt import PromptEdit
from ..imports import torch
from ..store.store import AttentionStore
from ..store.streams import video_of
from .source import attention_to
from .word_attention import Words, by_word, columns_in, heat_sites, of_words

if TYPE_CHECKING:
    from torch import Tensor

    from .parts import EditContext, Prediction

SOURCE_STEPS = 8
"""The number of an edit's steps in which the source's attention is computed."""


class StepMaps(NamedTuple):
    """What one step of an edit records, float32 in RAM.

    heat: the target's attention, (frames, words, y, x). attention, latents: the masks, (frames, y, x).
    """

    heat: Tensor | None
    attention: Tensor | None
    latents: Tensor | None


@dataclass(frozen=True)
class EditMaps:
    """Records an edit's attention to words and its masks in every step: for `edit(..., maps=...)`.

    source, target: the columns of words in each prompt's text. The edit's result is the same with and without it.
    """

    source: Words
    target: Words
    of_source: list[Tensor] = field(default_factory=list)
    of_steps: dict[int, StepMaps] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: PromptEdit, source_tokens: int = 77, target_tokens: int = 77) -> EditMaps:
        """Of all words of both prompts. source_tokens, target_tokens: the numbers of tokens of the encoded texts."""
        of_source = prompts.columns_of_words(prompts.source, source_tokens)
        return cls(of_source, prompts.columns_of_words(prompts.target, target_tokens))

    def heats(self) -> dict[str, dict[str, Tensor]]:
        """The attention to each word of "source" and "target", averaged over heads and layers: (steps, frames, y, x).

        The source's is that of the inversion, in at most eight steps; the target's that of the edit before fusion.
        Empty for a model without attention control.
        """
        steps = [maps.heat for _, maps in sorted(self.of_steps.items()) if maps.heat is not None]
        return {"source": by_word(self.source, self.of_source), "target": by_word(self.target, steps)}

    def masks(self) -> dict[str, Tensor]:
        """The masks of the steps that use one, (steps, frames, y, x), 1 where the edit may change the clip.

        "attention": inside which self-attention is the edit's. "latents": outside which latents are the source's.
        """
        steps = [maps for _, maps in sorted(self.of_steps.items())]
        found = {"attention": [maps.attention for maps in steps], "latents": [maps.latents for maps in steps]}
        return {
            name: torch.stack(used)
            for name, masks in found.items()
            if (used := [mask for mask in masks if mask is not None])
        }

    # --- for the loop -------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The maps of the steps so far, for `States.save`."""
        return list(self.of_steps.items())

    def resume(self, found: Any) -> None:
        """Continue with the maps of an interrupted run."""
        self.of_steps.update((step, StepMaps(*maps)) for step, maps in found)

    def prepare(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Compute the source's attention in a few steps, each one model call. chunks: of every step."""
        store, sites = context.store, heat_sites(context.sites)
        columns = columns_in(self.source)
        self.of_source.clear()
        self.of_steps.clear()
        for step in torch.linspace(0, store.steps - 1, min(SOURCE_STEPS, store.steps)).round().int().tolist():
            if sites and columns:
                z = store.level(store.source_level(step)).to(context.denoiser.device)
                heat = attention_to(context.denoiser, store, z, step, store.source, sites, chunks[step], columns)[1]
                self.of_source.append(of_words(heat, self.source))

    def watch(self, control: Control, sites: Sequence[AttentionSite]) -> None:
        """Let the control of the target's branch record."""
        watched = heat_sites(sites)
        if watched and self.target:
            control.watch({site.name for site in watched}, columns_in(self.target))

    def heat(self, control: Control) -> Tensor | None:
        """What the control of the target's branch recorded, (frames of the chunk, words, y, x)."""
        watched = control.captured.heat
        return None if watched is None else of_words(control.heat(max(watched.tokens) + 1), self.target)

    def record(self, store: AttentionStore, step: int, predicted: Prediction) -> None:
        """Add a step."""
        attention, latents = predicted.attention_mask, predicted.mask
        if latents is not None:
            latents = video_of(store, latents).amax(1).float().cpu()
        self.of_steps[step] = StepMaps(predicted.heat, None if attention is None else attention.float().cpu(), latents)
