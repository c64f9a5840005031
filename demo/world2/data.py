"""Latents of rendered pictures and clips of world 2, kept in files of a folder and rendered when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...files.whole import whole_file
from ..scenes import Clip
from ..train import encode, in_bytes
from .model import LATENT_SIZE
from .render import render
from .scenes import FRAMES, MAY_LACK, SHAPES, Motion, Scene, scenes

Job = tuple[int, int, bool]
"""A worker's job: seed, number of scenes, whether each is a clip."""


def scenes_of(job: Job) -> Iterator[tuple[Scene, Motion]]:
    seed, count, _ = job
    return islice(scenes(seed, held_out=False), count)


def rendered(job: Job) -> tuple[Tensor, Tensor]:
    """Frames (n, 3, SIZE, SIZE), uint8, and `owners` of the scenes of a job."""
    random, found = Random(job[0]), list[tuple[Tensor, Tensor]]()
    for scene, motion in scenes_of(job):
        clip = render(scene, motion, at=None if job[2] else [random.uniform(-0.5, 0.5)])
        found.append((in_bytes(clip.frames), owners(scene, clip)))
    frames, owned = zip(*found, strict=True)
    return torch.cat(frames), torch.cat(owned)


def owners(scene: Scene, clip: Clip) -> Tensor:
    """The shape that covers each place of the latents, (frames, LATENT_SIZE, LATENT_SIZE), uint8: 0 is the ground."""
    cover, thing = F.adaptive_avg_pool2d(clip.masks, LATENT_SIZE).max(0)
    shapes = torch.tensor([SHAPES.index(thing.shape) + 1 for thing in scene.things])
    return torch.where(cover > 0.25, shapes[thing], 0).byte()


NOTHING = 255
"""Among `owners_of_words`: a word that describes no place."""


def owners_of_words(caption: str, length: int, before: int = 0) -> Tensor:
    """What each token of a caption describes, (length,), uint8, by the numbers of `owners`; NOTHING beyond its words.

    before: tokens in front of the first word. Every word is one token.
    """
    described = Scene.parse(caption).described() if caption else []
    numbers = [NOTHING if of is None else SHAPES.index(of) + 1 if of else 0 for _, of in described]
    return torch.tensor([NOTHING] * before + numbers + [NOTHING] * length, dtype=torch.uint8)[:length]


def captions_of(job: Job) -> list[tuple[str, str]]:
    """Two captions of each scene: with all words, and without some of size, action and place."""
    random = Random(f"captions {job[0]}")
    return [
        (scene.caption, scene.caption_without(tuple(kind for kind in MAY_LACK if random.random() < 0.5)))
        for scene, _ in scenes_of(job)
    ]


@dataclass(eq=False)
class Latents:
    """A growing set of pictures or clips.

    latents: (n, frames, 4, LATENT_SIZE, LATENT_SIZE) in float16; owners: see `owners`, with frames.
    """

    folder: Path
    vae: AutoencoderKL
    clips: bool
    seed: int = 0
    part: int = 25
    parts: int = 40
    """Scenes of a job, and jobs of a file."""
    map: Callable[[Callable[[Job], tuple[Tensor, Tensor]], list[Job]], Iterable[tuple[Tensor, Tensor]]] = map
    latents: list[Tensor] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    captions: list[tuple[str, str]] = field(default_factory=list)

    def grow(self, count: int) -> bool:
        """Have at least `count` scenes, in whole files; whether there are new ones."""
        before = len(self.captions)
        while len(self.captions) < count:
            self._add(len(self.latents))
        return len(self.captions) > before

    def _add(self, number: int) -> None:
        jobs = [(1000 * (self.seed * 1000 + number) + n, self.part, self.clips) for n in range(self.parts)]
        path = self.folder / f"{'clips' if self.clips else 'pictures'}-{self.seed}-{number}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                save_file(self._encoded(jobs), partial)
        kept = load_file(path)
        self.latents.append(kept["latents"])
        self.owners.append(kept["owners"])
        self.captions += [caption for job in jobs for caption in captions_of(job)]

    def _encoded(self, jobs: list[Job]) -> dict[str, Tensor]:
        frames, latents, owned = FRAMES if self.clips else 1, list[Tensor](), list[Tensor]()
        for pictures, found in self.map(rendered, jobs):
            with torch.autocast(self.vae.device.type, torch.bfloat16):
                latents.append(encode(self.vae, pictures, 16).half().unflatten(0, (-1, frames)))
            owned.append(found.unflatten(0, (-1, frames)))
        return {"latents": torch.cat(latents), "owners": torch.cat(owned)}

    def at(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and owners of some scenes."""
        places = [divmod(n, self.part * self.parts) for n in chosen.tolist()]
        latents, owned = (torch.stack([kept[a][b] for a, b in places]) for kept in (self.latents, self.owners))
        return latents.float(), owned
