"""Attention to the words of a prompt while a clip is generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..attention.control import WITH_TEXT, AttentionSite, Control
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import mask_sites
from ..imports import torch

if TYPE_CHECKING:
    from torch import Tensor

Words = Mapping[str, Sequence[int]]
"""The columns of each word in a text."""
MOST_TOKENS = 256
"""Heat maps come from the finest grid of at most so many tokens, or from the coarsest."""


def heat_sites(sites: Iterable[AttentionSite], most_tokens: int = MOST_TOKENS) -> list[AttentionSite]:
    """The layers with text of a model's heat maps; none if it has none."""
    cross = [site for site in sites if site.kind in WITH_TEXT]
    return mask_sites(cross, max(most_tokens, min(site.tokens for site in cross))) if cross else []


def columns_in(words: Words) -> list[int]:
    """The columns of all words."""
    return sorted({column for columns in words.values() for column in columns})


def of_words(heat: Tensor, words: Words) -> Tensor:
    """The attention to each word, from that to each token: (f s y x) to (f words y x), float32 in RAM."""
    return torch.stack([heat[:, list(own)].sum(1) for own in words.values()], 1).float().cpu()


def by_word(words: Words, heats: Iterable[Tensor]) -> dict[str, Tensor]:
    """The heat of each word in every step, (steps, frames, y, x), from those of `of_words`; empty for no steps."""
    steps = list(heats)
    return dict(zip(words, torch.stack(steps).unbind(2), strict=True)) if steps else {}


@dataclass(frozen=True)
class WordAttention:
    """Records the attention of a clip's frames to words in every step: for `generate(..., attention=...)`.

    words: the columns of each in the text. most_tokens: the layers of the finest grid of at most so many tokens are
    used. heats: of each step, (frames, words, y, x), averaged over heads and layers and summed over a word's columns.
    Raises ValueError for no words, or a word without columns.
    """

    words: Words
    most_tokens: int = MOST_TOKENS
    heats: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.words or not all(self.words.values()):
            raise ValueError(f"words is {dict(self.words)}; it must name the text's columns of at least one word")

    @property
    def columns(self) -> list[int]:
        """The columns of all words."""
        return columns_in(self.words)

    def recorder(self, keys: KeyFrames, chunk: Chunk, sites: Sequence[AttentionSite], tokens: int) -> Control:
        """The control of the conditional branch in a step. sites: the model's layers; tokens: of the text.

        Raises ValueError for columns that the text does not have.
        """
        if self.columns[-1] >= tokens:
            raise ValueError(f"words contain token {self.columns[-1]}; the text has {tokens} tokens")
        control = Control(keys, chunk)
        control.watch({site.name for site in heat_sites(sites, self.most_tokens)}, self.columns)
        return control

    def record(self, recorder: Control, timestep: float) -> None:
        """Add a step."""
        self.heats.append(of_words(recorder.heat(self.columns[-1] + 1), self.words))

    def steps(self) -> dict[str, Tensor]:
        """The heat of each word in every step: (steps, frames, y, x)."""
        return by_word(self.words, self.heats)
