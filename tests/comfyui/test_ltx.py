"""Attention control of LTX-2: both hosts agree, clips with sound, and other nodes in the host's chain."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from comfyui.graph import Graph, Node
from flow_models import LTX23, write_ltx2
from safetensors.torch import save_file

from fatezero import PromptEdit, edit, invert
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.recipes.recipe import Recipe
from small import relative

SOURCE, TARGET, NEGATIVE = "a red fox by night", "the quick brown fox, by night", "dog"
STEPS, SHIFT, GUIDANCE = 4, 2.0, 5.0


@dataclass
class LTXGraph(Graph):
    """Random latents, inverted and edited."""

    sound: int = 5
    shape: str = "1,128,3,2,3"
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.make_model()
        self.latent = self.add("LTXLatent", seed=1, shape=self.shape, sound=self.sound)
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.model[1], source=SOURCE, target=TARGET, mode="refine",
            blend_source="", blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.model[1], text=NEGATIVE)
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.words[0], latent=self.latent[0], steps=STEPS,
            key_frames="self, middle", clip_norm=False, memory="auto", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=GUIDANCE, preset="style",
        )  # fmt: skip

    def make_model(self) -> Node:
        return self.add("LTXModel")

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)


def video_and_sound(host, graph, link) -> list[torch.Tensor]:
    return [host.latents(graph.prompt, graph.add("FlowStream", latent=link, number=i)[0]) for i in range(2)]


@pytest.fixture
def graph() -> LTXGraph:
    return LTXGraph()


# --- both hosts -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, LTX23], ids=["2", "2.3"])
def model(request, tmp_path_factory):
    """A pipeline of diffusers for a clip, with the embeddings of the prompts for the host."""
    folder = write_ltx2(tmp_path_factory.mktemp("ltx2"), **request.param)
    found = open_model(str(folder)).for_clip(ClipFacts((3, 8, 4, 6), 8.0))
    texts = {text: found.encode_prompt(text, 192, 128) for text in (SOURCE, TARGET, NEGATIVE)}
    both = {name: torch.cat([one.embeddings, one.extras["sound"]], -1).contiguous() for name, one in texts.items()}
    save_file(both, folder / "texts.safetensors")
    return found, texts, folder


class FolderGraph(LTXGraph):
    folder = ""

    def make_model(self) -> Node:
        return self.add("LTXFolder", folder=self.folder, shift=SHIFT)


@pytest.fixture
def of_folder(model) -> LTXGraph:
    FolderGraph.folder = str(model[2])
    return FolderGraph(sound=0, shape="1,8,3,4,6")


def host_schedule() -> FlowSchedule:
    """The host's "simple" sigmas."""
    u = torch.arange(1, 10001) / 10000
    table = math.exp(SHIFT) / (math.exp(SHIFT) + (1 / u - 1))
    sigmas = torch.stack([*(table[-(1 + int(i * 10000 / STEPS))] for i in range(STEPS)), torch.zeros(())])
    return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


def by_library(found, texts, injection, memory="recompute", order=1, **more):
    denoiser = type("Hosts", (type(found.denoiser),), {"schedule": lambda self, steps: host_schedule()})(found)
    latents = torch.randn(1, 8, 3, 4, 6, generator=torch.Generator().manual_seed(1))[0].transpose(0, 1)
    inversion = invert(denoiser, latents, texts[SOURCE], STEPS, memory=memory, order=order)
    pair = None if injection is None else PromptEdit(SOURCE, TARGET, found.tokenizer)
    done = edit(denoiser, inversion, texts[TARGET], texts[NEGATIVE], GUIDANCE, pair, injection, **more)
    return inversion.latents[-1], done


@pytest.mark.parametrize(
    ("preset", "memory", "order"),
    [("none", "recompute", 1), ("style", "recompute", 1), ("style+", "queries_keys", 1), ("attribute+", "auto", 2),
     ("shape+", "recompute", 1)],
)  # fmt: skip
def test_both_hosts_agree(host, model, of_folder, preset, memory, order):
    graph, (found, texts, _) = of_folder, model
    graph.set(graph.invert, memory=memory, order=order)
    graph.set(graph.edit, preset=preset)
    injection = None if preset == "none" else Recipe.of_preset(preset, SOURCE, TARGET).injection
    noise, ours = by_library(found, texts, injection, order=order)
    clip, inverted, theirs = (
        host.latents(graph.prompt, link)[0].transpose(0, 1)
        for link in (graph.latent[0], graph.invert[0], graph.edit[0])
    )
    assert relative(inverted, noise) < 1e-4
    assert relative(theirs, ours) < 1e-4
    assert relative(theirs, clip) > 1e-2


# --- clips with sound -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["style", "attribute+", "shape+"])
def test_sound_is_kept_or_follows_the_edit(host, graph, preset):
    graph.set(graph.edit, preset=preset)
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) < 1e-6
    assert relative(video, before[0]) > 1e-2
    graph.set(graph.invert, sound="edit")
    other, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) > 1e-2
    assert relative(other, video) > 1e-4, "the sound acts on the video"
    graph.add("PreviewAny", source=graph.edit[1])
    host.forget()  # texts of cached nodes are not sent again
    assert "hooked 6 of 6 attention layers" in host.text(host.run(graph.prompt), graph.edit.id)
