"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): an image model with temporal layers, tuned on one clip.

Trains the queries of attention, and the attention over frames (`temporal_layers`), on noise of the whole clip at one
timestep per step (Sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..attention.condition import Condition
from ..attention.control import Control
from ..attention.key_frames import Chunk, KeyFrames
from ..attention.temporal_kind import TRAINED_KEYS, Kind
from ..diffusion.denoiser import Guidance, check_finite
from ..diffusion.schedule import timestep_at
from ..diffusion.training import Prior, Tunable, clip_loss
from ..imports import no_grad, torch
from ..settings import check, setting
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

Optimizer = Literal["adamw", "adamw8bit"]

GROUP, VALIDATION = "Tuning", "Validation"


@dataclass(frozen=True)
class LayerSettings:
    """The kind of new temporal layers. Raises ValueError for a rank without convolutions."""

    layers: Kind = setting(
        "official",
        "Kind of new layers: official (Tune-A-Video) has attention over frames; fatezero also has convolutions over "
        "frames, which train_convolutions trains.",
        group=GROUP,
    )
    rank: int | None = setting(
        None,
        "Rank of fatezero's convolutions; its authors use 160.",
        least=1,
        most=4096,
        shown="full rank",
        group=GROUP,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.rank is not None and self.layers != "fatezero":
            raise ValueError("rank has no effect on official layers: set layers to fatezero")


@dataclass(frozen=True)
class TuneSettings:
    """How temporal layers are tuned on a clip; the defaults are the authors'. Raises ValueError out of range."""

    steps: int = setting(300, "Training steps. The authors use 300 to 500.", least=1, most=100_000, group=GROUP)
    learning_rate: float = setting(
        3e-5, "Learning rate of AdamW, constant.", least=0, most=1, step=1e-6, symbol="lr", group=GROUP
    )
    weight_decay: float = setting(1e-2, "Weight decay of AdamW.", least=0, most=1, group=GROUP)
    clip_gradients: float = setting(1.0, "Maximal norm of all gradients.", least=0, most=1000, group=GROUP)
    optimizer: Optimizer = setting(
        "adamw",
        "Optimizer. adamw8bit stores its moments in 8 bits, a quarter of the memory, and needs bitsandbytes.",
        group=GROUP,
    )
    seed: int = setting(0, "Random seed for timesteps and noise.", least=0, most=2**63 - 1, group=GROUP)
    train_convolutions: bool = setting(
        False,
        "Train fatezero's convolutions over frames too, as all configuration files of its authors do. Otherwise new "
        "ones have no effect.",
        group=GROUP,
    )
    prior_preservation: float = setting(
        0.0,
        "Weight in the loss of the distance from the untuned image model's prediction, for the clip's first frame and "
        "for class pictures. 0 turns it off.",
        least=0, most=1000, group=GROUP,
    )  # fmt: skip
    class_batch: int | None = setting(
        None, "Class pictures per step.", least=1, most=10_000, shown="as many as the clip has frames", group=GROUP
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ValidationSettings:
    """When and how clips are sampled while a model is tuned. Raises ValueError out of range."""

    validate_every: int | None = setting(
        None,
        "Steps between validation clips, which are sampled from the clip's inverted noise; and at the end. FateZero's "
        "authors use 50.",
        least=1, most=100_000, shown="none", group=VALIDATION,
    )  # fmt: skip
    validate_steps: int = setting(
        50, "Steps of the inversion and of the sampling of validation clips.", least=1, most=999, group=VALIDATION
    )
    validate_guidance: float = setting(
        12.5,
        "Classifier-free guidance scale of validation clips. Tune-A-Video's authors use 12.5, FateZero's 7.5.",
        least=0, most=100, group=VALIDATION,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ClassPictures:
    """Pictures of the clip's class as regularization: each step on the clip comes after one on some of them.

    Each picture has its own timestep, and temporal layers have no part, as in FateZero's code. latents: (pictures, 4,
    h, w). embeddings: of the class prompt. deviation: as that of `TuneRun`. draws: (numbers of pictures, timestep of
    each, noise (n, 4, h, w)) of each step, instead of random ones. progress: called after each step with (loss, norm of
    the gradients before clipping).
    """

    latents: Tensor
    embeddings: Tensor | Condition
    deviation: Tensor | None = None
    draws: Iterable[tuple[Sequence[int], Sequence[int], Tensor]] | None = None
    progress: Callable[[float, float], None] | None = None


@dataclass(frozen=True)
class Validation:
    """Clips to sample while a model is tuned.

    prompts, negative: embeddings. source: of the inversion's prompt; Tune-A-Video's authors use an empty one,
    FateZero's the clip's. show: called with (steps done, the latents (frames, 4, h, w) of each prompt).
    """

    prompts: Sequence[Tensor | Condition]
    source: Tensor | Condition
    negative: Tensor | Condition
    show: Callable[[int, list[Tensor]], None]
    settings: ValidationSettings = ValidationSettings(validate_every=50)

    def due(self, done: int, steps: int) -> bool:
        """Whether clips are sampled after a step."""
        every = self.settings.validate_every
        return every is not None and (done % every == 0 or done == steps)


TuneProgress = Callable[[int, int, float, float], None]
"""Called after each step with (steps done, total steps, loss, norm of the gradients before clipping)."""
State: TypeAlias = "Mapping[str, Tensor]"
"""The state of a tuning for resuming: weights, optimizer and losses."""


@dataclass(frozen=True)
class TuneRun:
    """A run of `tune`: its other inputs, and what is reported and saved on the way.

    deviation: of the autoencoder's posterior, in the latents' shape; each step then uses a sample, as in the authors'
    code. keep: called with the state every `keep_every` steps and at the end; `resume` continues from a state with the
    same result. accelerator: accelerate's, for mixed precision and several processes, each with its own noise.
    """

    deviation: Tensor | None = None
    class_pictures: ClassPictures | None = None
    validation: Validation | None = None
    resume: State | None = None
    keep: Callable[[State], None] | None = None
    keep_every: int = 100
    accelerator: Any = None
    progress: TuneProgress | None = None


def tune(
    denoiser: Tunable,
    latents: Tensor,
    embeddings: Tensor | Condition,
    settings: TuneSettings | None = None,
    draws: Iterable[tuple[int, Tensor]] | None = None,
    key_frames: KeyFrames | Iterable[str | int] | str | int = TRAINED_KEYS,
    clip_norm: bool = True,
    **run: Any,
) -> list[float]:
    """Train a model's temporal layers on one clip (paper Sec. 3.3); returns all losses, those before `resume` too.

    latents: (frames, 4, h, w). embeddings: of the clip's prompt. draws: (timestep, noise (frames, 4, h, w)) of each
    step, instead of random ones. run: the fields of `TuneRun`. The loss is the mean squared error of the noise, or of v
    if the model predicts it. Raises ValueError for a model without temporal layers or a state of another tuning, and
    ArithmeticError for numbers out of range.
    """
    settings, more = settings or TuneSettings(), TuneRun(**run)
    keys, condition = KeyFrames.of(key_frames), Condition.of(embeddings, "embeddings").to(latents)
    with torch.enable_grad(), denoiser.training(settings.train_convolutions):
        tuning = _Tuning(denoiser, settings, more.accelerator or _NoAccelerator())
        if more.resume is not None:
            tuning.load(more.resume)
        done = len(tuning.losses)
        given = (
            random_draws(latents, settings, done, tuning.accelerator) if draws is None else islice(draws, done, None)
        )
        pictures = _draws_of(more.class_pictures, len(latents), settings, done, tuning.accelerator)
        for timestep, noise in given:
            with denoiser.hooked(clip_norm):
                if more.class_pictures is not None:
                    tuning.on_pictures(more.class_pictures, *next(pictures))
                sample = _sample(latents, more.deviation, settings, 2 * done + 1)
                norm = tuning.on_clip(sample, noise.to(latents), timestep, condition, keys)
            done += 1
            if more.progress:
                more.progress(done, settings.steps, tuning.losses[-1], norm)
            if more.keep and (done % more.keep_every == 0 or done == settings.steps):
                more.keep(tuning.state())
            if more.validation is not None and more.validation.due(done, settings.steps):
                with torch.no_grad():
                    more.validation.show(done, validation_clips(denoiser, latents, more.validation, keys, clip_norm))
    return tuning.losses


@no_grad
def validation_clips(
    denoiser: Tunable, latents: Tensor, validation: Validation, keys: KeyFrames, clip_norm: bool
) -> list[Tensor]:
    """Clips of the validation's prompts, by DDIM from the clip's inverted noise (paper Sec. 3.3)."""
    schedule, control = denoiser.schedule(validation.settings.validate_steps), Control(keys, Chunk.whole(len(latents)))
    source, negative, *prompts = (
        Condition.of(text, "embeddings").to(latents)
        for text in (validation.source, validation.negative, *validation.prompts)
    )
    guidance = Guidance(negative, control, validation.settings.validate_guidance)
    with denoiser.hooked(clip_norm):
        noise = latents
        for level in range(schedule.steps):
            predicted = denoiser.predict_noise(noise, timestep_at(schedule, level + 1), source, control)
            noise = schedule.move(noise, predicted, level, level + 1)
        clips = []
        for prompt in prompts:
            z = noise
            for level in range(schedule.steps, 0, -1):
                predicted = denoiser.predict_noise(z, timestep_at(schedule, level), prompt, control, guidance)
                z = schedule.move(z, predicted, level, level - 1)
            clips.append(z)
    return clips


# --- random numbers -------------------------------------------------------------------


def random_draws(
    latents: Tensor, settings: TuneSettings, done: int = 0, accelerator: Any = None
) -> Iterator[tuple[int, Tensor]]:
    """A random timestep of the clip, and noise for each frame, for every remaining step; reproducible by seed."""
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    for step in range(done, settings.steps):
        random = _random(settings, 2 * (step * processes + process))
        timestep = int(torch.randint(1000, (1,), generator=random))
        yield timestep, torch.randn(latents.shape, generator=random, dtype=torch.float32)


def _draws_of(
    pictures: ClassPictures | None, frames: int, settings: TuneSettings, done: int, accelerator: Any
) -> Iterator[tuple[Sequence[int], Sequence[int], Tensor]]:
    """The class pictures of every remaining step, with the timestep and the noise of each."""
    if pictures is None:
        return
    if pictures.draws is not None:
        yield from islice(pictures.draws, done, None)
        return
    count = min(settings.class_batch or frames, len(pictures.latents))
    for step in range(done, settings.steps):
        random = _random(settings, _PICTURES + step * accelerator.num_processes + accelerator.process_index)
        numbers = torch.randperm(len(pictures.latents), generator=random)[:count].tolist()
        timesteps = torch.randint(1000, (count,), generator=random).tolist()
        yield numbers, timesteps, torch.randn((count, *pictures.latents.shape[1:]), generator=random)


_PICTURES, _PICTURES_POSTERIOR = 2**40, 2**41
"""Where the numbers of class pictures' random generators begin."""


def _sample(mean: Tensor, deviation: Tensor | None, settings: TuneSettings, number: int) -> Tensor:
    """A sample of the autoencoder's posterior."""
    if deviation is None:
        return mean
    return mean + deviation * torch.randn(mean.shape, generator=_random(settings, number)).to(mean)


def _random(settings: TuneSettings, number: int) -> torch.Generator:
    """A generator that depends only on the seed and a number, so that a run can resume at any step."""
    return torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**63)


# --- steps ------------------------------------------------------------------------------


class _NoAccelerator:
    """The part of accelerate's Accelerator that a tuning uses, for one process in the weights' precision."""

    num_processes, process_index, scaler = 1, 0, None

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self, gradient: Tensor, how: str) -> Tensor:
        return gradient


class _Tuning:
    """The steps of a tuning: weights, optimizer and losses so far."""

    def __init__(self, denoiser: Tunable, settings: TuneSettings, accelerator: Any) -> None:
        self.denoiser, self.settings, self.accelerator = denoiser, settings, accelerator
        self.trained, self.losses = denoiser.trained(settings.train_convolutions), list[float]()
        kind = optimizer_class(settings.optimizer)
        optimizer = kind(self.trained.values(), settings.learning_rate, (0.9, 0.999), 1e-8, settings.weight_decay)
        self.optimizer = accelerator.prepare(optimizer)
        self.prior = self._prior() if settings.prior_preservation else None

    def _prior(self) -> Prior:
        from ..attention.temporal_layers import is_temporal  # imports torch

        own = [weight for name, weight in self.trained.items() if not is_temporal(name)]
        return Prior(self.settings.prior_preservation, {weight: weight.detach().clone() for weight in own})

    def on_clip(self, latents: Tensor, noise: Tensor, timestep: int, condition: Condition, keys: KeyFrames) -> float:
        """A step on the clip; returns the norm of the gradients before clipping."""
        loss, norm = self.step(clip_loss(self.denoiser, latents, noise, timestep, condition, keys, self.prior))
        self.losses.append(loss)
        return norm

    def on_pictures(
        self, pictures: ClassPictures, numbers: Sequence[int], timesteps: Sequence[int], noise: Tensor
    ) -> None:
        """A step on class pictures, without temporal layers."""
        means = pictures.latents[list(numbers)]
        deviation = None if pictures.deviation is None else pictures.deviation[list(numbers)]
        latents = _sample(means, deviation, self.settings, _PICTURES_POSTERIOR + len(self.losses))
        condition = Condition.of(pictures.embeddings, "embeddings of the class").to(latents)
        own = KeyFrames(("self",))
        with self.denoiser.bypassed():
            losses = [
                clip_loss(self.denoiser, z[None], eps[None], t, condition, own, self.prior)
                for z, eps, t in zip(latents, noise.to(latents), timesteps, strict=True)
            ]
            done = self.step(torch.stack(losses).mean())
        if pictures.progress:
            pictures.progress(*done)

    def step(self, loss: Tensor) -> tuple[float, float]:
        """Update the weights; returns the loss and the norm of the gradients before clipping."""
        what = f"step {len(self.losses) + 1} of the tuning"
        check_finite(loss.detach(), f"the loss of {what}")
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for weight in (one for one in self.trained.values() if one.grad is not None):
                weight.grad = self.accelerator.reduce(weight.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.settings.clip_gradients)
        if self.accelerator.scaler is None:  # a scaler skips steps that are not finite
            check_finite(norm, f"the gradients of {what}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.accelerator.reduce(loss.detach(), "mean").item(), float(norm)

    def state(self) -> dict[str, Tensor]:
        """The state for `load`, on the CPU."""
        found = {f"weight.{name}": weight.detach() for name, weight in self.trained.items()}
        of_weights = self.optimizer.state_dict()["state"]
        for name, moments in zip(self.trained, of_weights.values(), strict=True):
            found |= {f"{key}.{name}": torch.as_tensor(value) for key, value in moments.items()}
        found["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        found["seed"] = torch.tensor(self.settings.seed)
        return {name: tensor.cpu().clone().contiguous() for name, tensor in found.items()}

    def load(self, state: State) -> None:
        """Resume from a state; ValueError for other weights or another seed."""
        names = {name.partition(".")[2] for name in state if name.startswith("weight.")}
        if names != self.trained.keys():
            raise ValueError("the tuning's checkpoint belongs to another model, or to other temporal layers")
        if int(state["seed"]) != self.settings.seed:
            raise ValueError(f"the tuning's checkpoint has seed {int(state['seed'])}, not {self.settings.seed}")
        self.losses = state["losses"].tolist()
        restored = self.optimizer.state_dict()
        for number, (name, weight) in enumerate(self.trained.items()):
            if state[f"weight.{name}"].shape != weight.shape:
                raise ValueError(f"{name} of the checkpoint has another shape than in this model")
            weight.data.copy_(state[f"weight.{name}"])
            own = {key.removesuffix(f".{name}"): value for key, value in state.items() if key.endswith(f".{name}")}
            del own["weight"]
            # Optimizers need integer counts as integers.
            restored["state"][number] = {
                key: value if value.is_floating_point() or value.ndim else int(value) for key, value in own.items()
            }
        self.optimizer.load_state_dict(restored)


def optimizer_class(name: Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or bitsandbytes' version with 8-bit moments; ImportError if that is not installed."""
    if name == "adamw":
        return torch.optim.AdamW
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    made: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return made


METHOD = Method(
    name="tune_a_video",
    title="Tune-A-Video",
    paper="Wu et al., ICCV 2023, arXiv 2212.11565",
    sentence="Trains temporal layers on the clip; edits then start from its inverted noise.",
    part="training",
    settings=TuneSettings,
    presets={
        "tune_a_video": {
            "injection": "none",
            "guidance_scale": 12.5,
            "key_frames": TRAINED_KEYS,
            "clip_norm": True,
        }
    },
)
