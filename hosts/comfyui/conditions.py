"""A ComfyUI CONDITIONING and those of its options that an edit honours (listed in `web/docs/options.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...attention.condition import Condition

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING: (embeddings, options) pairs."""

REFUSED = {
    "area": "an area of the picture is set",
    "mask": "a mask of the picture is set",
    "concat_latent_image": "a picture to paint into is set",
    "concat_mask": "a mask to paint into is set",
    "reference_latents": "reference pictures are set",
    "context_latents": "reference clips are set (Bernini Conditioning)",
    "time_dim_concat": "frames to append are set",
    "unclip_conditioning": "pictures for unCLIP are set",
}
"""Options of a CONDITIONING that a source or positive prompt must not have: they are of a part of the picture, or of
models that FateZero does not know. The attention of such parts does not line up with the clip's."""

READ = {"c_crossattn", "crossattn_controlnet", "y", "c_concat"}
"""The inputs that a model reads of a prompt: its text, the ControlNet's, pooled text and sizes, and the empty picture
of an inpainting UNet."""


@dataclass(frozen=True)
class HostCondition(Condition):
    """One CONDITIONING and the name it goes by in the run.

    role: "source", "positive" or "negative", with ".1", ".2", ... for further edits of one pass.
    """

    role: str = "source"
    conditioning: Conditioning = field(default_factory=list)

    @property
    def guided(self) -> bool:
        """Whether the host's guidance acts on its predictions: a negative evaluated by itself is part of our own."""
        return self.role.partition(".")[0] == "positive"

    @classmethod
    def of_socket(cls, conditioning: Conditioning, role: str, socket: str) -> HostCondition:
        """Wrap what a socket got.

        Raises ValueError for a source or positive that is more than one prompt, or for a part of the picture or of
        the steps alone. A negative may be anything: its attention is left alone.
        """
        entries = [(embeddings, options) for embeddings, options in conditioning if embeddings is not None]
        if not entries:
            raise ValueError(f"{socket}: holds no prompt")
        if socket != "negative":
            if len(entries) != 1:
                raise ValueError(f"{socket}: got {len(entries)} prompts combined; FateZero needs a single one")
            _check_whole(entries[0][1], socket)
        embeddings, options = entries[0]
        pooled = options.get("pooled_output")
        return cls(embeddings[:1], {} if pooled is None else {"pooled_output": pooled}, role, conditioning)

    @classmethod
    def restored(cls, condition: Condition, options: dict[str, Any]) -> HostCondition:
        """The source's conditioning again, from a store that was saved."""
        conditioning = [(condition.embeddings, {**condition.extras, **options})]
        return cls(condition.embeddings, condition.extras, "source", conditioning)


def _check_whole(options: dict[str, Any], socket: str) -> None:
    """Raise ValueError, naming the option, for a prompt that is not for the whole clip in every step."""
    for name, what in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{socket}: {what} ({name}); FateZero needs a prompt for all of the clip")
    start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    if start > 0 or end < 1:
        raise ValueError(
            f"{socket}: it is for {start:.0%} to {end:.0%} of the steps (Conditioning Set Timestep Range); FateZero "
            "needs a prompt for all of them"
        )


def check_read(conditions: Sequence[dict[str, Any]], socket: str) -> None:
    """Raise ValueError, naming them, for inputs of a model from a prompt that FateZero does not support."""
    unknown = sorted({name for entry in conditions for name in entry["model_conds"]} - READ)
    if unknown:
        raise ValueError(
            f"{socket}: sets {', '.join(unknown)}, which FateZero does not support: leave out the node that sets it"
        )


def plain_options(conditioning: Conditioning) -> dict[str, Any]:
    """What of a conditioning's options a file can hold: SDXL's sizes and the like."""
    return {k: v for k, v in conditioning[0][1].items() if isinstance(v, (int, float, str))}


def unsaveable(conditioning: Conditioning) -> list[str]:
    """The options that a file cannot hold and that change what the source branch computes."""
    return [k for k, v in conditioning[0][1].items() if k in ("control", "gligen", "hooks", "model_conds") and v]
