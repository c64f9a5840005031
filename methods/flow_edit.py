"""FlowEdit (Kulikov et al., ICCV 2025, arXiv 2412.08629): edit without inverting.

At each level sigma it samples noise, predicts for the noised clip x_source and the noised edit
x = x_edit + x_source - x_0, and moves the edit along the difference of the predictions:
    x_edit' = x_edit + (sigma' - sigma) (d_edit(x) - d_source(x_source)).
It replaces the start of an edit, and the other parts (injection, masks) work as with an inversion. The paper covers
flows; with d the noise and x = z / sqrt(abar) the same holds for DDIM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import KeyFrames
from ..diffusion.ddim import guide
from ..diffusion.denoiser import Denoiser, check_latents, frames_of, keys_on
from ..diffusion.invert import Inversion
from ..diffusion.parts import Edit, Prediction
from ..imports import no_grad, torch
from ..settings import check, setting
from ..store.backends import DrawnLevels
from ..store.records import SourceStep
from ..store.store import AttentionStore
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..diffusion.branches import Branches, EditRun

GROUP = "FlowEdit"


@dataclass(frozen=True)
class FlowEditSettings:
    """Settings of FlowEdit's noise. Raises ValueError for a number outside its range."""

    source_guidance: float = setting(
        4.0, "Guidance of the source's branch; the edit's is usually two to three times as high.",
        least=1, most=100, step=0.1, group=GROUP,
    )  # fmt: skip
    draws: int = setting(
        1, "Number of noise samples that a step averages over; the cost is proportional.", least=1, symbol="n_avg",
        group=GROUP,
    )  # fmt: skip
    seed: int = setting(0, "Random seed for the noise.", least=0, most=2**63 - 1, group=GROUP)

    def __post_init__(self) -> None:
        check(self)


class DrawnNoise:
    """FlowEdit's start: the clip with sampled noise, averaged over `settings.draws` samples in each step."""

    def __init__(self, settings: FlowEditSettings) -> None:
        self.draws, self._source_guidance = settings.draws, settings.source_guidance

    def check(self, edit: Edit) -> None:
        """Refuses parts that need the inversion's noise."""
        parts = ((edit.propagation, "TokenFlow"), (edit.smoothing, "flow smoothing"), (edit.layout, "a layout"))
        for part, name in parts:
            if part is not None:
                raise ValueError(f"{name} needs an inversion: it does not work with FlowEdit's sampled noise")
        if edit.sdedit_seed is not None:
            raise ValueError("sdedit_seed needs an inversion: FlowEdit samples its own noise")

    def latents(self, run: EditRun) -> Tensor:
        return run.store.level(run.schedule.steps - run.first).to(run.denoiser.device)

    def predict(self, run: EditRun, z: Tensor, step: int, predict: Callable[[Branches], Prediction]) -> Prediction:
        """The mean over the noise samples; z is the edit with the first one."""
        levels, level, found = _drawn(run.store), run.schedule.steps - step, list[Prediction]()
        first = levels[level].to(z.device)
        for draw in range(self.draws):
            noises = levels.of_draw(draw)
            store = replace(run.store, levels=noises)
            found.append(predict(run.branches(z + (noises[level].to(z.device) - first), step, store)))
        noise, source = (torch.stack([getattr(p, name) for p in found]).mean(0) for name in ("noise", "source"))
        return Prediction(noise, found[0].mask, source)

    def source_prediction(self, branches: Branches, source: SourceStep) -> Tensor | None:
        """d_source, with its own guidance."""
        run, step = branches.run, branches.step
        predicted = source.captured.prediction
        assert predicted is not None
        if run.negative is None or self._source_guidance == 1:
            return predicted
        z = frames_of(branches.store.level(run.schedule.steps - step).to(predicted.device), source.chunk)
        plain = Control(source.key_frames, source.chunk)
        away = run.denoiser.predict_noise(z, run.schedule.timesteps[step], run.negative, plain)
        return guide(away, predicted, self._source_guidance)

    def moved(self, run: EditRun, z: Tensor, predicted: Prediction, level: int) -> Tensor:
        """x_edit' = x_edit + (sigma' - sigma) (d_edit - d_source), in latents with the level's noise:
        x_edit - x_0 = x - x_source.
        """
        assert predicted.source is not None
        here, there = (run.store.level(at).to(z.device) for at in (level, level - 1))
        change = run.schedule.move(z - here, predicted.noise - predicted.source, level, level - 1)
        if level == 1:  # the clean clip; DDIM's first level scales it
            change = change / run.schedule.scale(0)
        return there + change


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
    prompt: str | None = None,
) -> Inversion:
    """A clip with sampled noise instead of an inversion, for a FlowEdit `edit`.

    latents: (frames, c, h, w). source_embeddings: of the source prompt. Does not call the model. The other arguments
    and the errors are those of `invert`.
    """
    settings, schedule = settings or FlowEditSettings(), denoiser.schedule(steps)
    check_latents(latents)
    levels = range(steps + 1)
    drawn = DrawnLevels(
        latents,
        [schedule.signal(level).item() for level in levels],
        [schedule.noise(level).item() for level in levels],
        settings.seed,
    )
    return Inversion(
        AttentionStore(
            memory="recompute",
            levels=drawn,
            source=Condition.of(source_embeddings, "source_embeddings").to(latents),
            timesteps=schedule.timesteps,
            alphas=tuple(schedule.alphas.tolist()),
            key_frames=keys_on(denoiser, key_frames),
            clip_norm=clip_norm,
            formulation=schedule.formulation,
            model=denoiser.identity(),
            prompt=prompt,
            start=DrawnNoise(settings),
        )
    )


METHOD = Method(
    name="flow_edit",
    title=GROUP,
    paper="Kulikov et al., ICCV 2025, arXiv 2412.08629",
    sentence="Follows the difference between both prompts' predictions from sampled noise, without an inversion.",
    part="start",
    settings=FlowEditSettings,
    presets={"flow_edit": {"noise": "drawn", "injection": "none", "guidance_scale": 10.0, "strength": 0.7}},
    node_id="FateZeroFlowEdit",
)
