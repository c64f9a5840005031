"""FateZero's branch in one step of an edit: fuse the source's attention layer by layer without building maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange

from ..attention.control import AttentionSite, attention_map, over_windows
from ..attention.key_frames import Chunk, as_one
from ..attention.prompt import Alignment
from ..diffusion.parts import SourceControl
from ..imports import torch
from ..store.records import Map, QueriesKeys, SourceStep

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from .fatezero import FusionSettings, Grid


@dataclass(frozen=True)
class StepPlan:
    """What one step of the edit fuses.

    mask: whether it needs a mask from the source's attention. target_maps: whether a mask of latents needs the target's
    maps of this step.
    """

    fuse_cross: bool
    fuse_self: bool
    blend_latents: bool
    mask: bool
    target_maps: bool = False

    @property
    def fuses(self) -> bool:
        """Whether the step needs more than the edit's own attention."""
        return self.fuse_cross or self.fuse_self or self.blend_latents or self.target_maps

    @classmethod
    def of(cls, fusion: FusionSettings, step: int, steps: int) -> StepPlan:
        """The plan of step `step` of `steps`, 0 being the noisiest."""
        fuse_self = step in fusion.self_range(steps)
        blend_latents = step in fusion.latent_steps(steps)
        mask = blend_latents or (fuse_self and fusion.blend_self_attention)
        target_maps = blend_latents or (fusion.as_authors and step < fusion.latent_steps(steps).stop)
        fuse_cross = fusion.fuses_cross(step, steps)
        return cls(fuse_cross, fuse_self, blend_latents, mask and fusion.masks_by_step, target_maps)

    def layers(self, fusion: FusionSettings, sites: list[AttentionSite], mask_sites: list[AttentionSite]) -> set[str]:
        """Names of the layers whose source attention this step reads."""
        fused = {"cross": self.fuse_cross, "self": self.fuse_self, "joint": self.fuse_self}
        names = {site.name for site in sites if fusion.fuses(site) and fused.get(site.kind)}
        return names | {site.name for site in mask_sites} if self.mask else names


class Fuser(SourceControl):
    """The conditional branch of the edit at one step, fused with the source's.

    masks: (height, width) of a grid -> its mask (f, height, width) of the chunk's frames, 1 where the edit keeps its
    own self-attention. shares: grid -> the share of its attention to each target token that each position keeps,
    (f, c, height, width) in 0..1; None for all. keep: the layers whose own cross maps are recorded in `maps`.
    own_words: whether the edit also keeps its own cross-attention where a mask is 1.
    """

    def __init__(
        self,
        source: SourceStep,
        alignment: Alignment,
        fusion: FusionSettings,
        plan: StepPlan,
        masks: dict[tuple[int, int], Tensor] | None = None,
        shares: dict[tuple[int, int], Tensor] | None = None,
        keep: frozenset[str] = frozenset(),
        own_words: bool = False,
    ) -> None:
        super().__init__(source)
        self.alignment = alignment
        self.fusion = fusion
        self.plan = plan
        self.masks = masks
        self.shares = shares
        self.keep = keep
        self.own_words = own_words
        self.maps: dict[str, Tensor] = {}
        """Of the first evaluation, because a host's guidance may evaluate the branch again."""

    def on(self, chunk: Chunk) -> Self:
        own, rows = super().on(chunk), self.chunk.rows(chunk)
        own.maps = {}
        own.masks, own.shares = (x and {grid: m[rows] for grid, m in x.items()} for x in (self.masks, self.shares))
        return own

    def map_of(self, site: AttentionSite) -> Tensor:
        """The recorded cross map of a layer."""
        if self.windows:
            maps = {frames: control.maps[site.name] for frames, control in self.windows.items()}
            return over_windows(maps, self.chunk.frame_indices)
        return self.maps[site.name]

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        if not (self.plan.fuse_self and self.fusion.fuses(site)):
            return super().self_attention(q, k, v, site)
        if self.masks is not None and self.key_frames.everyone:
            return self._blended_by_token(q, k, v, self.masks[site.height, site.width], site)
        source = self._source(v, site)
        if self.masks is None:
            return source
        return self._blended(super().self_attention(q, k, v, site), source, self.masks, site)

    def _blended_by_token(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, site: AttentionSite) -> Tensor:
        """`_blended` where all tokens of the clip attend to each other; computes only rows with a weight above 0."""
        m, v = rearrange(mask, "f y x -> (f y x)").to(q), as_one(v)
        record = self.source.of_queries(site)
        if isinstance(record, Map):
            source = rearrange(record.probabilities.to(v), "f h t n -> 1 h (f t) n") @ v
            own = self.attend(as_one(q), as_one(k), v)
            return rearrange(m[:, None] * own + (1 - m[:, None]) * source, "1 h (f t) d -> f h t d", f=len(q))
        output = torch.zeros_like(as_one(q))
        self._add(output, m, as_one(q), as_one(k), v)
        self._add(output, 1 - m, as_one(record.queries(q.dtype)), as_one(record.keys(q.dtype)), v)
        return rearrange(output, "1 h (f t) d -> f h t d", f=len(q))

    def _add(self, output: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add weight A v to an output of the queries (1 h n d); the kernel computes only rows with a weight above 0.

        weight: of each query, (n,).
        """
        rows = weight.nonzero()[:, 0]
        if len(rows) == len(weight):
            output += weight[:, None] * self.attend(q, k, v)
        elif len(rows):
            output.index_add_(2, rows, weight[rows, None] * self.attend(q[:, :, rows], k, v))

    def joint_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        """Outside the mask, the video's rows take the source's queries and keys; all others are the edit's own."""
        if not (self.plan.fuse_self and self.fusion.fuses(site)):
            return super().joint_attention(q, k, v, site)
        record, video = self.source.record(site.name), site.rows("video")
        assert isinstance(record, QueriesKeys)
        keys, queries = k.clone(), record.queries(q.dtype)
        keys[:, :, video] = record.keys(k.dtype)
        if self.masks is None:
            before, after = (q[:, :, part] for part in (slice(video.start), slice(video.stop, None)))
            parts = ((before, k), (queries, keys), (after, k))
            return torch.cat([self.attend(*pair, v) for pair in parts if pair[0].shape[2]], 2)
        own, output = q.new_ones(q.shape[2]), torch.zeros_like(q)
        own[video] = self.masks[site.height, site.width].reshape(-1).to(q)
        self._add(output, own, q, k, v)
        self._add(output[:, :, video], 1 - own[video], queries, keys, v)
        return output

    @staticmethod
    def _blended(own: Tensor, source: Tensor, masks: dict[Grid, Tensor], site: AttentionSite) -> Tensor:
        """M own + (1 - M) source, of outputs (f h t d)."""
        mask = rearrange(masks[site.height, site.width], "f y x -> f 1 (y x) 1").to(own)
        return mask * own + (1 - mask) * source

    def _source(self, v: Tensor, site: AttentionSite) -> Tensor:
        """A_src @ v; if all key frames attend to each other, so do the source's queries and keys."""
        record = self.source.record(site.name)
        if self.extended and isinstance(record, QueriesKeys):
            return super().self_attention(record.queries(v.dtype), record.keys(v.dtype), v, site)
        return self.source.apply_self(site, self.of_key_frames(v, site), self.attend)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
        fuses, keeps = self.plan.fuse_cross and self.fusion.fuses(site), site.name in self.keep
        if not (fuses or keeps or self.shares):
            return super().cross_attention(q, k, v, site)
        attend = self.attend
        if keeps or self.shares:
            own = attention_map(q, k)
            attend = lambda q, k, v: own @ v  # noqa: E731
        if keeps:
            self.maps.setdefault(site.name, own)
        if self.shares:
            fused = self.alignment.fused(self.source.cross_map(site, q.dtype), own) if fuses else own
            return _shared(fused, self.shares[site.height, site.width]) @ v
        if not fuses:
            return attend(q, k, v)
        of_source, of_own = self.alignment.values(v)
        fused = self.source.apply_cross(site, of_source, self.attend) + attend(q, k, of_own)
        if not (self.own_words and self.masks):
            return fused
        return self._blended(attend(q, k, v), fused, self.masks, site)


def _shared(map: Tensor, shares: Tensor) -> Tensor:
    """A map (f h t c) scaled by the shares of `Fuser` and normalized to its former sum."""
    kept = map * rearrange(shares, "f c y x -> f 1 (y x) c").to(map)
    tiny = torch.finfo(map.dtype).tiny
    return kept * (map.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=tiny))
