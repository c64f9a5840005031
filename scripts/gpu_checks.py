"""Checks on a GPU: equality with the CPU, equality of memories, graphs and streams, and GPU-only code paths."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import accelerate
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gpu_machine import Machine, Measured, Units, unet_clip
from safetensors.torch import load_file
from torch import Tensor

from fatezero import (
    FlowEditSettings,
    LayoutGuidance,
    PnPSettings,
    PromptEdit,
    StoreSettings,
    TokenFlowSettings,
    TuneSettings,
    draw,
    edit,
    generate,
    invert,
    tune,
)
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.benchmarks.common import prompt_pair, random_wan, side_by_side
from fatezero.demo.model import build_scheduler
from fatezero.demo.video_model import build_tokenizer
from fatezero.hosts.diffusers import (
    DiffusersDenoiser,
    DiffusersVideoDenoiser,
    VideoTransformerDenoiser,
    with_temporal_layers,
)
from fatezero.metrics.memory import PeakMemory
from fatezero.recipes.recipe import Recipe
from fatezero.store.backends import read
from fatezero.tests.small import (
    FIXTURES,
    random_latents,
    random_text,
    reference_denoiser,
    reference_edit,
    reference_keys,
    reference_video_unet,
    relative,
    small_unet,
)

CPU = torch.device("cpu")
Run = Callable[[torch.device, torch.dtype], Tensor]
"""A result by device and precision of the model."""


def in_single_at_least(dtype: torch.dtype) -> torch.dtype:
    """The precision of latents for a model's."""
    return dtype if dtype == torch.float64 else torch.float32


def exactly() -> None:
    """Disable TF32 on a GPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


# --- equality with the CPU ------------------------------------------------------------------

DIGITS: Units = {"float64": "", "float32": "", "bfloat16": "", "float16": ""}


def digits(at: Machine, run: Run, shape: str, precisions: tuple[str, ...] = tuple(DIGITS)) -> Measured:
    """The largest difference to float64 on the CPU, as a share of the largest value."""
    exactly()
    truth, numbers = run(CPU, torch.float64), {}
    for name in precisions:
        if name == "bfloat16":
            at.half(name)
        numbers[name] = relative(run(at.device, getattr(torch, name)).double().cpu(), truth)
    return Measured(numbers, shape)


def given(at: Machine, side: int, *names: str) -> dict[str, Tensor]:
    """The tensors of a reference result from its files; a corner of the latents for trial runs."""
    tensors = dict(ChainMap(*(load_file(FIXTURES / f"{name}.safetensors") for name in reversed(names))))
    if at.tiny:
        tensors["z0"] = tensors["z0"][..., :side, :side].contiguous()
    return tensors


def placed(tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    like = torch.empty(0, device=device, dtype=in_single_at_least(dtype))
    return {name: t.to(like) if t.is_floating_point() else t for name, t in tensors.items()}


def reference(device: torch.device, dtype: torch.dtype) -> DiffusersDenoiser:
    denoiser = reference_denoiser()
    denoiser.unet.to(device, dtype)
    return denoiser


def fatezero_case(at: Machine, name: str) -> Measured:
    """FateZero's reference results: `tests/hosts/test_parity.py` compares the CPU's with the authors'."""
    cases = json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))
    case, tensors = cases["cases"][name], given(at, 16, "reconstruct", name)
    steps = 2 if at.tiny else cases["steps"]
    (prompt, fusion), keys = reference_edit(cases["source"], case), reference_keys(case)

    def run(device: torch.device, dtype: torch.dtype) -> Tensor:
        denoiser, own = reference(device, dtype), placed(tensors, device, dtype)
        inversion = invert(denoiser, own["z0"], own["source"], steps, keys, clip_norm=True)
        return edit(denoiser, inversion, own["target"], own["uncond"], case["cfg"], prompt, fusion)

    return digits(at, run, f"{tuple(tensors['z0'].shape)}, {steps} steps")


def tokenflow_case(at: Machine) -> Measured:
    tensors = given(at, 16, "tokenflow_pnp")
    if at.tiny:
        tensors["pivots"] = tensors["pivots"][:2]
    propagation = TokenFlowSettings(batch_frames=4, pivots=tensors["pivots"])

    def run(device: torch.device, dtype: torch.dtype) -> Tensor:
        denoiser, own = reference(device, dtype), placed(tensors, device, dtype)
        inversion = invert(denoiser, own["z0"], own["source"], len(tensors["pivots"]), "self")
        return edit(
            denoiser, inversion, own["target"], own["uncond"], 7.5, fusion=PnPSettings(), propagation=propagation
        )

    return digits(at, run, f"{tuple(tensors['z0'].shape)}, {len(tensors['pivots'])} steps")


def guidance_case(at: Machine) -> Measured:
    """Backward guidance, whose gradients pass through the model."""
    tensors = load_file(FIXTURES / "guidance_backward.safetensors")
    steps = 2 if at.tiny else 4

    def run(device: torch.device, dtype: torch.dtype) -> Tensor:
        unet: Any = reference_video_unet()
        denoiser = DiffusersVideoDenoiser(unet.to(device, dtype), build_scheduler())
        own = placed(tensors, device, dtype)
        layout = LayoutGuidance(target=own["target"], columns=[3], steps=range(steps - 1))
        return generate(denoiser, own["z0"], own["text"], own["negative"], steps, 15.0, "self", False, layout=layout)

    return digits(at, run, f"{tuple(tensors['z0'].shape)}, {steps} steps", ("float64", "float32"))


GUIDANCE: Units = {name: DIGITS[name] for name in ("float64", "float32")}


def wan_case(at: Machine, flow_edit: bool) -> Measured:
    """A small Wan with random weights: a fused edit, or FlowEdit."""
    plain, steps = random_wan("tiny", CPU, torch.float64), 2 if at.tiny else 5
    random = torch.Generator().manual_seed(1)
    tensors = {"z0": torch.randn(3, 16, 8, 8, generator=random, dtype=torch.float64)}
    for name in ("source", "target", "negative"):
        tensors[name] = torch.randn(1, 32, 32, generator=random, dtype=torch.float64)
    words = "a red square on water", "a blue star on water"
    prompt = PromptEdit(*words, build_tokenizer(), "refine", (["square"], ["star"]))
    fusion = Recipe.of_preset("shape").injection

    def run(device: torch.device, dtype: torch.dtype) -> Tensor:
        model = random_wan("tiny", device, dtype)
        model.load_state_dict(plain.state_dict())
        denoiser = VideoTransformerDenoiser(model, FlowMatchEulerDiscreteScheduler(shift=3.0))
        own = placed(tensors, device, dtype)
        if flow_edit:
            drawn = draw(denoiser, own["z0"], own["source"], steps, FlowEditSettings())
            return edit(denoiser, drawn, own["target"], own["negative"], 10.0)
        inversion = invert(denoiser, own["z0"], own["source"], steps)
        return edit(denoiser, inversion, own["target"], own["negative"], 5.0, prompt, fusion)

    return digits(at, run, f"{tuple(tensors['z0'].shape)}, {steps} steps")


TUNED: Units = {"float32": ""}


def tuning_case(at: Machine) -> Measured:
    """The losses of three training steps."""
    clip, text, random = random_latents(), random_text(2), torch.Generator().manual_seed(3)
    noise = torch.randn(3, *clip.shape, generator=random, dtype=torch.float64)

    def run(device: torch.device, dtype: torch.dtype) -> Tensor:
        unet = small_unet().to(device, dtype)
        denoiser = DiffusersDenoiser(with_temporal_layers(unet), build_scheduler())
        own = placed({"clip": clip, "text": text, "noise": noise}, device, dtype)
        draws = list(zip((801, 401, 1), own["noise"], strict=True))
        losses = tune(denoiser, own["clip"], own["text"], TuneSettings(steps=3), draws)
        return torch.tensor(losses, dtype=torch.float64)

    return digits(at, run, f"{tuple(clip.shape)}, losses of 3 steps", ("float32",))


# --- a store's memories ----------------------------------------------------------------------

MEMORIES: Units = {"queries_keys, device": "", "queries_keys, RAM": "", "queries_keys, disk": "", "maps": ""}
KEPT = {
    "queries_keys, device": StoreSettings("queries_keys", "device"),
    "queries_keys, RAM": StoreSettings("queries_keys", "ram"),
    "queries_keys, disk": StoreSettings("queries_keys", "disk"),
    "maps": StoreSettings("maps"),
}


def shape_edit(clip: Any, memory: str | StoreSettings = "recompute") -> tuple[Tensor, Any]:
    """A shape edit and its store."""
    inversion = invert(clip.denoiser, clip.latents, clip.source, clip.steps, memory=memory)
    prompt, fusion = prompt_pair(True), Recipe.of_preset("shape").injection
    return edit(clip.denoiser, inversion, clip.target, clip.negative, 7.5, prompt, fusion), inversion.store


def memories(at: Machine, precision: str) -> Measured:
    """An edit from each memory, compared with `recompute`."""
    exactly()
    clip = unet_clip(at, "mid", 4, 256, 5)
    if precision == "float32":
        clip.denoiser.unet.float()
    computed = shape_edit(clip)[0]
    numbers = {name: relative(shape_edit(clip, settings)[0], computed) for name, settings in KEPT.items()}
    return Measured(numbers, clip.shape, clip.denoiser.dtype, f"{clip.steps} steps")


PINNED: Units = {"pinned": "%"}


def pinned(at: Machine) -> Measured:
    """The share of a store in RAM that is pinned, for asynchronous copies."""
    at.need_cuda("pinned stores")
    clip = unet_clip(at, "mid", 4, 256, 2)
    store = shape_edit(clip, StoreSettings("queries_keys", "ram"))[1]
    tensors = [
        read(t) for step in range(clip.steps) for parts in store.backend.tensors(step).values() for t in parts.values()
    ]
    share = sum(t.is_pinned() for t in (store.levels, *tensors)) / (1 + len(tensors))
    return Measured({"pinned": 100 * share}, clip.shape, clip.denoiser.dtype)


# --- graphs and streams ----------------------------------------------------------------------

GRAPH: Units = {"eager": "ms", "replayed": "ms", "of eager": "x", "difference": ""}


@torch.no_grad()
def cuda_graph(at: Machine) -> Measured:
    """A hooked UNet call, captured once and replayed on other latents."""
    at.need_cuda("CUDA graphs")
    clip = unet_clip(at)
    denoiser, text = clip.denoiser, Condition(clip.target)
    control = Control(KeyFrames(("self", "middle")), Chunk.whole(len(clip.latents)))
    other = clip.latents.flip(0)
    still = clip.latents.to(denoiser.dtype)
    timestep, embeddings = torch.tensor(501, device=at.device), clip.target.to(denoiser.dtype)
    with denoiser.hooked():

        def eager() -> Tensor:
            return denoiser.predict_noise(other, 501, text, control)

        def call() -> Tensor:
            return denoiser.unet(still, timestep, encoder_hidden_states=embeddings).sample

        expected = eager()  # leaves the control and the text's keys and values to the hooks
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = call()
        still.copy_(other)
        graph.replay()
        difference = relative(made.to(expected), expected)
        taken = side_by_side({"eager": eager, "replayed": graph.replay}, at.device, 10, at.seconds)
    return Measured(
        {
            "eager": 1e3 * taken["eager"].median,
            "replayed": 1e3 * taken["replayed"].median,
            "of eager": taken["replayed"].of(taken["eager"]),
            "difference": difference,
        },
        clip.shape,
        denoiser.dtype,
    )


STREAM: Units = {"difference": ""}


def side_stream(at: Machine) -> Measured:
    """An inversion into RAM and its edit on the caller's stream, compared with the default stream."""
    at.need_cuda("streams")
    clip = unet_clip(at, "mid", 4, 256, 5)
    settings = StoreSettings("queries_keys", "ram")
    expected = shape_edit(clip, settings)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = shape_edit(clip, settings)[0]
    torch.cuda.current_stream().wait_stream(stream)
    return Measured({"difference": relative(found, expected)}, clip.shape, clip.denoiser.dtype)


# --- GPU-only code paths ----------------------------------------------------------------------

COUNTED: Units = {"counted": "x"}


def peak_memory(at: Machine) -> Measured:
    """`PeakMemory` of a tensor of 256 MiB."""
    with PeakMemory(at.device) as before:
        pass
    with PeakMemory(at.device) as peak:
        tensor = torch.ones(2**26, device=at.device)
    return Measured({"counted": (peak.bytes - before.bytes) / tensor.nbytes}, "256 MiB", tensor.dtype)


OFFLOADED: Units = {"difference": ""}


def offloaded(at: Machine) -> Measured:
    """An edit with a UNet whose weights are offloaded to RAM (accelerate), compared with the device."""
    clip = unet_clip(at, "mid", 4, 256, 3)
    expected = shape_edit(clip)[0]
    accelerate.cpu_offload_with_hook(clip.denoiser.unet, at.device)
    return Measured({"difference": relative(shape_edit(clip)[0], expected)}, clip.shape, clip.denoiser.dtype)
