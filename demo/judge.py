"""The judge of demo edits: a classifier that reads the words of scenes from pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..files.bundled import DEMO
from .model import SceneClassifier
from .scenes import SIZE, Place, Scene, Track


@cache
def load_judge(checkpoint: Path = DEMO) -> SceneClassifier:
    """The bundled classifier."""
    judge = SceneClassifier()
    judge.load_state_dict({k: v.float() for k, v in load_file(checkpoint / "judge" / "model.safetensors").items()})
    return judge.eval()


def read_words(
    source: Scene, target: Scene, frames: Tensor, tracks: Sequence[Track] = ()
) -> tuple[float, float, float]:
    """Shares of frames where all words, the changed words, and the other words are read as in the target.

    tracks: of the things, in scenes of several.
    """
    read = words_by_frame(source, target, frames, tracks)
    every, of_edit, of_rest = (
        sum(column) / len(frames) for column in zip(*((a and b, a, b) for a, b in read), strict=True)
    )
    return every, of_edit, of_rest


def words_by_frame(
    source: Scene, target: Scene, frames: Tensor, tracks: Sequence[Track] = ()
) -> list[tuple[bool, bool]]:
    """Whether the changed words, and the other words, of each frame are read as in the target."""
    judge = load_judge()
    whole = judge.read(frames)
    several = len(target.things) > 1
    close = [judge.read(close_up(frames, track)) for track in tracks] if several else [whole]
    changed, right = target.changed_from(source), list[tuple[bool, bool]]()
    for t in range(len(frames)):
        found: dict[Place, bool] = {
            (None, word): whole[t][word] == getattr(target, word) for word in ("background", "style")
        }
        for i, thing in enumerate(target.things):
            found |= {(i, word): close[i][t][word] == getattr(thing, word) for word in ("colour", "shape", "texture")}
        of_edit = all(found[place] for place in changed)
        of_rest = all(ok for place, ok in found.items() if place not in changed)
        right.append((of_edit, of_rest))
    return right


def close_up(frames: Tensor, track: Track, margin: float = 2.0) -> Tensor:
    """One of several things at the size of the judge's training: a square of `margin` radii around its track."""
    t = torch.arange(len(frames), dtype=torch.float32).view(-1, 1)
    (cx, cy), reach = track.centre(t), track.scale(t) * margin
    along = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    x, y = ((centre + reach * along) * 2 / SIZE - 1 for centre in (cx, cy))
    grid = torch.stack([x[:, None, :].expand(-1, SIZE, -1), y[:, :, None].expand(-1, -1, SIZE)], -1)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
