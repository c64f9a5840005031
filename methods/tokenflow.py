"""TokenFlow (Geyer et al., ICLR 2024, arXiv 2307.10373): propagate edited key frames along the source's features.

Each step samples one key frame (pivot) from each batch of frames and edits the pivots together, with attention to the
keys and values of all pivots (Sec. 4.1). Then all frames take their self-attention from the pivots: a token takes the
output of its nearest neighbour in the source's pivots, mixed over two of them (Eq. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..attention.control import AttentionSite, Control, Gather
from ..attention.key_frames import Chunk
from ..diffusion.branches import Branches
from ..diffusion.parts import Edit, Prediction, check_needs_unet
from ..imports import F, np, torch
from ..settings import check, setting
from ..store.records import Recorder
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["authors", "paper", "linear"]
PivotChoice = Literal["random", "fixed"]
TITLE = GROUP = "TokenFlow"
BLOCK = {"cpu": 2**20, "gpu": 2**24}
"""The number of similarities that the neighbour search computes at once: fits a CPU's cache, or fills a GPU."""


@dataclass(frozen=True)
class TokenFlowSettings:
    """How edited pivots propagate to all frames.

    pivots: (steps, batches) indices of the pivots, in the order of the steps, a tensor or nested lists; None: those of
    `pivot_choice`. Raises ValueError for an unknown word or a number outside its range.
    """

    batch_frames: int = setting(
        8,
        "Frames in a batch: each step samples one pivot from each batch, and a UNet call takes one batch.",
        least=1, symbol="B", group=GROUP,
    )  # fmt: skip
    weights: Weights = setting(
        "authors",
        "How a frame mixes two pivots. paper: the nearest before and after, by sigmoid(d- / (d+ + d-)), Eq. 7. linear: "
        "the same without the sigmoid. authors, as their code: those of its own batch and the batch before, by the "
        "distances to the centres of these batches.",
        group=GROUP,
    )
    seed: int = setting(0, "Random seed for the pivots.", least=0, most=2**63 - 1, group=GROUP)
    pivot_choice: PivotChoice = setting(
        "random",
        "The pivot of a batch. random: another frame in each step, as in the paper. fixed: its middle frame in every "
        "step, the paper's ablation.",
        group=GROUP,
    )
    pivots: Tensor | Sequence[Sequence[int]] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check(self)

    def batches(self, clip: int) -> list[range]:
        """The clip's frames in batches of B; the last one may be shorter."""
        return [range(clip)[at : at + self.batch_frames] for at in range(0, clip, self.batch_frames)]

    def chunks(self, clip: int, chunk_frames: int | None) -> list[tuple[int, range]]:
        """(number of the batch, frames) of each call: the batches, or parts of them if they exceed chunk_frames."""
        longest = min(self.batch_frames, chunk_frames or clip)
        return [
            (number, batch[at : at + longest])
            for number, batch in enumerate(self.batches(clip))
            for at in range(0, len(batch), longest)
        ]

    def key_frames(self, clip: int, steps: int) -> list[list[int]]:
        """The pivots of every step, one from each batch.

        Raises ValueError for pivots of another shape, or outside their batch.
        """
        batches = self.batches(clip)
        if self.pivots is None and self.pivot_choice == "fixed":
            return [[batch[len(batch) // 2] for batch in batches]] * steps
        if self.pivots is None:
            draw = torch.Generator().manual_seed(self.seed)
            drawn = [[int(torch.randint(len(b), (1,), generator=draw)) for b in batches] for _ in range(steps)]
            return [[b[i] for b, i in zip(batches, row, strict=True)] for row in drawn]
        given: Any = self.pivots.tolist() if isinstance(self.pivots, torch.Tensor) else self.pivots
        shape = np.shape(given)
        if shape != (steps, len(batches)):
            raise ValueError(f"pivots has shape {shape}; it must be {(steps, len(batches))}, (steps, batches)")
        if not all(frame in batch for row in given for frame, batch in zip(row, batches, strict=True)):
            raise ValueError("pivots must hold one frame of each batch, in order")
        return [list(map(int, row)) for row in given]

    def check(self, edit: Edit, spans_clip: bool) -> None:
        check_needs_unet(TITLE, spans_clip)

    def predict(
        self, step: int, steps: int, clip: int, branches: Branches, chunk_frames: int | None
    ) -> list[tuple[Chunk, Prediction]]:
        """A step's predictions of the batches, propagated from its pivots (paper Fig. 3, Alg. 1)."""
        pivots = self.key_frames(clip, steps)[step]
        outputs: dict[str, dict[str, Tensor]] = {"source": {}, "target": {}, "negative": {}}

        def keep(branch: str, control: Control) -> None:
            if isinstance(control, Recorder):
                control.captured.inputs = {}
            control.captured.outputs = outputs[branch]
            control.extended = branch != "source"

        source = branches.source(Chunk.of(pivots, clip), keep)
        branches.edit(source.step, keep)  # this result is discarded: the pivots run again below
        assert source.captured.inputs is not None
        keys = KeyTokens(source.captured.inputs)
        found = []
        for batch, frames in self.chunks(clip, chunk_frames):
            neighbours = Neighbours(keys, [self.mixture(frame, batch, pivots) for frame in frames])

            def take(branch: str, control: Control, neighbours: Neighbours = neighbours) -> None:
                control.gather = _gathering(neighbours, outputs[branch], finds=branch == "source")

            chunk = Chunk.of(frames, clip)
            found.append((chunk, branches.edit(branches.source(chunk, take).step, take)))
        return found

    def evaluated(self, clip: int) -> float:
        return 1 + len(self.batches(clip)) / clip

    def summary(self, clip: int) -> str:
        return (
            f"TokenFlow: {len(self.batches(clip))} {self.pivot_choice} pivots a step for {clip} frames, in batches of "
            f"{self.batch_frames}, weights {self.weights}"
        )

    def mixture(self, frame: int, batch: int, pivots: Sequence[int]) -> list[tuple[int, float]]:
        """(index of a pivot, weight) pairs of a frame; the weights sum to 1."""
        if self.weights == "authors":
            if batch == 0:
                return [(0, 1.0)]
            own = batch * self.batch_frames + self.batch_frames // 2
            d_own, d_before = abs(frame - own), abs(frame - (own - self.batch_frames))
            weight = _sigmoid(d_before / (d_own + d_before))
            return [(batch, weight), (batch - 1, 1 - weight)]
        before = [i for i, pivot in enumerate(pivots) if pivot <= frame]
        after = [i for i, pivot in enumerate(pivots) if pivot >= frame]
        if not before or not after or before[-1] == after[0]:
            return [((before or after)[-1 if before else 0], 1.0)]
        d_before, d_after = frame - pivots[before[-1]], pivots[after[0]] - frame
        share = d_before / (d_before + d_after)
        weight = share if self.weights == "linear" else _sigmoid(share)
        return [(after[0], weight), (before[-1], 1 - weight)]


def _sigmoid(x: float) -> float:
    return float(torch.tensor(x).sigmoid())


class KeyTokens:
    """The source's inputs to each self-attention layer on a step's pivots: (pivots, tokens, channels)."""

    def __init__(self, tokens: dict[str, Tensor]) -> None:
        self._unit = {name: F.normalize(x, dim=-1) for name, x in tokens.items()}

    def nearest(self, layer: str, pivot: int, unit: Tensor) -> Tensor:
        """The index of a pivot's most similar token, for tokens (f t c) of length 1: (f t)."""
        return search(unit.flatten(0, 1), self._unit[layer][pivot]).view(unit.shape[:2])


class Neighbours:
    """The nearest token in the pivots for each token of some frames, found layer by layer as the source runs.

    mixtures: the pivots and weights of each frame, see `TokenFlowSettings.mixture`.
    """

    def __init__(self, keys: KeyTokens, mixtures: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._keys = keys
        self._mixtures = mixtures
        self._found: dict[str, dict[tuple[int, int], Tensor]] = {}

    def find(self, tokens: Tensor, site: AttentionSite) -> None:
        """Find the neighbours of the source's tokens (f t c) at a layer."""
        unit = F.normalize(tokens, dim=-1)
        found: dict[tuple[int, int], Tensor] = {}
        for pivot in {pivot for mixture in self._mixtures for pivot, _ in mixture}:
            frames = [i for i, mixture in enumerate(self._mixtures) if pivot in dict(mixture)]
            of_frames = self._keys.nearest(site.name, pivot, unit[frames])
            found |= {(i, pivot): nearest for i, nearest in zip(frames, of_frames, strict=True)}
        self._found[site.name] = found

    def gather(self, outputs: Tensor, site: AttentionSite) -> Tensor:
        """The frames' outputs (f t c) of a layer, gathered from the pivots' outputs (pivots, t, c), paper Eq. 4."""
        found = self._found[site.name]
        frames = []
        for i, mixture in enumerate(self._mixtures):
            parts = [weight * outputs[pivot].index_select(0, found[i, pivot]) for pivot, weight in mixture]
            frames.append(sum(parts[1:], parts[0]))
        return torch.stack(frames)


def nearest(tokens: Tensor, among: Tensor) -> Tensor:
    """The index of the most similar token, by cosine: (t c), (s c) -> (t)."""
    return search(F.normalize(tokens, dim=-1), F.normalize(among, dim=-1))


def search(unit: Tensor, among: Tensor) -> Tensor:
    """`nearest` of vectors of length 1, in blocks of pairs to limit memory."""
    block = BLOCK["cpu" if unit.device.type == "cpu" else "gpu"]
    return torch.cat([(part @ among.T).max(-1).indices for part in unit.split(max(1, block // len(among)))])


def _gathering(neighbours: Neighbours, outputs: dict[str, Tensor], finds: bool = False) -> Gather:
    """The `Gather` of a branch's layers on a batch. finds: whether it finds the neighbours."""

    def gather(tokens: Tensor, site: AttentionSite) -> Tensor:
        if finds:
            neighbours.find(tokens, site)
        return neighbours.gather(outputs[site.name], site)

    return gather


METHOD = Method(
    name="tokenflow",
    title=TITLE,
    paper="Geyer et al., ICLR 2024, arXiv 2307.10373",
    sentence="Edits key frames (pivots) together; all frames take their self-attention from these, token by token.",
    part="propagation",
    settings=TokenFlowSettings,
    presets={"tokenflow": {"injection": "pnp", "propagation": "tokenflow", "key_frames": ("self",)}},
    node_id="FateZeroTokenFlow",
    node_title="TokenFlow (FateZero)",
    node_text="Consistent frames with TokenFlow (arXiv 2307.10373): pivots are edited together, and all frames take "
    "their self-attention from these, token by token. For Edit Video, with any preset.",
    aliases=("tokenflow", "temporal consistency", "propagation", "flicker"),
    advanced=("seed", "pivot_choice"),
    later=("pivot_choice",),
)
