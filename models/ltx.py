"""LTX-2: a transformer over a clip's tokens and its sound's, Gemma's text behind learned registers, a causal video
autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..attention.columns import RegisterColumns
from .family import Family

LTX2 = Family(
    title="LTX-2",
    network="video transformer",
    formulation="flow",
    spans_clip=True,
    half="bfloat16",
    words=False,
    trained_frames=33,
)
TEXT_TOKENS = 1024
"""The least text columns of a prompt, registers included."""
REGISTERS = 128
"""Learned registers of a text connector, which repeat to fill the columns behind a prompt."""
NATIVE_SIZE = 512
"""Short side, in pixels, of the first stage of LTX-2's own pipelines."""


GUIDE_SEED = 0
"""Random seed for the noise of guides with a strength below 1."""


def text_columns(tokens: int) -> int:
    """The text columns of a prompt behind its connector: whole repetitions of the registers."""
    return -(-max(TEXT_TOKENS, tokens) // REGISTERS) * REGISTERS


@dataclass(frozen=True)
class Words:
    """A host's Gemma tokenizer, for `PromptEdit`. encode: the content tokens of a text."""

    encode: Callable[[str], list[int]]
    columns = RegisterColumns()

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=self.encode(text))
