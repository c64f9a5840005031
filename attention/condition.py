"""The conditioning of a model by a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


GUIDANCE = "guidance"
"""The name of a guidance scale among the extras."""
FIRST = "first"
"""The name of a clean first latent among the extras, (1, c, h, w), which every call keeps."""
PICTURES = (FIRST, "picture", "seen", "guides")
"""The names of the clip's frames among the extras; source and edit may have different ones."""


@dataclass(frozen=True)
class Condition:
    """A prompt's conditioning.

    embeddings: (1, tokens, dim). extras: other inputs by name, (1, ...) each, such as SDXL's `text_embeds` and
    `time_ids`.
    """

    embeddings: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Tensor | Condition, name: str) -> Condition:
        """Wrap plain embeddings; ValueError, naming the argument, for a wrong shape."""
        condition = value if isinstance(value, Condition) else cls(value)
        if condition.embeddings.ndim != 3 or len(condition.embeddings) != 1:
            raise ValueError(f"{name} has shape {tuple(condition.embeddings.shape)}; it must be (1, tokens, dim)")
        return condition

    @property
    def text_tokens(self) -> int:
        return self.embeddings.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.embeddings, *self.extras.values()))

    @property
    def held_frames(self) -> int:
        """The latent frames, from the first on, that are given instead of predicted."""
        return int(FIRST in self.extras)

    def with_guidance(self, scale: float) -> Condition:
        """The condition with a guidance scale, for models that take it as an input (distilled guidance)."""
        return replace(self, extras={**self.extras, GUIDANCE: self.embeddings.new_tensor([scale])})

    def with_guidance_of(self, other: Condition) -> Condition:
        """The condition with the guidance scale of another, if it has one."""
        own = {name: value for name, value in other.extras.items() if name == GUIDANCE}
        return replace(self, extras={**self.extras, **own})

    def with_pictures_of(self, other: Condition) -> Condition:
        """The condition with the frames of another, if both have them."""
        own = {name: other.extras[name] for name in PICTURES if name in self.extras and name in other.extras}
        return replace(self, extras={**self.extras, **own})

    @property
    def compared(self) -> Condition:
        """The condition for predictions that are compared with the source's, without guidance of any kind."""
        return self

    def to(self, like: Tensor) -> Condition:
        """The condition on the device and in the dtype of a tensor; whole numbers stay whole."""
        extras = {
            name: value.to(like) if value.is_floating_point() else value.to(like.device)
            for name, value in self.extras.items()
        }
        return replace(self, embeddings=self.embeddings.to(like), extras=extras)
