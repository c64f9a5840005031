"""FlowEdit (Kulikov et al., ICCV 2025, arXiv 2412.08629): edit without inverting.

At each level sigma it samples noise, predicts for the noised clip x_source and the noised edit
x = x_edit + x_source - x_0, and moves the edit along the difference of the predictions:
    x_edit' = x_edit + (sigma' - sigma) (d_edit(x) - d_source(x_source)).
The last `n_min` steps sample x under the target prompt without the source. FlowEdit replaces the start of an edit, and
the other parts (injection, masks) work as with an inversion. The paper covers flows; with d the noise and
x = z / sqrt(abar) the same holds for DDIM.

Wan-Edit (Li et al., FiVE, ICCV 2025, arXiv 2503.13684) adds the noise of the level before the step, calls the model at
whole timesteps, and takes UniPC's steps along the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import KeyFrames, Windows
from ..diffusion.ddim import guide
from ..diffusion.denoiser import Denoiser, check_latents, frames_of, keys_on
from ..diffusion.invert import Inversion
from ..diffusion.parts import Edit, Prediction
from ..diffusion.schedule import Schedule, Solver, Steps
from ..diffusion.unipc import UniPC
from ..imports import no_grad, torch
from ..settings import check, setting
from ..store.backends import DrawnLevels, GivenNoise, SeededNoise
from ..store.records import SourceStep
from ..store.store import AttentionStore
from ..store.streams import with_shapes
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.branches import Branches, EditRun

GROUP = "FlowEdit"


@dataclass(frozen=True)
class FlowEditSettings:
    """Settings of FlowEdit. Raises ValueError for a number outside its range."""

    source_guidance: float = setting(
        4.0, "Guidance of the source's branch; the edit's is usually two to three times as high.",
        least=1, most=100, step=0.1, group=GROUP,
    )  # fmt: skip
    draws: int = setting(
        1, "Number of noise samples that a step averages over; the cost is proportional.", least=1, symbol="n_avg",
        group=GROUP,
    )  # fmt: skip
    seed: int = setting(0, "Random seed for the noise.", least=0, most=2**63 - 1, group=GROUP)
    n_min: int = setting(
        0, "Number of steps at the end that sample the target prompt without following the source: more of its texture "
        "and detail, less of the clip's.", least=0, symbol="n_min", group=GROUP,
    )  # fmt: skip
    variant: Literal["paper", "wan_edit"] = setting(
        "paper", "paper: noise of the step's own level, and Euler steps. wan_edit: FiVE-Bench's, for flows such as "
        "Wan, with noise of the level before the step, whole timesteps and UniPC steps.", group=GROUP,
    )  # fmt: skip
    gain: float = setting(
        1.0, "Factor on the difference of both predictions: above 1 more changes. For models without guidance.",
        least=0, most=10, step=0.1, group=GROUP,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


class DrawnNoise:
    """FlowEdit's start: the clip with sampled noise, averaged over `settings.draws` samples in each step."""

    def __init__(self, settings: FlowEditSettings) -> None:
        self.settings, self.draws = settings, settings.draws

    def check(self, edit: Edit) -> None:
        """Refuses parts that need the inversion's noise."""
        parts = ((edit.propagation, "TokenFlow"), (edit.smoothing, "flow smoothing"), (edit.layout, "a layout"))
        for part, name in parts:
            if part is not None:
                raise ValueError(f"{name} needs an inversion: it does not work with FlowEdit's sampled noise")
        if edit.sdedit_seed is not None:
            raise ValueError("sdedit_seed needs an inversion: FlowEdit samples its own noise")

    def check_steps(self, steps: int) -> None:
        """Refuses an edit that has fewer steps than `n_min`."""
        n_min = self.settings.n_min
        if n_min > steps:
            raise ValueError(
                f"n_min is {n_min}, but the edit runs only {steps} steps: lower n_min, or raise steps or strength"
            )

    def schedule(self, schedule: Schedule) -> Schedule:
        """Wan-Edit's whole timesteps."""
        if self.settings.variant == "paper":
            return schedule
        if schedule.formulation != "flow":
            raise ValueError("variant wan_edit needs a flow, such as Wan; for this model, use variant paper")
        whole = 1000 / _unit(schedule)
        return replace(schedule, timesteps=tuple(int(t * whole + 1e-3) / whole for t in schedule.timesteps))

    def solver(self, schedule: Schedule, order: int, reuse_from: int | None) -> Steps:
        return Solver(schedule, 1) if self.settings.variant == "paper" else UniPC(schedule)

    def follows(self, level: int) -> bool:
        return level > self.settings.n_min

    def levels(self, clip: Tensor, schedule: Schedule, noises: Tensor | None = None) -> DrawnLevels:
        """The clip with the noise of each level, clean to noisy. noises: see `draw`."""
        settings, steps = self.settings, schedule.steps
        signals = [schedule.signal(level).item() for level in range(steps + 1)]
        deviations = [schedule.noise(level).item() for level in range(steps + 1)]
        if settings.variant == "wan_edit":
            before = [1.0, *(t / _unit(schedule) for t in schedule.timesteps[:-1])]
            followed = slice(settings.n_min + 1, None)
            deviations[followed] = before[::-1][settings.n_min :]
            signals[followed] = [1 - deviation for deviation in deviations[followed]]
        noise = (
            SeededNoise(settings.seed, steps + 1) if noises is None else GivenNoise(noises, self.draws, settings.n_min)
        )
        return DrawnLevels(clip, signals, deviations, noise, settings.n_min)

    def latents(self, run: EditRun) -> Tensor:
        return run.store.level(run.schedule.steps - run.first).to(run.denoiser.device)

    def predict(self, run: EditRun, z: Tensor, step: int, predict: Callable[[Branches], Prediction]) -> Prediction:
        """The mean over the noise samples; z is the edit with the first one."""
        levels, level, found = _drawn(run.store), run.schedule.steps - step, list[Prediction]()
        if not self.follows(level):
            return predict(run.branches(z, step))
        first = levels[level].to(z.device)
        for draw in range(self.draws):
            noises = levels.of_draw(draw)
            store = replace(run.store, levels=noises)
            found.append(predict(run.branches(z + (noises[level].to(z.device) - first), step, store)))
        noise, source = (torch.stack([getattr(p, name) for p in found]).mean(0) for name in ("noise", "source"))
        if self.settings.gain != 1:
            held = run.target.held_frames
            noise[held:] = source[held:] + self.settings.gain * (noise[held:] - source[held:])
        return found[0]._replace(noise=noise, source=source)

    def source_prediction(self, branches: Branches, source: SourceStep) -> Tensor | None:
        """d_source, with its own guidance."""
        run, step = branches.run, branches.step
        if not self.follows(run.schedule.steps - step):
            return None
        predicted = source.captured.prediction
        assert predicted is not None
        unwanted = run.negative_at(step)
        if unwanted is None or self.settings.source_guidance == 1:
            return predicted
        z = frames_of(branches.store.level(run.schedule.steps - step).to(predicted.device), source.chunk)
        plain, unwanted = Control(source.key_frames, source.chunk), unwanted.with_pictures_of(branches.store.source)
        away = run.denoiser.predict_noise(z, run.schedule.timesteps[step], unwanted, plain)
        return guide(away, predicted, self.settings.source_guidance)

    def moved(self, run: EditRun, z: Tensor, predicted: Prediction, level: int) -> Tensor:
        """x_edit' = x_edit + (sigma' - sigma) (d_edit - d_source), in latents with the level's noise:
        x_edit - x_0 = x - x_source. At the end x' = x + (sigma' - sigma) d_edit.
        """
        if predicted.source is None:
            return run.schedule.move(z, predicted.noise, level, level - 1)
        here, there = (run.store.level(at).to(z.device) for at in (level, level - 1))
        change = run.solver.move(z - here, predicted.noise - predicted.source, level, level - 1)
        if level == 1:  # the clean clip; DDIM's first level scales it
            change = change / run.schedule.scale(0)
        return there + change


def _unit(schedule: Schedule) -> float:
    """The timestep of sigma 1: 1000, or 1 in models that take sigma itself."""
    return 1000.0 if schedule.timesteps[0] > 1 else 1.0


def _drawn(store: AttentionStore) -> DrawnLevels:
    assert isinstance(store.levels, DrawnLevels)
    return store.levels


@no_grad
def draw(
    denoiser: Denoiser,
    latents: Tensor,
    source_embeddings: Tensor | Condition,
    steps: int = 50,
    settings: FlowEditSettings | None = None,
    key_frames: KeyFrames | str | tuple[str | int, ...] = ("self", "middle"),
    clip_norm: bool = False,
    *,
    windows: Windows | None = None,
    prompt: str | None = None,
    noises: Tensor | Sequence[Tensor] | None = None,
) -> Inversion:
    """A clip with sampled noise instead of an inversion, for a FlowEdit `edit`.

    latents: (frames, c, h, w). source_embeddings: of the source prompt. noises: standard normal noise instead of that
    of the seed, (samples, frames, c, h, w), in the order of use: `draws` samples for each step that follows the source,
    and one for the `n_min` steps after these. The last sample is that of the last step, so that noise of steps before
    the edit's first may be left out. Does not call the model. The other arguments and the errors are those of `invert`;
    ValueError for noises of another shape, and for a variant that does not support the model.
    """
    start = DrawnNoise(settings or FlowEditSettings())
    schedule = start.schedule(denoiser.schedule(steps))
    check_latents(latents)
    source = Condition.of(source_embeddings, "source_embeddings").to(latents)
    if denoiser.embeds_guidance:
        source = source.with_guidance(start.settings.source_guidance)
    return Inversion(
        AttentionStore(
            memory="recompute",
            levels=start.levels(latents, schedule, None if noises is None else _stacked(noises, latents)),
            source=source,
            timesteps=schedule.timesteps,
            alphas=tuple(schedule.alphas.tolist()),
            key_frames=keys_on(denoiser, key_frames),
            clip_norm=clip_norm,
            windows=windows,
            formulation=schedule.formulation,
            model=denoiser.identity(),
            prompt=prompt,
            extra=with_shapes(None, denoiser),
            start=start,
        )
    )


def _stacked(noises: Tensor | Sequence[Tensor], latents: Tensor) -> Tensor:
    """Given noises in one tensor. Raises ValueError for noises that do not fit the latents."""
    noises = noises if isinstance(noises, torch.Tensor) else torch.stack(list(noises))
    if noises.ndim != 5 or noises.shape[1:] != latents.shape or not len(noises):
        raise ValueError(f"noises has shape {tuple(noises.shape)}; it must be (samples, *{tuple(latents.shape)})")
    return noises


METHOD = Method(
    name="flow_edit",
    title=GROUP,
    paper="Kulikov et al., ICCV 2025, arXiv 2412.08629",
    sentence="Follows the difference between both prompts' predictions from sampled noise, without an inversion.",
    part="start",
    settings=FlowEditSettings,
    presets={
        "flow_edit": {"noise": "drawn", "injection": "none", "guidance_scale": 10.0, "strength": 0.7},
        "few_steps": {
            "noise": "drawn",
            "injection": "none",
            "guidance_scale": 1.0,
            "strength": 0.75,
            "steps": 7,
            "flow_edit": {"source_guidance": 1.0, "gain": 1.3},
        },
        "wan_edit": {
            "noise": "drawn",
            "injection": "none",
            "guidance_scale": 12.0,
            "strength": 0.76,
            "flow_edit": {"source_guidance": 5.0, "variant": "wan_edit"},
        },
    },
    node_id="FateZeroFlowEdit",
)
