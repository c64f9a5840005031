"""A T5 vocabulary as a file of the sentencepiece library."""

from __future__ import annotations

import struct

MARKS = ("<pad>", "</s>", "<unk>")
"""T5's special tokens, in its order."""


def sentencepiece_model(vocabulary: list[tuple[str, float]]) -> bytes:
    """The unigram model of (token, score) pairs: sentencepiece's protobuf `ModelProto`."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}  # unknown, control; others are normal
    model = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kinds.get(piece, 1)))
        for piece, score in vocabulary
    )
    ids = {40: MARKS.index("<unk>"), 41: -1, 42: MARKS.index("</s>"), 43: MARKS.index("<pad>")}
    trainer = _field(3, 1) + _field(4, len(vocabulary)) + b"".join(_field(n, at) for n, at in ids.items())
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 1) + _field(5, 1)
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
