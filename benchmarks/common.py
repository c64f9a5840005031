"""Models of real shapes with random weights, inputs for them, plain loops over them, and timing."""

from __future__ import annotations

import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fatezero import FusionSettings, PromptEdit
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import ALL, Chunk, KeyFrames
from fatezero.benchmarks.page import table as table
from fatezero.benchmarks.page import write_section as write_section
from fatezero.demo.model import build_scheduler, build_tokenizer
from fatezero.diffusion.ddim import ddim_move, guide
from fatezero.diffusion.denoiser import Denoiser, Guidance
from fatezero.diffusion.schedule import FlowSchedule, Schedule
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from fatezero.methods.fatezero import Fuser, StepPlan
from fatezero.metrics.memory import PeakMemory
from fatezero.store.records import PairedBranch, Recorder, SourceStep

# --- models ---------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "mid": {"cross_attention_dim": 256, "attention_head_dim": 8, "block_out_channels": (96, 192, 384, 384)},
    "tiny": {
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}
SHAPES["tiny-sdxl"] = SHAPES["tiny"] | {
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
"""UNets: SD 1.5 with 860 M parameters, SDXL, a smaller SD 1.5 for CPUs, and two tiny ones for trial runs. Weights are
random: speed does not depend on them."""

WANS: dict[str, dict[str, Any]] = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096},
    "tiny": {
        "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "freq_dim": 32, "ffn_dim": 96,
        "num_layers": 2,
    },
}  # fmt: skip
"""Wan 2.1's transformers, and a tiny one for trial runs."""


def random_model(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers model with reproducible random weights, created on the device.

    In half precision some layers stay in single, like in `from_pretrained`.
    """
    with init_empty_weights():
        model = build()
    wide = set(model._keep_in_fp32_modules or ()) if dtype.itemsize < 4 else set()
    random = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    for module_name, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                own = torch.float32 if wide & {*module_name.split("."), name} else dtype
                values = torch.empty(weight.shape, device=device, dtype=own)
                if random is not None:
                    _fill(values, name, random)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _fill(values: Tensor, name: str, random: torch.Generator) -> None:
    """Weights with the deviation of torch's initialization; norms and biases of the identity."""
    if values.ndim > 1:
        values.normal_(0, (3 * values[0].numel()) ** -0.5, generator=random)
    else:
        values.fill_(float(name == "weight"))


def random_unet(shape: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of a known shape."""
    unet: UNet2DConditionModel = random_model(lambda: UNet2DConditionModel(**SHAPES[shape]), device, dtype)
    return unet


def random_wan(
    shape: str, device: torch.device, dtype: torch.dtype, blocks: int | None = None
) -> WanTransformer3DModel:
    """A Wan transformer of a known shape, optionally with fewer blocks."""
    own = WANS[shape] if blocks is None else WANS[shape] | {"num_layers": blocks}
    model: WanTransformer3DModel = random_model(lambda: WanTransformer3DModel(**own), device, dtype)
    return model


def weight_bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def denoiser_of(unet: UNet2DConditionModel) -> DiffusersDenoiser:
    """A denoiser with SD 1.5's schedule."""
    return DiffusersDenoiser(unet, build_scheduler())


# --- inputs and plain loops -------------------------------------------------------------------


def random_inputs(unet: UNet2DConditionModel, frames: int, size: int) -> tuple[Tensor, list[Any]]:
    """Latents of a clip of size x size pixels, and three texts: source, target, negative."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(frames, 4, size // 8, size // 8, generator=random)
    width = unet.config["cross_attention_dim"]
    texts: list[Any] = [torch.randn(1, 77, width, generator=random).to(unet.device) for _ in range(3)]
    if unet.config["addition_embed_type"] == "text_time":  # SDXL's
        of_text = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=unet.device)
        extras = [{"text_embeds": torch.randn(1, of_text, generator=random), "time_ids": sizes} for _ in texts]
        texts = [Condition(t, {k: v.to(unet.device) for k, v in e.items()}) for t, e in zip(texts, extras, strict=True)]
    return latents.to(unet.device), texts


def prompt_pair(words: bool) -> PromptEdit:
    """A prompt pair of a style edit, or of a shape edit with blend words."""
    tokenizer = build_tokenizer(Path(tempfile.mkdtemp()))
    source = "a red square on water"
    if words:
        return PromptEdit(source, "a red circle on water", tokenizer, "replace", (["square"], ["circle"]))
    return PromptEdit(source, f"watercolor painting of {source}", tokenizer)


@torch.no_grad()
def plain_inversion(unet: Any, schedule: Schedule, z: Tensor, text: Tensor | Condition) -> Tensor:
    """DDIM inversion of independent frames."""
    text = Condition.of(text, "text")
    for i, timestep in enumerate(reversed(schedule.timesteps)):
        noise = _of_unet(unet, z, timestep, [text] * len(z))
        z = ddim_move(z, noise, schedule.alphas[i], schedule.alphas[i + 1])
    return z


@torch.no_grad()
def plain_sampling(
    unet: Any, schedule: Schedule, z: Tensor, text: Tensor | Condition, negative: Tensor | Condition
) -> Tensor:
    """DDIM sampling with guidance, both prompts in one batch."""
    texts = [Condition.of(t, "text") for t in (negative, text) for _ in z]
    for step, timestep in enumerate(schedule.timesteps):
        level = schedule.steps - step
        noise = _of_unet(unet, torch.cat([z, z]), timestep, texts)
        z = ddim_move(z, guide(*noise.chunk(2), 7.5), schedule.alphas[level], schedule.alphas[level - 1])
    return z


def _of_unet(unet: Any, z: Tensor, timestep: float, texts: list[Condition]) -> Tensor:
    """The predicted noise of latents, with a text for each."""
    embeddings = torch.cat([text.embeddings for text in texts]).to(unet.dtype)
    added = {name: torch.cat([text.extras[name] for text in texts]).to(unet.dtype) for name in texts[0].extras}
    output: Tensor = unet(z.to(unet.dtype), timestep, embeddings, added_cond_kwargs=added or None).sample
    return output.to(z.dtype)


@torch.no_grad()
def plain_flow(model: Any, schedule: FlowSchedule, z: Tensor, text: Tensor, negative: Tensor) -> Tensor:
    """A video transformer's sampling with guidance, one call per prompt, like diffusers' pipeline."""
    for step, timestep in enumerate(schedule.timesteps):
        clip, at = rearrange(z, "f c y x -> 1 c f y x").to(model.dtype), torch.tensor([timestep], device=z.device)
        unguided, guided = (model(clip, at, t.to(model.dtype), return_dict=False)[0][0] for t in (negative, text))
        velocity = rearrange(guide(unguided, guided, 5.0), "c f y x -> f c y x").to(z.dtype)
        z = schedule.move(z, velocity, schedule.steps - step, schedule.steps - step - 1)
    return z


def guided_steps(
    denoiser: VideoTransformerDenoiser, z: Tensor, text: Condition, prompt: PromptEdit, fusion: FusionSettings
) -> dict[str, Callable[[], None]]:
    """One guided step of a video transformer: plain, and as an edit that fuses all attention.

    The edit evaluates its source in the same call, block by block ("beside"), or first, with all queries and keys
    stored ("before").
    """
    model: Any = denoiser.transformers[0]
    alignment = prompt.align(text.text_tokens, text.text_tokens).to(z.to(denoiser.dtype))

    @torch.no_grad()
    def plain() -> None:
        clip = rearrange(z, "f c y x -> 1 c f y x").to(model.dtype)
        at, embeddings = torch.full((1,), 500.0, device=z.device), text.embeddings.to(model.dtype)
        guide(*(model(clip, at, embeddings, return_dict=False)[0] for _ in range(2)), 5.0)

    plan = StepPlan(True, True, False, False)
    return {"plain": plain} | edit_steps(denoiser, z, text, lambda source: Fuser(source, alignment, fusion, plan))


def edit_steps(
    denoiser: Denoiser, z: Tensor, text: Condition, fused: Callable[[SourceStep], Control]
) -> dict[str, Callable[[], None]]:
    """One guided step of an edit whose source runs "beside" it or "before" it. fused: its control."""
    keys, chunk = KeyFrames((ALL,)), Chunk.whole(len(z))
    layers = {site.name for site in denoiser.sites(z.shape[-2], z.shape[-1])}

    def edited(source: SourceStep, paired: PairedBranch | None = None) -> None:
        guidance = Guidance(text, Control(keys, chunk), 5.0)
        denoiser.predict_noise(z, 500.0, text, fused(source), guidance, paired)

    @torch.no_grad()
    def beside() -> None:
        recorder = Recorder(keys, chunk, layers)
        pair = PairedBranch(z, text, recorder)
        with denoiser.hooked():
            edited(SourceStep(recorder.captured, keys, chunk, paired=pair), pair)

    @torch.no_grad()
    def before() -> None:
        recorder = Recorder(keys, chunk, layers)
        with denoiser.hooked():
            denoiser.predict_noise(z, 500.0, text, recorder)
            edited(recorder.step)

    return {"beside": beside, "before": before}


# --- time and memory --------------------------------------------------------------------------


def flops_of_call(shape: str, frames: int, size: int) -> int:
    """FLOP of one plain UNet call (two per multiply-add), counted on the meta device."""
    unet = random_unet(shape, torch.device("meta"), torch.float32)
    latents = torch.empty(frames, 4, size // 8, size // 8, device="meta")
    text = torch.empty(frames, 77, SHAPES[shape]["cross_attention_dim"], device="meta")
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros((), device="meta"), text)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP per second of a large matrix product, the best of several."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(8))
    return 2 * side**3 / best


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that work takes, with the device synchronized before and after. In one thread of a CPU these are the
    processor's, which other programs hardly change.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    settle(device)
    start = clock()
    work()
    settle(device)
    return clock() - start


@dataclass
class Taken:
    """The cost of work: seconds of each round, and peak bytes above the memory in use before."""

    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    @property
    def median(self) -> float:
        return median(self.seconds)

    def of(self, base: Taken) -> float:
        """The ratio to another's seconds, as a median over rounds."""
        return median(own / plain for own, plain in zip(self.seconds, base.seconds, strict=True))


def side_by_side(
    works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, seconds: float | None = None
) -> dict[str, Taken]:
    """Time works in turn, under the same conditions, after each has run once.

    seconds: time limit of the rounds; the first always runs.
    """
    for work in works.values():
        work()
    taken, begun = {name: Taken() for name in works}, time.perf_counter()
    for number in range(rounds):
        if number and seconds is not None and (time.perf_counter() - begun) * (number + 1) / number > seconds:
            break
        for name, work in works.items():
            with PeakMemory(device) as before:
                settle(device)
            with PeakMemory(device) as peak:
                taken[name].seconds.append(timed(work, device))
            taken[name].bytes = max(taken[name].bytes, peak.bytes - before.bytes)
    return taken


def settle(device: torch.device) -> None:
    """Synchronize a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Device, torch version and precision of the measurement."""
    return f"{device_name(device)}; torch {torch.__version__.partition('+')[0]}, {str(dtype).removeprefix('torch.')}"


@contextmanager
def attend_without_data() -> Iterator[list[int]]:
    """Replace attention on torch's meta device by one without a map, like fused kernels; yields the FLOP of each."""
    plain, counted = F.scaled_dot_product_attention, list[int]()

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        counted.append(4 * query.numel() * key.shape[-2])
        return torch.empty_like(query)

    F.scaled_dot_product_attention = attend
    try:
        yield counted
    finally:
        F.scaled_dot_product_attention = plain
