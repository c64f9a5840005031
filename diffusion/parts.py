"""The parts of an edit: injection from the source, propagation over frames, start, smoothing and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..attention.condition import Condition
from ..attention.control import AttentionSite, Control
from ..attention.key_frames import Chunk
from ..attention.masks import GivenMask, HeatOverSteps
from ..attention.prompt import PromptEdit
from ..settings import check, setting, whole_steps
from ..store.backends import Levels
from ..store.records import Memory, SourceStep
from ..store.store import AttentionStore
from ..store.streams import mask_of_latents, video_shape
from .denoiser import Denoiser, frames_of
from .edit_maps import EditMaps
from .schedule import Schedule, Steps
from .source import Needs
from .steering import EditSteering

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from .branches import Branches, EditRun


class Prediction(NamedTuple):
    """The model's prediction at one step, for the whole clip or for the frames of a chunk.

    noise: (frames, c, h, w). mask: (frames, 1, h, w), 0 where the source's latents replace the edit's; None for no
    mask. source: the same prediction for the source's branch, where the start needs it. heat, attention_mask: of
    `EditMaps`, if they are recorded.
    """

    noise: Tensor
    mask: Tensor | None
    source: Tensor | None = None
    heat: Tensor | None = None
    attention_mask: Tensor | None = None


Prepare = Callable[[str, Control], None]
"""Called with a branch's name ("source", "target", "negative") and its control, before the branch runs."""


class Injection(Protocol):
    """Injection of the source's attention and features: `FusionSettings`, `PnPSettings`."""

    @property
    def needs_attention(self) -> bool:
        """Whether it needs control of the attention."""

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError for an edit or a model that it does not fit. spans_clip: see `Denoiser`."""

    def injected(self, edit: Edit, context: EditContext) -> Injected:
        """The injection in one edit. Raises ValueError for settings that do not fit it."""

    def reads_source(self, step: int, steps: int) -> bool:
        """Whether a step reads the source's attention."""

    def reads_store(self, memory: Memory, grid: tuple[int, int] | None) -> bool:
        """Whether it reads the attention that a store of this memory has. grid: see `Denoiser.subset_grid`."""

    def preparing_calls(self, steps: int, edit: Edit, spans_clip: bool) -> int:
        """The number of model calls before the first step. spans_clip: see `Denoiser`."""

    def token_share(self, edit: Edit, frames: int, grid: tuple[int, int] | None) -> float:
        """The share of the tokens that the edit's branches compute in a step that reads the source. grid: see
        `Denoiser.subset_grid`.
        """

    @property
    def limits(self) -> bool:
        """Whether it keeps the source's latents outside of a mask of its own, up to the last step."""

    def inside(self) -> Injection:
        """The injection for an edit that keeps the source outside its mask up to the last step."""

    def summary(self, steps: int) -> str:
        """One line for the report of a run of `steps`."""


class BaseInjection:
    """Settings of an injection that fits every edit, has no mask, and makes no model calls before the first step.

    Raises ValueError for a setting out of its range.
    """

    needs_attention = True

    @property
    def limits(self) -> bool:
        return False

    def __post_init__(self) -> None:
        check(self)

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """See `Injection.check`."""

    def reads_store(self, memory: Memory, grid: tuple[int, int] | None) -> bool:
        return memory != "keys_values"

    def preparing_calls(self, steps: int, edit: Edit, spans_clip: bool) -> int:
        return 0

    def token_share(self, edit: Edit, frames: int, grid: tuple[int, int] | None) -> float:
        return 1.0

    def inside(self) -> Self:
        return self


class Propagation(Protocol):
    """Propagation of edited frames to the other frames: `TokenFlowSettings`."""

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError for an edit or a model that it does not fit. spans_clip: see `Denoiser`."""

    def predict(
        self, step: int, steps: int, clip: int, branches: Branches, chunk_frames: int | None
    ) -> list[tuple[Chunk, Prediction]]:
        """A step's predictions, each made by `branches.edit`; the chunks' weights sum to 1 in every frame.

        chunk_frames: the maximal number of frames of a model call, if the method has a choice.
        """

    def evaluated(self, clip: int) -> float:
        """Frames that a branch evaluates in a step, relative to the clip's."""

    def summary(self, clip: int) -> str:
        """One line for the report. clip: its number of frames."""


class Smoothing(Protocol):
    """A filter on the clean latents that a step predicts: `FlowSmoothing`."""

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError for an edit or a model that it does not fit. spans_clip: see `Denoiser`."""

    def smoothed(self, clean: Tensor, source: Tensor, causal: bool = False) -> Tensor:
        """The filtered clean latents of the clip, (frames, c, h, w). source: the source's. causal: whether each latent
        but the first codes several frames.
        """

    def summary(self) -> str:
        """One line for the report."""


class Layouts(Protocol):
    """The positions of objects: `LayoutGuidance`, `MoveObjects`."""

    def check(self, edit: Edit, spans_clip: bool) -> None:
        """Raise ValueError for an edit or a model that it does not fit. spans_clip: see `Denoiser`."""

    @property
    def keeps_rest(self) -> bool:
        """Whether the edit changes only an area, which is known after `prepared`."""

    def prepared(self, context: EditContext, chunks: Sequence[Sequence[Chunk]]) -> EditSteering:
        """The layout in one edit; called while the denoiser is hooked. chunks: of every step.

        Raises ValueError for settings that do not fit the edit.
        """

    def summary(self, steps: int) -> str:
        """One line for the report of a run of `steps`."""


class Start(Protocol):
    """The start of a store's edits and the sampling step: `Inverted`, or FlowEdit's `DrawnNoise`."""

    draws: int
    """The number of noise samples that a step averages over; 0 if edits start from an inversion."""

    def check(self, edit: Edit) -> None:
        """Raise ValueError for a part of an edit that does not support this start."""

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if an edit of so many steps does not support this start."""

    def schedule(self, schedule: Schedule) -> Schedule:
        """The schedule of the model calls. Raises ValueError for one that does not support this start."""

    def levels(self, clip: Tensor, schedule: Schedule) -> Levels:
        """The clip at every level, clean to noisy, with sampled noise. Only where `draws` is not 0."""

    def solver(self, schedule: Schedule, order: int, reuse_from: int | None) -> Steps:
        """A solver for `moved`, for one edit. order: of the inversion's. reuse_from: see `Solver`."""

    def follows(self, level: int) -> bool:
        """Whether the step from a level needs the prediction for the source."""

    def latents(self, run: EditRun) -> Tensor:
        """The latents of an edit's first step, (frames, c, h, w)."""

    def predict(self, run: EditRun, z: Tensor, step: int, predict: Callable[[Branches], Prediction]) -> Prediction:
        """The prediction of a step for latents z. predict: evaluates branches, in the chunks of the step."""

    def source_prediction(self, branches: Branches, source: SourceStep) -> Tensor | None:
        """The prediction for the source on a chunk, (frames, c, h, w); None if a step does not need it."""

    def moved(self, run: EditRun, z: Tensor, predicted: Prediction, level: int) -> Tensor:
        """The latents of a level, moved to the next less noisy level."""


@dataclass(frozen=True)
class Edit:
    """The arguments of `edit` that may differ between the edits of one inversion."""

    target_embeddings: Tensor | Condition
    negative_embeddings: Tensor | Condition | None = None
    guidance_scale: float = setting(
        7.5, "Classifier-free guidance. The paper uses 7.5.", least=1, most=100, step=0.1, group="The edit"
    )
    prompt: PromptEdit | None = None
    fusion: Injection | None = None
    mask: GivenMask | None = None
    propagation: Propagation | None = None
    smoothing: Smoothing | None = None
    layout: Layouts | None = None
    strength: float = setting(
        1.0,
        "Share of the steps that the edit runs. Below 1 it starts from the clip with less of the inverted noise "
        "(SDEdit), and stays closer to the clip.",
        least=0, most=1, step=0.01, group="The edit",
    )  # fmt: skip
    sdedit_seed: int | None = setting(
        None,
        "Random seed of noise of its own for each frame, in place of the inverted noise (SDEdit). With strength, how "
        "much of it.",
        least=1, most=2**63 - 1, shown="the inverted noise", group="The edit",
    )  # fmt: skip
    maps: EditMaps | None = None
    """Records the edit's attention to words and its masks."""
    guidance_until: float = setting(
        1.0,
        "Share of the steps, from the noisy end, that are guided (guidance interval, arXiv 2404.07724). The others "
        "have guidance 1, without a call for the negative prompt.",
        least=0, most=1, step=0.01, group="The edit",
    )  # fmt: skip

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step, 0 the noisiest, has a negative prompt's branch."""
        return self.guidance_scale != 1 and step < whole_steps(self.guidance_until, steps)


def first_step(strength: float, steps: int) -> int:
    """The first step of an edit of a strength, 0 the noisiest. Raises ValueError if no step is left."""
    if not 0 < strength <= 1 or steps - whole_steps(strength, steps) >= steps:
        raise ValueError(f"strength is {strength}; it must be in 0..1 and leave at least one of {steps} steps")
    return steps - whole_steps(strength, steps)


def check_parts(edit: Edit, spans_clip: bool, start: Start) -> None:
    """Raise ValueError if the parts of an edit do not fit each other, the model or the start.

    Needs neither latents nor the model, so that it can run before an inversion.
    """
    parts = (edit.fusion, edit.propagation, edit.smoothing, edit.layout)
    for part in parts:
        if part is not None:
            part.check(edit, spans_clip)
    start.check(edit)


def check_needs_unet(title: str, spans_clip: bool) -> None:
    """Raise ValueError, naming a method by its title, on a video transformer."""
    if spans_clip:
        raise ValueError(
            f"{title} needs a UNet: the frames of a video transformer already attend to each other; leave it out"
        )


class EditContext:
    """The state of one edit's run that its parts share.

    like, latents_like: tensors with the device and dtype of the model, and of the latents. area: see `EditSteering`.
    """

    area: Tensor | None = None

    def __init__(self, denoiser: Denoiser, store: AttentionStore, target: Condition, latents_like: Tensor) -> None:
        self.denoiser, self.store, self.target = denoiser, store, target
        self.steps = store.steps
        self.sites: list[AttentionSite] = denoiser.sites(*video_shape(store)[1:])
        self.spans_clip = denoiser.spans_clip
        self.subset_grid = denoiser.subset_grid(*store.levels.shape[-2:])
        self.latents_like = latents_like
        self.like = latents_like.to(denoiser.dtype)


class Injected:
    """The injection of one edit. This class injects nothing; outside a given mask it restores the source's latents.

    own_level: see `Needs`. own_source: whether the edit does not share the source's branch with others of its pass.
    """

    own_level = True
    own_source = False
    over_steps: HeatOverSteps | None = None
    """What the steps so far leave to later ones."""

    def __init__(self, edit: Edit, context: EditContext) -> None:
        self.context = context
        self.store = context.store
        """The store whose latents the source's branch reads."""
        self._inside = None if edit.mask is None else self.of_latents(edit.mask)

    def of_latents(self, mask: GivenMask) -> Tensor:
        """A mask on the latents' grid, (frames, 1, h, w). Raises ValueError for a mask to join with a computed one."""
        if not mask.replaces:
            raise ValueError(
                f'mask how="{mask.how}" needs an edit that computes a mask (FateZero with blending); use "replace"'
            )
        return mask_of_latents(self.context.store, mask).to(self.context.latents_like)[:, None]

    def prepare(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Called once, while the denoiser is hooked. chunks: of every step."""

    def needs(self, step: int) -> Needs:
        """What a step reads from the source."""
        return Needs(own_level=self.own_level)

    def controls(self, source: SourceStep, step: int) -> tuple[Control, Control]:
        """The controls of the target's and the negative prompt's branches, on the source's chunk."""
        return Control(source.key_frames, source.chunk), Control(source.key_frames, source.chunk)

    def latent_mask(self, source: SourceStep, control: Control, step: int) -> Tensor | None:
        """Where the edit keeps its own latents, after its branch ran: (frames, 1, h, w) of the chunk; None: all."""
        return None if self._inside is None else frames_of(self._inside, source.chunk)

    def attention_mask(self, control: Control) -> Tensor | None:
        """Where self-attention is the edit's in a step: (frames of the chunk, y, x); None if no mask decides that."""
        return None

    def blends_latents(self, step: int) -> bool:
        """Whether a step has a `latent_mask`."""
        return self._inside is not None

    def restored_level(self, level: int) -> int:
        """The level of the source's latents that replace the edit's outside the mask, after the step from a level."""
        return level - 1


class SourceControl(Control):
    """The control of a branch that reads the source's attention or features."""

    def __init__(self, source: SourceStep) -> None:
        super().__init__(source.key_frames, source.chunk)
        self.source = source

    def on(self, chunk: Chunk) -> Self:
        own = super().on(chunk)
        own.source = self.source.window(chunk.frame_indices)
        return own
