"""FateZero (Qi et al., ICCV 2023, arXiv 2303.09535): fuse the source's attention without building attention maps.

The blend of self-attention (paper Eq. 7) has one mask value for each query row, so
    (M A_edit + (1 - M) A_src) V = M attn(Q_edit, K_edit, V) + (1 - M) attn(Q_src, K_src, V)
exactly, with V from the edit. In a video transformer a row is a token of the whole clip, and each kernel computes only
the rows that its mask selects. The masks are computed before the first step, from a few levels of the inversion,
because the edit's first blocks run before the source's last blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk
from ..attention.masks import GivenMask, HeatOverSteps, foreign_tokens, mask_sites, soft_mask, threshold_mask, word_heat
from ..attention.prompt import Alignment, PromptEdit, places_of
from ..diffusion.parts import BaseInjection, Edit, EditContext, Injected
from ..diffusion.prompt_mask import difference_levels, prompt_heat
from ..diffusion.reconstruction import reconstructed
from ..diffusion.source import Needs
from ..imports import F, torch
from ..settings import setting, steps_of_share, whole_steps
from ..store.budget import max_tokens
from ..store.records import SourceStep
from ..store.streams import mask_of_all, mask_of_video, video_frames, video_shape
from .fatezero_branch import Fuser, StepPlan
from .fatezero_presets import PRESETS
from .fatezero_shares import Shares, begin_and_end, check_shares
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

MaskFrom = Literal["attention", "prompts"]
BlendLatents = bool | Literal["authors"]
AttentionFrom = Literal["inversion", "reconstruction"]
GROUP = "FateZero"
Grid = tuple[int, int]
"""Height and width of a grid of tokens."""


@dataclass(frozen=True)
class FusionSettings(BaseInjection):
    """How much of the source's attention the edit uses.

    Shares of steps count from the noisy end. Raises ValueError for a value outside its range.
    """

    cross_replace_steps: float = setting(
        0.8,
        "Share of steps in which words common to both prompts take the source's cross-attention.",
        least=0, most=1, symbol="1 - t_c/T", step=0.01, group=GROUP,
    )  # fmt: skip
    self_replace_steps: float = setting(
        0.8,
        "Share of steps in which self-attention, which sets the layout, comes from the source.",
        least=0, most=1, symbol="1 - t_s/T", step=0.01, group=GROUP,
    )  # fmt: skip
    blend_self_attention: bool = setting(
        False, "Keep the edit's own self-attention inside the blend mask, so that shapes may change.", group=GROUP
    )
    blend_latents: BlendLatents = setting(
        False,
        "Restore the inversion's latents outside the mask, so that the background stays exact. authors: as their code "
        "does, latents one level noisier than the edit's, outside a mask of the edit's attention summed over all steps "
        "so far.",
        group=GROUP,
    )
    blend_threshold: float = setting(
        0.3,
        "Share of a frame's strongest attention that counts as the object; from 1 on, a mask from attention is empty.",
        least=0, symbol="tau", step=0.01, group=GROUP,
    )  # fmt: skip
    max_tokens: int | None = max_tokens()
    mask_tokens: int = setting(
        256, "A mask from attention uses the finest grid of at most this many tokens.", least=1, group=GROUP
    )
    mask_from: MaskFrom = setting(
        "attention",
        "attention: the paper's mask, from the source's cross-attention to the blend words, in each step (for a video "
        "transformer from both prompts, the same in all steps). prompts: a soft mask where the prompts' predictions "
        "differ and their blend words have attention, the same in all steps.",
        group=GROUP,
    )
    blend_latents_until: float = setting(
        0.8,
        "Share of steps up to which blend_latents keeps the background, starting at a fifth of them. The authors' code "
        "uses 0.8; 1 keeps most.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    separate_words: float = setting(
        0.0,
        "Inside the mask of both prompts, the share of the attention to words of neighbouring objects or the ground "
        "that goes to the other words, so that objects do not mix. For UNets.",
        least=0, most=1, step=0.01, group=GROUP,
    )  # fmt: skip
    cross_replace_from: float = setting(
        0.0, "Share of steps at which cross_replace_steps begins.", least=0, most=1, step=0.01, group=GROUP
    )
    self_replace_from: float = setting(
        0.0, "Share of steps at which self_replace_steps begins.", least=0, most=1, step=0.01, group=GROUP
    )
    cross_replace_words: Mapping[str, Shares] = setting(
        dict,
        "cross_replace_steps of single words of the target prompt: Porsche=0.2, or Porsche=0.1:0.4 with a beginning.",
        group=GROUP,
    )
    attention_from: AttentionFrom = setting(
        "inversion",
        "The source's attention. inversion: that of the inversion, as in the paper. reconstruction: that of guided "
        "sampling with the source prompt, as in Prompt-to-Prompt; the paper's ablation, which drifts from the video.",
        group=GROUP,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = {"cross_replace_steps": self.cross_replace_from, "self_replace_steps": self.self_replace_from}
        for name, begin in ends.items():
            check_shares(name, (begin, getattr(self, name)))
        for word, shares in self.cross_replace_words.items():
            check_shares(f"cross_replace_words: {word}", begin_and_end(shares))
        if self.separate_words and not self.masks_by_prompts:
            raise ValueError(
                'separate_words needs a mask of both prompts: mask_from="prompts", with blend_self_attention or '
                "blend_latents"
            )

    def cross_steps(self, steps: int) -> int:
        """The number of steps that fuse the cross-attention of any word."""
        return sum(self.fuses_cross(step, steps) for step in range(steps))

    def self_steps(self, steps: int) -> int:
        """The number of steps that fuse self-attention."""
        return len(self.self_range(steps))

    def fuses_cross(self, step: int, steps: int) -> bool:
        """Whether a step fuses the cross-attention of any word."""
        return any(step in self.cross_range(steps, word) for word in (None, *self.cross_replace_words))

    def cross_range(self, steps: int, word: str | None = None) -> range:
        """The steps that fuse the cross-attention of a word with shares of its own, or None for all other tokens."""
        own = None if word is None else self.cross_replace_words.get(word)
        begin, end = (self.cross_replace_from, self.cross_replace_steps) if own is None else begin_and_end(own)
        return range(steps_of_share(begin, steps), steps_of_share(end, steps))

    def aligned(self, alignment: Alignment, columns: Mapping[str, list[int]], step: int, steps: int) -> Alignment:
        """The alignment in a step. columns: of the words with shares of their own, in the target."""
        fused = torch.full_like(alignment.copied, step in self.cross_range(steps))
        for word, own in columns.items():
            fused[own] = float(step in self.cross_range(steps, word))
        return alignment.within(fused)

    def self_range(self, steps: int) -> range:
        """The steps that fuse self-attention."""
        return range(whole_steps(self.self_replace_from, steps), whole_steps(self.self_replace_steps, steps))

    @property
    def as_authors(self) -> bool:
        """Whether latents are blended as in the authors' code."""
        return self.blend_latents == "authors"

    def latent_steps(self, steps: int) -> range:
        """The steps after which latents are blended."""
        if not self.blend_latents:
            return range(0)
        until = self.blend_latents_until
        return range(whole_steps(0.2, steps), steps if until == 1 else whole_steps(until, steps) - 1)

    @property
    def blends(self) -> bool:
        return self.blend_self_attention or bool(self.blend_latents)

    @property
    def limits(self) -> bool:
        """Whether latents are kept outside the mask up to the last step."""
        return self.blend_latents is True and self.blend_latents_until == 1

    @property
    def masks_by_step(self) -> bool:
        """Whether it uses the paper's mask, recomputed in each step."""
        return self.blends and self.mask_from == "attention"

    @property
    def masks_by_prompts(self) -> bool:
        """Whether it uses the mask of both prompts."""
        return self.blends and self.mask_from == "prompts"

    def fuses(self, site: AttentionSite) -> bool:
        return self.max_tokens is None or site.tokens <= self.max_tokens

    # --- for the loop -------------------------------------------------------------------

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """A mask needs a setting that blends; blending needs the prompt pair."""
        in_area = edit.layout is not None and edit.layout.keeps_rest
        if edit.prompt is not None:
            self.check_words(edit.prompt.target)
        if edit.mask is not None and edit.prompt is not None and not (self.blends or in_area):
            raise ValueError("a mask needs blend_self_attention or blend_latents: no other setting uses a mask")
        if edit.prompt is None and self.blends:
            raise ValueError("blend_self_attention and blend_latents need prompt=PromptEdit(..., blend_words=...)")

    def check_words(self, target: str) -> None:
        """Raise ValueError for a word with shares of its own that the target prompt does not have."""
        for word in self.cross_replace_words:
            places_of(target, word, "cross_replace_words")

    def reads_source(self, step: int, steps: int) -> bool:
        plan = StepPlan.of(self, step, steps)
        return plan.fuse_cross or plan.fuse_self or plan.mask

    def preparing_calls(self, steps: int, edit: Edit, spans_clip: bool) -> int:
        """Calls for the reconstruction, for the mask of both prompts, and on a video transformer for any computed
        mask.
        """
        replaced = edit.mask is not None and edit.mask.replaces
        own_mask = (self.blends if spans_clip else self.masks_by_prompts) and not replaced
        replay = steps * (1 if edit.guidance_scale == 1 else 2) if self.attention_from == "reconstruction" else 0
        return replay + (2 * len(difference_levels(steps)) if own_mask else 0)

    def inside(self) -> Self:
        return replace(self, blend_latents=True, blend_latents_until=1.0)

    def summary(self, steps: int) -> str:
        return (
            f"fused cross-attention in {self.cross_steps(steps)} and self-attention in {self.self_steps(steps)} of "
            f"{steps} steps"
        )

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        """Raises ValueError for blend words or a mask that do not fit the edit."""
        return Injected(edit, context) if edit.prompt is None else Fusion(self, edit.prompt, edit, context)


_ALL_BUT_AN_AREA: dict[str, Any] = {
    "blend_self_attention": True, "blend_latents": True, "blend_latents_until": 1.0, "mask_from": "attention",
    "separate_words": 0.0,
}  # fmt: skip
"""Settings that keep the source outside a layout's area."""


class Fusion(Injected):
    """FateZero's fusion in one edit, its inputs checked."""

    def __init__(self, settings: FusionSettings, prompt: PromptEdit, edit: Edit, context: EditContext) -> None:
        self.context, self.store = context, context.store
        self.settings = settings
        self.own_level = settings.attention_from == "reconstruction"
        if self.own_level and context.store.drawn is not None:
            raise ValueError("attention_from is reconstruction, which needs an inversion: FlowEdit has none")
        self.guidance_scale, self.negative = edit.guidance_scale, edit.negative_embeddings
        given = edit.mask
        self.in_area = edit.layout is not None and edit.layout.keeps_rest
        if self.in_area:
            self.settings = settings = replace(settings, **_ALL_BUT_AN_AREA)
        source, target = context.store.source, context.target
        self.alignment = Alignment.nothing()
        self.columns_of_words: dict[str, list[int]] = {}
        self.wordless: list[int] = []
        if any(site.kind == "cross" for site in context.sites):
            self.alignment = prompt.align(source.text_tokens, target.text_tokens).to(context.like)
            self.columns_of_words = {
                word: prompt.token_indices(prompt.target, word, target.text_tokens, "cross_replace_words")
                for word in settings.cross_replace_words
            }
            self.wordless = prompt.wordless(prompt.source, source.text_tokens)
        else:
            check_joint(settings, prompt)
        self.given = given
        self.given_at: dict[Grid, Tensor] = {}
        """The given mask on each grid."""
        self.of_prompts: dict[Grid, Tensor] = {}
        """The mask of the prompts' difference on each grid, if the edit uses one."""
        self.foreign: Tensor | None = None
        """Where each target token belongs to another object, (frames, tokens, y, x), with `separate_words`."""
        self.masks_by_step = settings.masks_by_step and not context.spans_clip
        """Whether a step's mask comes from its own attention."""
        self.mask_sites: list[AttentionSite] = []
        self.blend_tokens: tuple[list[int], list[int]] = ([], [])
        self.over_steps: HeatOverSteps = HeatOverSteps()
        """The target's attention to its blend words, for a mask that sums it over steps."""
        if given is not None:
            self.given_at = self._on_grids(given)
        if settings.blends and not self.in_area and not (given is not None and given.replaces):
            if settings.masks_by_step or prompt.blend_words is not None:
                self.blend_tokens = prompt.blend_tokens(source.text_tokens, target.text_tokens)
            if settings.masks_by_step and not self.blend_tokens[0]:
                raise ValueError("a mask from attention needs blend_words of the source prompt")
            if self.masks_by_step:
                self.mask_sites = mask_sites(context.sites, settings.mask_tokens)

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Compute the reconstruction, and the mask of the two prompts or of a layout's area, if the edit uses them."""
        if self.own_level:
            context = self.context
            self.store = reconstructed(context.denoiser, context.store, self.negative, self.guidance_scale, chunks)
        if self.context.area is not None:
            area = self.context.area
            if self.given is None:
                self.given = GivenMask(area)
            elif not self.given.replaces:
                own = self.given.at((area.shape[1], area.shape[2]), len(area))
                self.given = GivenMask(self.given.joined(own, area))
            self.given_at = self._on_grids(self.given)
            return
        replaced = self.given is not None and self.given.replaces
        if replaced or not self.settings.blends or self.masks_by_step:
            return
        context, words, threshold = self.context, self.blend_tokens, self.settings.blend_threshold
        sites = mask_sites(context.sites, self.settings.mask_tokens) if any(words) else []
        heat = prompt_heat(context.denoiser, context.store, context.target, words, sites, chunks)
        if self.settings.masks_by_step:
            by_grid = [{grid: threshold_mask(own, grid, threshold) for grid in self._grids()} for own in heat.words]
            like = context.latents_like
            self.of_prompts = {grid: torch.stack([m[grid] for m in by_grid]).amax(0).to(like) for grid in by_grid[0]}
            return
        if self.settings.separate_words and heat.tokens is not None and not context.spans_clip:
            of_source = foreign_tokens(heat.tokens, words[0], self.wordless)
            self.foreign = torch.einsum("fsyx,sc->fcyx", of_source, self.alignment.matrix.to(of_source))
            self.foreign[:, words[1]] = 0
        self.of_prompts = self._on_grids(GivenMask(soft_mask(heat.edit, threshold)))

    def _on_grids(self, mask: GivenMask) -> dict[Grid, Tensor]:
        """A mask on the grids of the video's latents and of the attention layers."""
        store, like = self.context.store, self.context.latents_like
        of_video, frames = mask_of_video(store, mask), video_shape(store)[0]
        return {grid: of_video.at(grid, frames).to(like) for grid in self._grids()}

    def _grids(self) -> set[Grid]:
        """Of the video's latents and of the attention layers."""
        _, height, width = video_shape(self.context.store)
        return {(height, width)} | {(site.height, site.width) for site in self.context.sites}

    def plan(self, step: int) -> StepPlan:
        plan = StepPlan.of(self.settings, step, self.context.steps)
        return plan if self.masks_by_step else replace(plan, mask=False)

    def needs(self, step: int) -> Needs:
        layers = self.plan(step).layers(self.settings, self.context.sites, self.mask_sites)
        return Needs(layers, own_level=self.own_level)

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        """Of the target's branch, and of the negative prompt's, which is not changed."""
        return self._control(source, self.plan(step), self.alignment_at(step)), Control(source.key_frames, source.chunk)

    def alignment_at(self, step: int) -> Alignment:
        """The alignment of a step, in which words outside their own share of steps keep the edit's attention."""
        if not self.columns_of_words:
            return self.alignment
        return self.settings.aligned(self.alignment, self.columns_of_words, step, self.context.steps)

    def _control(self, source: SourceStep, plan: StepPlan, alignment: Alignment) -> Control:
        if not (
            plan.fuse_cross or plan.fuse_self or plan.target_maps or plan.blend_latents or self.foreign is not None
        ):
            return Control(source.key_frames, source.chunk)
        masks = None
        if (plan.fuse_self and self.settings.blend_self_attention) or self.in_area:
            sites = self.context.sites
            grids = {(s.height, s.width) for s in sites if self.settings.fuses(s)}
            masks = self.masks(grids, [self.source_heat(source)] if self.mask_sites else [], source.chunk)
        keep = frozenset(s.name for s in self.mask_sites) if plan.target_maps else frozenset()
        shares = self.shares(source.chunk)
        return Fuser(source, alignment, self.settings, plan, masks, shares, keep, self.in_area)

    def shares(self, chunk: Chunk) -> dict[Grid, Tensor] | None:
        """The share of its attention to each target token that each position of a chunk keeps, on each grid.

        (frames of the chunk, tokens, y, x); smaller for other objects' tokens inside the mask.
        """
        if self.foreign is None:
            return None
        foreign = self.foreign[list(chunk.frame_indices)]
        grids = {(site.height, site.width) for site in self.context.sites if site.kind == "cross"}
        masks = self.masks(grids, [], chunk)
        scaled = {grid: F.interpolate(foreign, size=grid, mode="bilinear", align_corners=False) for grid in grids}
        less = self.settings.separate_words
        return {grid: 1 - less * masks[grid][:, None] * scaled[grid] for grid in grids}

    def latent_mask(self, source: SourceStep, control: Control, step: int) -> Tensor | None:
        """The mask of the blend words in source and target: (frames of the chunk, 1, h, w)."""
        plan, heats = self.plan(step), []
        if isinstance(control, Fuser) and plan.target_maps and self.mask_sites:
            own = word_heat([(site, control.map_of(site)) for site in self.mask_sites], self.blend_tokens[1])
            heats = [self.over_steps.add(own, source.chunk.frame_indices, step) if self.settings.as_authors else own]
        if not (plan.blend_latents and isinstance(control, Fuser)):
            return None
        heats += [self.source_heat(source)] if self.mask_sites else []
        _, height, width = video_shape(self.context.store)
        of_video = self.masks({(height, width)}, heats, source.chunk)[height, width]
        return mask_of_all(self.context.store, of_video, self.given, source.chunk)[:, None]

    def attention_mask(self, control: Control) -> Tensor | None:
        """On the finest grid of the layers that it acts in."""
        masks = control.masks if isinstance(control, Fuser) and control.plan.fuse_self else None
        return masks[max(masks)] if masks else None

    def blends_latents(self, step: int) -> bool:
        return self.plan(step).blend_latents

    def restored_level(self, level: int) -> int:
        return level if self.settings.as_authors else super().restored_level(level)

    def source_heat(self, source: SourceStep) -> Tensor:
        return word_heat(source.maps(self.mask_sites, self.context.denoiser.dtype), self.blend_tokens[0])

    def masks(self, grids: set[Grid], heats: list[Tensor], chunk: Chunk) -> dict[Grid, Tensor]:
        """The blend mask of a chunk on some grids: the union of the computed masks, joined with the given mask."""
        frames, found = video_frames(self.context.store, chunk), {}
        for grid in grids:
            masks = [threshold_mask(heat, grid, self.settings.blend_threshold) for heat in heats]
            masks += [self.of_prompts[grid][frames]] if self.of_prompts else []
            if self.given is not None:
                given = self.given_at[grid][frames]
                masks = [self.given.joined(given, torch.stack(masks).amax(0)) if masks else given]
            found[grid] = torch.stack(masks).amax(0)
        return found


def check_joint(settings: FusionSettings, prompt: PromptEdit) -> None:
    """Raise ValueError for settings of cross-attention, which a model of joint layers does not have."""
    for name, used in (("cross_replace_words", settings.cross_replace_words), ("reweight", prompt.reweight)):
        if used:
            raise ValueError(
                f"{name} needs cross-attention, but this model attends to text and video in one layer, where the text "
                "stays the edit's: leave it out"
            )


_LATER = ("cross_replace_from", "self_replace_from", "cross_replace_words", "attention_from")
METHOD = Method(
    name="fatezero",
    title="FateZero",
    paper="Qi et al., ICCV 2023, arXiv 2303.09535",
    sentence="Fuses the inversion's self- and cross-attention into the edit, word by word and under a blend mask.",
    part="injection",
    settings=FusionSettings,
    presets=PRESETS,
    node_id="FateZeroFusion",
    node_title="FateZero Settings",
    node_text="How much of the source's attention an edit uses, for preset custom of Edit Video.",
    aliases=("attention fusion", "cross replace steps", "self replace steps", "blend mask"),
    advanced=("max_tokens", "mask_tokens", *_LATER),
    later=_LATER,
)
