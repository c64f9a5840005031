"""ComfyUI's CONDITIONING, and the options of it that an edit supports (`web/docs/options.md` has the table)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...attention.condition import Condition
from .sameness import empty

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING: (embeddings, options) pairs."""

KEYFRAMES = "keyframe_idxs"
"""The option of LTX with the place of each token of its guides, (1, 3, tokens, 2)."""

REFUSED = {
    "area": "an area of the picture is set",
    "mask": "a mask of the picture is set",
    "concat_latent_image": "a picture to paint into is set",
    "concat_mask": "a mask to paint into is set",
    "reference_latents": "reference pictures are set",
    "context_latents": "reference clips are set (Bernini Conditioning)",
    "time_dim_concat": "frames to append are set",
    KEYFRAMES: "guides or keyframes are set (LTXV Add Guide)",
    "generated_keyframes": "generated keyframes are set",
    "ref_audio": "a reference sound is set",
    "unclip_conditioning": "pictures for unCLIP are set",
}
"""Options that a source or positive prompt must not have, unless the model takes them: they restrict it to a part of
the picture, whose attention does not align with the clip's, or the model does not read them."""

READ = frozenset({"c_crossattn", "crossattn_controlnet", "y", "c_concat"})
"""The supported model inputs from a prompt: text, the ControlNet's text, pooled text and sizes, and the empty picture
of an inpainting UNet."""

PICTURES = frozenset({
    "c_concat", "clip_fea", "denoise_mask", "reference_latent", "context_latents", "time_dim_concat", "vace_context",
    "camera_conditions", "face_pixel_values", "pose_latents", "ref_latents", KEYFRAMES, "guide_attention_entries",
})  # fmt: skip
"""The model inputs of pictures, their places, clips and control videos, which may differ between source and edit."""

NOTHING = frozenset[str]()

LOST = (
    "control", "gligen", "hooks", "model_conds", "minimax_keyframes", "minimax_refs", "concat_latent_image",
    "reference_latents", "context_latents", "time_dim_concat", "clip_vision_output", "vace_frames", "face_video_pixels",
    "pose_video_latent", "camera_conditions", KEYFRAMES, "ref_audio",
)  # fmt: skip
"""Options that change the source branch but cannot be saved in a file."""


@dataclass(frozen=True)
class HostCondition(Condition):
    """One CONDITIONING and its name in the run.

    role: "source", "positive" or "negative", with ".1", ".2", ... for additional edits of a pass. plain: whether it is
    `compared`.
    """

    role: str = "source"
    conditioning: Conditioning = field(default_factory=list)
    plain: bool = False

    @property
    def text_tokens(self) -> int:
        from .families import text_tokens_of  # families use conditions

        return text_tokens_of(self.embeddings, self.conditioning[0][1])

    @property
    def of_edit(self) -> bool:
        """Whether the edit's MODEL and guides evaluate it; a negative evaluated on its own guides the source."""
        return self.role.partition(".")[0] == "positive"

    @property
    def guided(self) -> bool:
        """Whether the host's guidance, and that of other nodes, applies to its predictions."""
        return self.of_edit and not self.plain

    @property
    def compared(self) -> HostCondition:
        return replace(self, plain=True)

    def fits_attention(self, takes: frozenset[str] = NOTHING) -> bool:
        """Whether its attention can be controlled, that of a negative as it is. takes: of `REFUSED`, by the model."""
        return self.role.startswith("negative") or _unfit(self.conditioning, takes) is None

    def check_attention(self, socket: str, takes: frozenset[str]) -> None:
        """Raise ValueError, naming the socket, where its attention cannot be controlled."""
        if problem := _unfit(self.conditioning, takes):
            raise ValueError(f"{socket}: {problem}")

    @classmethod
    def of_socket(
        cls, conditioning: Conditioning, role: str, socket: str, attends: bool = True, takes: frozenset[str] = NOTHING
    ) -> HostCondition:
        """Wrap the CONDITIONING of a socket. attends: whether its attention is controlled; else it may be anything.
        takes: options in `REFUSED` that the model takes.

        Raises ValueError for a source or positive with several prompts, or one for a part of the picture or steps. A
        negative may be anything, since its attention is not changed.
        """
        entries = [(embeddings, options) for embeddings, options in conditioning if embeddings is not None]
        if not entries:
            raise ValueError(f"{socket}: has no prompt")
        problem = _unfit(entries, takes) if attends and socket != "negative" else None
        if problem:
            raise ValueError(f"{socket}: {problem}")
        embeddings, options = entries[0]
        pooled = options.get("pooled_output")
        return cls(embeddings[:1], {} if pooled is None else {"pooled_output": pooled}, role, conditioning)

    @classmethod
    def restored(cls, condition: Condition, options: dict[str, Any]) -> HostCondition:
        """The source's conditioning of a saved store."""
        conditioning = [(condition.embeddings, {**condition.extras, **options})]
        return cls(condition.embeddings, condition.extras, "source", conditioning)


def _unfit(conditioning: Conditioning, takes: frozenset[str]) -> str | None:
    """Why the attention of a CONDITIONING cannot be aligned with the clip's; None if it can."""
    conditioning = [entry for entry in conditioning if entry[0] is not None]
    if len(conditioning) != 1:
        return f"combines {len(conditioning)} prompts: connect a single one"
    options = conditioning[0][1]
    for name, what in REFUSED.items():
        if options.get(name) is not None and name not in takes:
            return f"{what} ({name}): connect a prompt for the whole clip"
    start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    if start > 0 or end < 1:
        return (
            f"is restricted to {start:.0%} to {end:.0%} of the steps (Conditioning Set Timestep Range): connect a "
            "prompt for all of them"
        )
    return None


def with_pictures_of(negative: Sequence[Any], edit: Sequence[Any], source: Sequence[Any]) -> list[Any]:
    """The processed conditions of a negative prompt with the source's pictures, where it has those of the edit."""
    of_edit, of_source = (entries[0]["model_conds"] for entries in (edit, source))

    def of(name: str, value: Any) -> Any:
        shared = name in PICTURES and name in of_source and name in of_edit and _same(value.cond, of_edit[name].cond)
        return of_source[name] if shared else value

    return [{**one, "model_conds": {name: of(name, x) for name, x in one["model_conds"].items()}} for one in negative]


def _same(one: Any, other: Any) -> bool:
    """Whether two model inputs are equal: tensors, plain values, or lists and dicts of them."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def check_read(conditions: Sequence[dict[str, Any]], socket: str, known: frozenset[str]) -> None:
    """Raise ValueError, with their names, for unsupported model inputs from a prompt. known: those that are."""
    unknown = sorted({name for entry in conditions for name in entry["model_conds"]} - known)
    if unknown:
        raise ValueError(
            f"{socket}: sets {', '.join(unknown)}, which FateZero does not support: remove the node that sets it"
        )


def plain_options(conditioning: Conditioning) -> dict[str, Any]:
    """The options of a conditioning that can be saved in a file, such as SDXL's sizes."""
    return {k: v for k, v in conditioning[0][1].items() if isinstance(v, (int, float, str))}


def unsaveable(conditioning: Conditioning) -> list[str]:
    """The options that change the source branch but cannot be saved in a file."""
    return [k for k, v in conditioning[0][1].items() if k in LOST and not empty(v)]
