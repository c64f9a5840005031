"""A prompt pair, and the alignment of its tokens in cross-attention.

Alignment and reweighting follow Prompt-to-Prompt (arXiv 2208.01626, Sec. 3), on which FateZero builds.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from ..imports import torch
from ..settings import setting, shown
from .columns import ClipColumns, SentenceColumns

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["refine", "replace"]
MIXED = "this model's text connector mixes words, so that attention to one cannot be found"
"""Why words of a text have no columns."""


@dataclass(frozen=True)
class Alignment:
    """The alignment of source tokens to target tokens.

    matrix: (source tokens, target tokens), shares of the source's attention. copied: (target tokens,), 1 where the
    source's attention is used, 0 where the target's own is. weights: (target tokens,), factors of the fused map.
    """

    matrix: Tensor
    copied: Tensor
    weights: Tensor

    @classmethod
    def nothing(cls) -> Alignment:
        """Of no tokens, for models without cross-attention."""
        return cls(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0))

    def to(self, like: Tensor) -> Alignment:
        """The alignment on the device and in the dtype of a tensor."""
        return Alignment(self.matrix.to(like), self.copied.to(like), self.weights.to(like))

    def within(self, fused: Tensor) -> Alignment:
        """The alignment where some target tokens keep the target's own map. fused: (target tokens,), 0 for these."""
        return Alignment(self.matrix, self.copied * fused, 1 + (self.weights - 1) * fused)

    def values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The values to multiply with the source's map and the target's own: (f h c d) -> (f h s d), (f h c d).

        The fused map is A = (A_src M c + A_own (1 - c)) w, with matrix M, copied c and weights w by token. Therefore
        A v = A_src (M c w v) + A_own ((1 - c) w v), without building a map.
        """
        return (self.matrix * self.copied * self.weights) @ v, ((1 - self.copied) * self.weights)[:, None] * v

    def fused(self, of_source: Tensor, own: Tensor) -> Tensor:
        """The fused map (f h t c) from the source's (f h t s) and the target's own (f h t c)."""
        return (of_source @ self.matrix * self.copied + own * (1 - self.copied)) * self.weights


@dataclass(frozen=True)
class PromptEdit:
    """A source prompt, a target prompt and how to edit their words.

    blend_words: (source words, target words) whose maps make the blend mask. One side may be empty: the target's,
    where the mask is the source's alone, and either side with a mask of both prompts. Case and surrounding punctuation
    of words are ignored; an entry may be a phrase; a repeated word means all its occurrences.

    Raises ValueError for a word that is not in its prompt, for unequal word counts in "replace", and for a tokenizer
    whose tokens cross spaces.
    """

    source: str
    target: str
    tokenizer: Any = field(repr=False)
    mode: Mode = setting(
        "refine",
        "refine: words that both prompts share use the source's attention. replace: prompts of equal word count are "
        "matched word by word, and changed words use the source's attention too.",
        group="The edit",
    )
    blend_words: tuple[Sequence[str], Sequence[str]] | None = None
    reweight: Mapping[str, float] = setting(
        dict, "Factors for the attention to words of the target prompt, while cross-attention is fused: watercolor=10.",
        group="The edit",
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "reweight", dict(self.reweight or {}))
        if self.mode not in ("refine", "replace"):
            raise ValueError(f'mode is {self.mode!r}; it must be "refine" or "replace"')
        if self.mode == "replace":
            counts = len(words_of(self.source)), len(words_of(self.target))
            if counts[0] != counts[1]:
                raise ValueError(
                    f'mode "replace" needs equal word counts, but the source has {counts[0]} words and the target '
                    f'{counts[1]}: {shown(self.source)} / {shown(self.target)}. Use mode "refine".'
                )
        if self.blend_words is not None:
            pair = tuple(self.blend_words)
            if len(pair) != 2 or any(isinstance(words, str) for words in pair) or not any(pair):
                raise ValueError(f"blend_words is {shown(self.blend_words)}; it must be (source words, target words)")
            for words, prompt in zip(pair, (self.source, self.target), strict=True):
                for word in words:
                    places_of(prompt, word, "blend_words")
        for word, weight in self.reweight.items():
            places_of(self.target, word, "reweight")
            if not isinstance(weight, (int, float)) or not isfinite(weight) or weight < 0:
                raise ValueError(
                    f"reweight: the weight of {shown(word)} is {weight!r}; it must be a number of at least 0"
                )

    # --- words and tokens -------------------------------------------------------------

    @property
    def columns(self) -> ClipColumns:
        """The columns of tokens in the encoder's output: the tokenizer's own, else CLIP's if it has a start token or
        defines none.
        """
        own: ClipColumns | None = getattr(self.tokenizer, "columns", None)
        if own is not None:
            return own
        clip = getattr(self.tokenizer, "bos_token_id", 0) is not None
        return ClipColumns() if clip else SentenceColumns()

    def content(self, prompt: str) -> int:
        """The number of a prompt's tokens, without start and end."""
        return sum(map(len, self.word_tokens(prompt)))

    def wordless(self, prompt: str, text_tokens: int) -> list[int]:
        """Columns of a prompt's embeddings that stand for no word."""
        return self.columns.wordless(self.content(prompt), text_tokens)

    def word_tokens(self, prompt: str) -> list[list[int]]:
        """The token ids of every word of a prompt, without start and end.

        A word that has other tokens on its own, such as Gemma's without a space, is what its prompt gains by it.
        """
        words, whole = [self._encoded(word) for word in prompt.split()], self._encoded(prompt)
        if [token for word in words for token in word] != whole:
            starts = [self._encoded(prompt[: found.end()]) for found in re.finditer(r"\S+", prompt)]
            if starts[-1:] == [whole] and all(whole[: len(start)] == start for start in starts):
                return [whole[a:b] for a, b in pairwise([0, *map(len, starts)])]
            raise ValueError(
                f"this tokenizer's tokens cross word boundaries in {shown(prompt)}: use one that splits at spaces, "
                "such as CLIP's or T5's"
            )
        return words

    def token_indices(self, prompt: str, word: str, text_tokens: int, what: str = "word") -> list[int]:
        """The columns of all occurrences of a word or phrase in embeddings of `text_tokens`.

        Raises ValueError for a text whose columns do not stand for words.
        """
        if not self.columns.words:
            raise ValueError(f"{what}: {shown(word)}: {MIXED}: use an edit mask")
        spans = _spans(self.word_tokens(prompt))
        found = []
        for start, length in places_of(prompt, word, what):
            tokens = [token for at in range(start, start + length) for token in range(*spans[at])]
            found += [self.columns.at(token, spans[-1][1], text_tokens) for token in tokens]
        if not all(0 <= column < text_tokens for column in found):
            raise ValueError(
                f"{what}: {shown(word)} is beyond the {text_tokens} tokens of the embeddings of {shown(prompt)}"
            )
        return found

    def columns_of_words(self, prompt: str, text_tokens: int) -> dict[str, list[int]]:
        """The columns of each word of a prompt, without those beyond `text_tokens`; none if columns are not words."""
        found: dict[str, list[int]] = {}
        if not self.columns.words:
            return found
        content = self.content(prompt)
        for word, span in self._words(prompt):
            own = (self.columns.at(token, content, text_tokens) for token in range(*span))
            found.setdefault(word, []).extend(column for column in own if 0 <= column < text_tokens)
        return {word: columns for word, columns in found.items() if columns}

    def blend_tokens(self, source_tokens: int, target_tokens: int) -> tuple[list[int], list[int]]:
        """The columns of the blend words in the source's and the target's maps."""
        if self.blend_words is None:
            raise ValueError("blending needs blend_words: (source words, target words)")
        source, target = self.blend_words
        return (
            [c for word in source for c in self.token_indices(self.source, word, source_tokens, "blend_words")],
            [c for word in target for c in self.token_indices(self.target, word, target_tokens, "blend_words")],
        )

    # --- alignment --------------------------------------------------------------------

    def align(self, source_tokens: int, target_tokens: int) -> Alignment:
        """The alignment for embeddings of these token counts (77, 154, ..., or 512)."""
        pairs = self._refined() if self.mode == "refine" else self._replaced()
        matrix, columns = torch.zeros(source_tokens, target_tokens), self.columns
        content = self.content(self.source), self.content(self.target)
        for source, target, share in pairs:
            i, j = columns.of(source), columns.of(target)
            if i < source_tokens and j < target_tokens:
                matrix[i, j] = share
        columns.pad(matrix, *content)
        ends = columns.end(content[0]), columns.end(content[1])
        if ends[0] < source_tokens and ends[1] < target_tokens:
            matrix[ends] = 1.0
        weights = torch.ones(target_tokens)
        for word, weight in self.reweight.items():
            weights[self.token_indices(self.target, word, target_tokens, "reweight")] = weight
        return Alignment(matrix, (matrix.sum(0) > 0).float(), weights)

    def _refined(self) -> list[tuple[int, int, float]]:
        """(source token, target token, share) of shared tokens, by global sequence alignment.

        A word with different tokens in different places, e.g. after a quotation mark or capitalized, is aligned as a
        whole.
        """
        tokens = [
            [token for word in self.word_tokens(prompt) for token in word] for prompt in (self.source, self.target)
        ]
        words = [self._words(prompt) for prompt in (self.source, self.target)]
        spelt = dict[str, set[tuple[int, ...]]]()
        for of, found in zip(tokens, words, strict=True):
            for word, (a, b) in found:
                spelt.setdefault(word, set()).add(tuple(of[a:b]))
        source, target = (
            _elements(of, {span: word for word, span in found if len(spelt[word]) > 1})
            for of, found in zip(tokens, words, strict=True)
        )
        matching = align_sequences([key for key, _ in source], [key for key, _ in target])
        return [pair for i, j in matching for pair in _spread(source[i][1], target[j][1])]

    def _replaced(self) -> list[tuple[int, int, float]]:
        """(source token, target token, share), word by word: one to one for equal token counts, else spread evenly.

        Punctuation between the same words is aligned if its token counts are equal.
        """
        source, target = ([span for _, span in self._words(prompt)] for prompt in (self.source, self.target))
        between = zip(_gaps(source, self.content(self.source)), _gaps(target, self.content(self.target)), strict=True)
        same = [(gap, other) for gap, other in between if gap[1] - gap[0] == other[1] - other[0]]
        return [pair for one, other in [*zip(source, target, strict=True), *same] for pair in _spread(one, other)]

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, int]]]:
        """The bare words of a prompt, each with its span of content tokens, without surrounding punctuation.

        A token of both word and punctuation counts as the word's.
        """
        found, at = [], 0
        for text, tokens in zip(prompt.split(), self.word_tokens(prompt), strict=True):
            head, tail = len(text) - len(text.lstrip(_PUNCTUATION)), len(text.rstrip(_PUNCTUATION))
            first = self._tokens_of(text[:head], tokens, 0) if head else 0
            last = self._tokens_of(text[:tail], tokens, len(tokens)) if tail < len(text) else len(tokens)
            if bare(text):
                found.append((bare(text), (at + first, at + last) if first < last else (at, at + len(tokens))))
            at += len(tokens)
        return found

    def _tokens_of(self, text: str, tokens: list[int], otherwise: int) -> int:
        """The number of tokens of a word's beginning; `otherwise` if it is tokenized differently within the word."""
        parts = self._encoded(text), self._encoded(f" {text}")
        return next((len(part) for part in parts if tokens[: len(part)] == part), otherwise)

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False).input_ids)

    def describe(self) -> str:
        """The alignment as text, one line per target word."""
        source = [
            (word, span) for word, span in zip(self.source.split(), _spans(self.word_tokens(self.source)), strict=True)
        ]
        pairs = self._refined() if self.mode == "refine" else self._replaced()
        lines = []
        for word, (c, d) in zip(self.target.split(), _spans(self.word_tokens(self.target)), strict=True):
            fed = {i for i, j, _ in pairs if c <= j < d}
            origins = [name for name, (a, b) in source if any(a <= i < b for i in fed)]
            lines.append(f"{word} <- {' '.join(origins) if origins else '(new)'}")
        return "\n".join(lines)


_DASHES, _QUOTES = "-\u2010\u2011\u2012\u2013\u2014\u2015", "'\u2018\u2019"
_PUNCTUATION = (
    f'.,;:!?"()[]{{}}{_DASHES}{_QUOTES}\u201a\u201c\u201d\u201e\u2026\xab\xbb\xbf\xa1\u3001\u3002\uff0c\uff01\uff1f'
)
"""Characters stripped from around words."""
_ALIKE = str.maketrans(dict.fromkeys(_DASHES, "-") | dict.fromkeys(_QUOTES, "'"))
"""Interchangeable characters."""


def bare(word: str) -> str:
    """A lower-case word without surrounding punctuation, with normalized dashes and apostrophes."""
    return unicodedata.normalize("NFKC", word.strip(_PUNCTUATION)).translate(_ALIKE).lower()


def places_of(prompt: str, phrase: str, what: str) -> list[tuple[int, int]]:
    """(first word, number of words) of all occurrences of a phrase; ValueError, starting with `what`, for none."""
    words, sought = [bare(w) for w in prompt.split()], [bare(w) for w in phrase.split()]
    n = len(sought)
    places = [(i, n) for i in range(len(words) - n + 1) if any(sought) and words[i : i + n] == sought]
    if not places:
        raise ValueError(f"{what}: {shown(phrase)} is not in the prompt {shown(prompt)}")
    return places


def words_of(prompt: str) -> list[str]:
    """The words of a prompt as written, without surrounding punctuation."""
    return [word.strip(_PUNCTUATION) for word in prompt.split() if bare(word)]


def _spans(words: list[list[int]]) -> list[tuple[int, int]]:
    """(first, past the last) content token of each word."""
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word)
    return spans


def _gaps(spans: Sequence[tuple[int, int]], content: int) -> list[tuple[int, int]]:
    """The gaps before, between and after spans of content tokens."""
    edges = [0, *(edge for span in spans for edge in span), content]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _elements(tokens: Sequence[int], words: Mapping[tuple[int, int], str]) -> list[tuple[int | str, tuple[int, int]]]:
    """The elements to align, with their spans: words at these spans as wholes, and all other tokens."""
    whole = {at: (word, (at, end)) for (at, end), word in words.items()}
    inside = {i for a, b in words for i in range(a + 1, b)}
    return [whole.get(i, (token, (i, i + 1))) for i, token in enumerate(tokens) if i not in inside]


def _spread(source: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int, float]]:
    """(source token, target token, share): one to one for spans of equal length, else spread evenly."""
    (a, b), (c, d) = source, target
    if b - a == d - c:
        return [(i, j, 1.0) for i, j in zip(range(a, b), range(c, d), strict=True)]
    return [(i, j, 1.0 / (d - c)) for i in range(a, b) for j in range(c, d)]


def align_sequences(source: Sequence[int | str], target: Sequence[int | str]) -> list[tuple[int, int]]:
    """Needleman-Wunsch with match 1, mismatch -1, gap 0: the matching (source, target) positions.

    Ties leave later target tokens unmatched, as in Prompt-to-Prompt's code.
    """
    rows, columns = len(source), len(target)
    score = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            same = 1 if source[i - 1] == target[j - 1] else -1
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + same)
    pairs, i, j = [], rows, columns
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def changed_words(source: str, target: str) -> tuple[list[str], list[str]]:
    """The words only in the source, and those only in the target, in order, without punctuation."""
    a, b = words_of(source), words_of(target)
    moves = difflib.SequenceMatcher(None, [*map(bare, a)], [*map(bare, b)], autojunk=False).get_opcodes()
    changed = [move for move in moves if move[0] == "replace"] or [move for move in moves if move[0] != "equal"]
    return [w for _, i, j, _, _ in changed for w in a[i:j]], [w for _, _, _, i, j in changed for w in b[i:j]]
