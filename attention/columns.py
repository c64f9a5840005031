"""Where the tokens of a prompt are among the columns of its embeddings, by kind of text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 75
"""Content tokens per block of 77; longer prompts repeat start, 75 tokens, end."""
T = TypeVar("T")


class ClipColumns:
    """Columns of tokens in CLIP's embeddings: blocks of a start token, 75 tokens and an end token."""

    words = True
    """Whether columns stand for words."""

    def content(self, row: Sequence[T], tokens: int) -> Sequence[T]:
        """The content of a host's row of tokens, of which a text has `tokens`."""
        return row[1 : BLOCK + 1]

    def of(self, token: int) -> int:
        """The column of a content token."""
        return token // BLOCK * (BLOCK + 2) + token % BLOCK + 1

    def at(self, token: int, content: int, text_tokens: int) -> int:
        """The column of a content token, one of `content`, in a text of `text_tokens`."""
        return self.of(token)

    def end(self, content: int) -> int:
        """The column of the end token after `content` tokens."""
        blocks = max(1, -(-content // BLOCK))
        return (blocks - 1) * (BLOCK + 2) + content - (blocks - 1) * BLOCK + 1

    def wordless(self, content: int, text_tokens: int) -> list[int]:
        """Columns that stand for no word: the start tokens."""
        return list(range(0, text_tokens, BLOCK + 2))

    def pad(self, matrix: Tensor, source: int, target: int) -> None:
        """Align the columns without words, given the prompts' numbers of content tokens.

        Start and end tokens of each block map to each other, padding to the same column.
        """
        words = {self.of(token) for token in range(target)}
        for j in range(min(matrix.shape)):
            if j not in words and j != self.end(target):
                matrix[j, j] = 1.0


class SentenceColumns(ClipColumns):
    """Columns of tokens in T5's embeddings: content from the first column, one end token, identical padding."""

    def content(self, row: Sequence[T], tokens: int) -> Sequence[T]:
        return row

    def of(self, token: int) -> int:
        return token

    def end(self, content: int) -> int:
        return content

    def wordless(self, content: int, text_tokens: int) -> list[int]:
        return list(range(content + 1, text_tokens))

    def pad(self, matrix: Tensor, source: int, target: int) -> None:
        """Spread the source's padding evenly over the target's: only its sum matters."""
        padding = matrix[source + 1 :, target + 1 :]
        if padding.numel():
            padding[:] = 1 / padding.shape[1]


class ClosingColumns(SentenceColumns):
    """Columns of a text that ends with its words, behind tokens of pictures."""

    def content(self, row: Sequence[T], tokens: int) -> Sequence[T]:
        return row[len(row) - tokens :]

    def at(self, token: int, content: int, text_tokens: int) -> int:
        return text_tokens - content + token


class RegisterColumns(ClipColumns):
    """Columns behind a connector with learned registers: a start token, content, and registers by their own column.

    Its layers mix all columns, so that a column no longer stands for its word.
    """

    words = False

    def content(self, row: Sequence[T], tokens: int) -> Sequence[T]:
        return row[len(row) - tokens :]  # behind padding

    def of(self, token: int) -> int:
        return token + 1

    def end(self, content: int) -> int:
        return 0  # the start token, which all prompts share

    def wordless(self, content: int, text_tokens: int) -> list[int]:
        return [0, *range(content + 1, text_tokens)]

    def pad(self, matrix: Tensor, source: int, target: int) -> None:
        """Align registers of the same column."""
        for j in range(max(source, target) + 1, min(matrix.shape)):
            matrix[j, j] = 1.0
