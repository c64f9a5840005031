"""Facts of a model family that hold in every host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..diffusion.schedule import Formulation


@dataclass(frozen=True)
class Family:
    """Facts of a model family.

    title: its name in messages. network: the name of its denoising network. formulation: "ddim" if the network predicts
    epsilon, v or the sample, "flow" if it predicts a velocity. spans_clip: every frame of a call attends to all frames
    of the call, so that key frames, TokenFlow and flow smoothing do not apply. group_norms: it has GroupNorms, whose
    statistics `clip_norm` shares over frames. half: the dtype for a GPU. demo, demo_folder: the bundled demo model.
    attention: whether its attention can be controlled. words: whether text columns stand for words, as masks of words,
    reweighting and heat maps need. joint: whether its layers attend to text and video at once. subset_patch: the side
    of a token in latents, if a branch can have some tokens only (`Control.rows`); else 0. trained_frames: see
    `Denoiser.trained_frames`.
    """

    title: str
    network: str
    formulation: Formulation
    spans_clip: bool
    half: str
    group_norms: bool = False
    demo: str = ""
    demo_folder: Path = Path()
    attention: bool = True
    words: bool = True
    joint: bool = False
    subset_patch: int = 0
    trained_frames: int | None = None

    def subset_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """The tokens of a frame of latents, if a branch can have some of them only: (rows, columns)."""
        patch = self.subset_patch
        return (-(-height // patch), -(-width // patch)) if patch else None


def frames_of_latents(frames: int, frames_per_latent: int) -> list[int]:
    """The latent of each frame of a clip."""
    return [latent_frames(i + 1, frames_per_latent) - 1 for i in range(frames)]


def latent_frames(frames: int, frames_per_latent: int) -> int:
    """The number of latents of a clip: the first codes one frame, each other `frames_per_latent` frames."""
    return 1 + -(-(frames - 1) // frames_per_latent)
