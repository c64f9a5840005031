"""A Wan MODEL: both hosts edit it alike, and what stands beside it in the host's chain counts."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from comfyui.graph import Graph, Node
from wan import write_wan

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.checkpoint_wan import WanCheckpoint
from fatezero.hosts.diffusers_transformer import VideoTransformerDenoiser
from fatezero.methods.fatezero import preset_fusion
from small import relative

SOURCE, TARGET = "a red square on water", "a green striped square on water"
STEPS, FRAMES, SHIFT = 4, 3, 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def checkpoint(folder) -> WanCheckpoint:
    return WanCheckpoint.load(str(folder))


class Hosts(VideoTransformerDenoiser):
    """With ComfyUI's "simple" sigmas of `SHIFT`."""

    def schedule(self, steps: int) -> FlowSchedule:
        u = torch.arange(1, 1001) / 1000
        table = SHIFT * u / (1 + (SHIFT - 1) * u)
        sigmas = torch.stack([*(table[-(1 + int(i * 1000 / steps))] for i in range(steps)), torch.zeros(())])
        return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


@dataclass
class WanGraph(Graph):
    """Random latents, inverted and edited by the transformer of a folder."""

    folder: str = ""
    size: tuple[int, int] = (4, 6)
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.add("OtherWan", folder=self.folder, shift=SHIFT)
        self.latent = self.add("OtherLatent", seed=1, shape=f"1,16,{FRAMES},{self.size[0]},{self.size[1]}")
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.model[1], source=SOURCE, target=TARGET, mode="refine",
            blend_source="", blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.model[1], text="")
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.words[0], latent=self.latent[0], steps=STEPS,
            key_frames="self, middle", clip_norm=False, memory="recompute", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=5.0, preset="style",
        )  # fmt: skip

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)


@pytest.fixture
def graph(folder) -> WanGraph:
    return WanGraph(folder=str(folder))


def statistics(checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    config = checkpoint.vae.config
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, deviation


def library_latents(checkpoint, size=(4, 6)) -> torch.Tensor:
    """The graph's latents as the library has them."""
    mean, deviation = statistics(checkpoint)
    samples = torch.randn(1, 16, FRAMES, *size, generator=torch.Generator().manual_seed(1))
    return ((samples - mean) / deviation)[0].transpose(0, 1)


def by_host(host, graph, checkpoint) -> torch.Tensor:
    mean, deviation = statistics(checkpoint)
    return ((host.latents(graph.prompt, graph.edit[0]) - mean) / deviation)[0].transpose(0, 1)


def by_library(checkpoint, fusion, drawn=None, memory="recompute", order=1, mode="refine", **more) -> torch.Tensor:
    denoiser = Hosts(checkpoint.transformer, checkpoint.scheduler)
    source, target, empty = (checkpoint.encode_prompt(text, 48, 32) for text in (SOURCE, TARGET, ""))
    latents = library_latents(checkpoint)
    if drawn is None:
        inversion = invert(denoiser, latents, source, STEPS, memory=memory, order=order)
    else:
        inversion = draw(denoiser, latents, source, STEPS, drawn)
    prompt = PromptEdit(SOURCE, TARGET, checkpoint.tokenizer, mode, (["square"], ["striped"]))
    return edit(denoiser, inversion, target, empty, 5.0, prompt if fusion else None, fusion, **more)


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("preset", "memory", "order"),
    [("style", "recompute", 1), ("shape", "queries_keys", 1), ("attribute+", "recompute", 2), ("none", "recompute", 2)],
)
def test_the_two_hosts_agree(host, graph, checkpoint, preset, memory, order):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.invert, memory=memory, order=order)
    graph.set(graph.edit, preset=preset)
    fusion = None if preset == "none" else preset_fusion(preset)
    ours = by_library(checkpoint, fusion, memory=memory, order=order)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4
    assert relative(ours, library_latents(checkpoint)) > 1e-2


@pytest.mark.every_host
@pytest.mark.parametrize("preset", ["none", "style"])
def test_flow_edit_agrees(host, graph, checkpoint, preset):
    settings = FlowEditSettings(2.0, draws=2, seed=3)
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=2, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset, strength=0.75)
    fusion = None if preset == "none" else preset_fusion(preset)
    ours = by_library(checkpoint, fusion, settings, strength=0.75)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4


def test_calls_of_their_own_give_the_same(host, graph, checkpoint):
    """Where a card is full, the host runs branches one by one: the source's first."""
    together = by_host(host, graph, checkpoint)
    graph.both(graph.add("OtherSeparateCalls", model=graph.model[0])[0])
    assert relative(by_host(host, graph, checkpoint), together) < 1e-5
    assert isinstance(preset_fusion("style"), FusionSettings)
