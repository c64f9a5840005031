"""Tune-A-Video (Wu et al., ICCV 2023, arXiv 2212.11565): an image model with temporal layers, tuned on one clip.

Trains the queries of attention, and the attention over frames (`temporal_layers`), on noise of the whole clip at one
timestep per step (Sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..attention.condition import Condition
from ..attention.key_frames import KeyFrames
from ..attention.temporal_kind import TRAINED_KEYS, Kind
from ..diffusion.denoiser import check_finite
from ..diffusion.training import Tunable, clip_loss
from ..imports import torch
from ..settings import check, setting
from .method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

Optimizer = Literal["adamw", "adamw8bit"]

GROUP = "Tuning"


@dataclass(frozen=True)
class LayerSettings:
    """The kind of new temporal layers. Raises ValueError for a rank without convolutions."""

    layers: Kind = setting(
        "official",
        "Kind of new layers: official (Tune-A-Video) has attention over frames; fatezero also has convolutions over "
        "frames, which its authors' code does not train.",
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

    def __post_init__(self) -> None:
        check(self)


TuneProgress = Callable[[int, int, float, float], None]
"""Called after each step with (steps done, total steps, loss, norm of the gradients before clipping)."""
State: TypeAlias = "Mapping[str, Tensor]"
"""The state of a tuning for resuming: weights, optimizer and losses."""


def tune(
    denoiser: Tunable,
    latents: Tensor,
    embeddings: Tensor | Condition,
    settings: TuneSettings | None = None,
    draws: Iterable[tuple[int, Tensor]] | None = None,
    key_frames: KeyFrames | Iterable[str | int] | str | int = TRAINED_KEYS,
    clip_norm: bool = True,
    *,
    deviation: Tensor | None = None,
    resume: State | None = None,
    keep: Callable[[State], None] | None = None,
    keep_every: int = 100,
    accelerator: Any = None,
    progress: TuneProgress | None = None,
) -> list[float]:
    """Train a model's temporal layers on one clip (paper Sec. 3.3); returns all losses, those before `resume` too.

    latents: (frames, 4, h, w). embeddings: of the clip's prompt. draws: (timestep, noise (frames, 4, h, w)) of each
    step, instead of random ones. deviation: of the autoencoder's posterior, in the latents' shape; each step then uses
    a sample, as in the authors' code. The loss is the mean squared error of the noise, or of v if the model predicts
    it. keep: called with the state every `keep_every` steps and at the end; `resume` continues from a state with the
    same result. accelerator: accelerate's, for mixed precision and several processes, each with its own noise.
    Raises ValueError for a model without temporal layers or a state of another tuning, and ArithmeticError for numbers
    out of range.
    """
    settings = settings or TuneSettings()
    keys, condition = KeyFrames.of(key_frames), Condition.of(embeddings, "embeddings").to(latents)
    with torch.enable_grad(), denoiser.training(), denoiser.hooked(clip_norm):
        tuning = _Tuning(denoiser.trained(), settings, accelerator or _NoAccelerator())
        if resume is not None:
            tuning.load(resume)
        done = len(tuning.losses)
        given = (
            random_draws(latents, settings, done, tuning.accelerator) if draws is None else islice(draws, done, None)
        )
        for timestep, noise in given:
            sample = latents if deviation is None else latents + deviation * _posterior_noise(latents, settings, done)
            loss = clip_loss(denoiser, sample, noise.to(latents), timestep, condition, keys)
            norm = tuning.step(loss)
            done += 1
            if progress:
                progress(done, settings.steps, tuning.losses[-1], norm)
            if keep and (done % keep_every == 0 or done == settings.steps):
                keep(tuning.state())
    return tuning.losses


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


def _posterior_noise(latents: Tensor, settings: TuneSettings, step: int) -> Tensor:
    return torch.randn(latents.shape, generator=_random(settings, 2 * step + 1), dtype=torch.float32).to(latents)


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

    def __init__(self, trained: dict[str, nn.Parameter], settings: TuneSettings, accelerator: Any) -> None:
        self.trained, self.settings, self.accelerator = trained, settings, accelerator
        self.losses: list[float] = []
        kind = optimizer_class(settings.optimizer)
        optimizer = kind(trained.values(), settings.learning_rate, (0.9, 0.999), 1e-8, settings.weight_decay)
        self.optimizer = accelerator.prepare(optimizer)

    def step(self, loss: Tensor) -> float:
        """Update the weights; returns the norm of the gradients before clipping."""
        what = f"step {len(self.losses) + 1} of the tuning"
        check_finite(loss.detach(), f"the loss of {what}")
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for weight in self.trained.values():
                weight.grad = self.accelerator.reduce(weight.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.settings.clip_gradients)
        if self.accelerator.scaler is None:  # a scaler skips steps that are not finite
            check_finite(norm, f"the gradients of {what}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
        return float(norm)

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
