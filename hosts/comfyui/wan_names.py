"""A Wan transformer of diffusers' under its original names, and a vocabulary as sentencepiece has it: as hosts ask."""

from __future__ import annotations

import struct

MARKS = ("<pad>", "</s>", "<unk>")
"""The tokens that are no text, in T5's order."""

_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
}


def original_name(name: str) -> str:
    """What Wan's own code calls a weight of diffusers' transformer."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in _NAMES.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def sentencepiece_model(vocabulary: list[tuple[str, float]]) -> bytes:
    """A vocabulary as a unigram model of the sentencepiece library: its protobuf `ModelProto`."""
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
