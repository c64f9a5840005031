"""FlowEdit and masks on any model that is sampled as a flow, without control of its attention."""

from dataclasses import dataclass

import pytest
import torch
from comfyui.graph import Graph
from comfyui.host import Host, NodeError

from small import relative

KINDS = ("h3", "ltxav", "qwen", "z_image", "flux", "wan_i2v", "wan_vace")
WITH_SOUND = ("h3", "ltxav")
STEPS, GUIDANCE, SEED = 4, 3.0, 5


@dataclass
class FlowGraph(Graph):
    """FlowEdit of random latents by a small model of random weights."""

    kind: str = "flux"

    def __post_init__(self) -> None:
        self.model = self.add("FlowModel", kind=self.kind)
        self.latent = self.add("FlowLatent", kind=self.kind, seed=1)
        self.source, self.target, self.negative = (self.add("FlowText", kind=self.kind, seed=s) for s in (10, 20, 30))
        self.store = self.add(
            "FateZeroFlowEdit", model=self.model[0], source=self.source[0], latent=self.latent[0], steps=STEPS,
            source_guidance=2.0, draws=1, seed=SEED, sound="edit",
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.target[0], negative=self.negative[0],
            store=self.store[0], guidance=GUIDANCE, preset="flow_edit", strength=1.0,
        )  # fmt: skip


def streams(host: Host, graph: Graph, link) -> list[torch.Tensor]:
    """The streams of a latent: the video, and the sound if there is one."""
    count = 2 if graph.kind in WITH_SOUND else 1
    return [host.latents(graph.prompt, graph.add("FlowStream", latent=link, number=i)[0]) for i in range(count)]


@pytest.fixture(params=KINDS)
def graph(host, request) -> FlowGraph:
    return FlowGraph(kind=request.param)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_edit_is_the_papers_loop_on_the_hosts_guider(host, graph, strength):
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    loop = graph.add(
        "FlowLoop", model=graph.model[0], source=graph.source[0], positive=graph.target[0], negative=graph.negative[0],
        latent=graph.latent[0], sigmas=sigmas[0], guidance=GUIDANCE, source_guidance=2.0,
        first=round(STEPS * (1 - strength)), seed=SEED,
    )  # fmt: skip
    graph.set(graph.edit, strength=strength)
    given = streams(host, graph, graph.latent[0])
    for ours, theirs, before in zip(
        streams(host, graph, graph.edit[0]), streams(host, graph, loop[0]), given, strict=True
    ):
        assert relative(ours, theirs) < 1e-5
        assert relative(ours, before) > 1e-2


def test_the_same_prompt_twice_gives_the_clip_back(host, graph):
    graph.set(graph.edit, positive=graph.source[0], guidance=1.0)
    graph.set(graph.store, source_guidance=1.0)
    for ours, before in zip(streams(host, graph, graph.edit[0]), streams(host, graph, graph.latent[0]), strict=True):
        assert relative(ours, before) < 1e-5, relative(ours, before)


def test_a_mask_of_nothing_gives_the_clip_back_bit_for_bit(host, graph):
    mask = graph.add("SolidMask", value=0.0, width=32, height=32)
    graph.set(graph.edit, mask=mask[0])
    graph.set(graph.store, sound="keep")
    for ours, before in zip(streams(host, graph, graph.edit[0]), streams(host, graph, graph.latent[0]), strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("preset", ["attribute+", "pnp", "kv_edit"])
def test_what_needs_attention_is_refused_by_name(host, preset):
    graph = FlowGraph(kind="wan_vace")
    graph.set(graph.edit, preset=preset)
    with pytest.raises(NodeError, match=f"{preset}.* needs control of the attention.*WAN21_Vace.*FlowEdit"):
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize("kind", WITH_SOUND)
def test_sound_is_kept_or_edited(host, kind):
    graph = FlowGraph(kind=kind)
    graph.set(graph.store, sound="keep")
    video, sound = streams(host, graph, graph.edit[0])
    before = streams(host, graph, graph.latent[0])
    assert relative(video, before[0]) > 1e-2
    assert torch.equal(sound, before[1])
    half = graph.add("SolidMask", value=1.0, width=32, height=32)
    none = graph.add("SolidMask", value=0.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=half[0], source=none[0], x=0, y=0, operation="multiply")
    graph.set(graph.edit, mask=mask[0])
    for choice in ("keep", "edit"):
        graph.set(graph.store, sound=choice)
        video, sound = streams(host, graph, graph.edit[0])
        middle = video.shape[-1] // 2
        assert torch.equal(video[..., :middle], before[0][..., :middle])
        assert relative(video[..., middle + 1 :], before[0][..., middle + 1 :]) > 1e-3
        assert torch.equal(sound, before[1]) == (choice == "keep")
