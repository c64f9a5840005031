"""Attention to the words of a prompt while a clip is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..attention.control import AttentionSite
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.masks import mask_sites
from ..imports import torch
from ..store.records import TokenHeatRecorder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WordAttention:
    """Records the attention of a clip's frames to words in every step: for `generate(..., attention=...)`.

    words: the columns of each in the text. most_tokens: the layers of the finest grid of at most so many tokens are
    used. heats: of each step, (frames, words, y, x), averaged over heads and layers and summed over a word's columns.
    Raises ValueError for no words, or a word without columns.
    """

    words: Mapping[str, Sequence[int]]
    most_tokens: int = 256
    heats: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.words or not all(self.words.values()):
            raise ValueError(f"words is {dict(self.words)}; it must name the text's columns of at least one word")

    @property
    def columns(self) -> list[int]:
        """The columns of all words."""
        return sorted({column for columns in self.words.values() for column in columns})

    def recorder(self, keys: KeyFrames, chunk: Chunk, sites: Sequence[AttentionSite], tokens: int) -> TokenHeatRecorder:
        """The control of the conditional branch in a step. sites: the model's layers; tokens: of the text.

        Raises ValueError for columns that the text does not have.
        """
        if self.columns[-1] >= tokens:
            raise ValueError(f"words contain token {self.columns[-1]}; the text has {tokens} tokens")
        return TokenHeatRecorder(keys, chunk, {site.name for site in mask_sites(sites, self.most_tokens)}, self.columns)

    def record(self, recorder: TokenHeatRecorder) -> None:
        """Add a step."""
        heat = recorder.heat(self.columns[-1] + 1)
        self.heats.append(torch.stack([heat[:, list(own)].sum(1) for own in self.words.values()], 1).float().cpu())

    def steps(self) -> dict[str, Tensor]:
        """The heat of each word in every step: (steps, frames, y, x)."""
        return dict(zip(self.words, torch.stack(self.heats).unbind(2), strict=True))
