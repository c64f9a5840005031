"""Windows of long clips on Wan models with inputs besides text, whose inputs follow the window."""

import pytest
import torch
from comfyui.graph import Node, windows
from comfyui.host import NodeError
from comfyui.test_conditioned_wan import KINDS, SEED, STEPS, WanKindGraph, edited, folder
from comfyui.test_wan import hosts_guider

from small import relative

__all__ = ["folder"]
LATENTS = 5
OURS = {"window_frames": 9, "window_overlap": 4}
"""Of the video: three latents, one of which the next window shares."""


class LongGraph(WanKindGraph):
    """A clip of five latents, or some of them."""

    latents = stop = LATENTS
    start = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.add("OtherLatent", seed=1, shape=f"1,16,{self.latents},4,6")
        part = {"dim": "t", "index": self.start, "amount": self.stop - self.start}
        self.latent = self.add("LatentCut", samples=whole[0], **part)
        self.set(self.invert, latent=self.latent[0])

    def with_inputs(self, prompt):
        part = {"frames": self.latents, "start": self.start, "stop": self.stop}
        return self.add("WanInputs", conditioning=prompt, kind=self.kind, **part)


@pytest.fixture(params=KINDS)
def graph(request, folder) -> LongGraph:
    return LongGraph(folder=str(folder), kind=request.param)


def masked(graph) -> None:
    """Masked self-fusion, with an edit mask of the last frames of the video."""
    frames = 4 * LATENTS - 3
    masks = [graph.add("SolidMask", value=value, width=48, height=32) for value in (0.0, 1.0)]
    parts = [graph.add("RepeatImageBatch", image=graph.add("MaskToImage", mask=mask[0])[0], amount=count)
             for mask, count in zip(masks, (frames - 4, 4), strict=True)]  # fmt: skip
    both = graph.add("ImageBatch", image1=parts[0][0], image2=parts[1][0])
    mask = graph.add("ImageToMask", image=both[0], channel="red")
    graph.fuse(blend_self_attention=True, blend_latents=True, blend_latents_until=1.0)
    graph.set(graph.edit, mask=mask[0])


def test_ours_equal_the_hosts(host, graph):
    masked(graph)
    whole, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
    graph.set(graph.invert, **OURS)
    ours = edited(host, graph)
    assert 1e-4 < relative(ours, whole) < 1
    assert relative(ours[:, :, :-1], clip[:, :, :-1]) < 1e-5 < relative(ours[:, :, -1:], clip[:, :, -1:])
    graph.set(graph.invert, window_frames=0, window_overlap=0)
    graph.both(windows(graph))
    assert torch.equal(edited(host, graph), ours)
    graph.both(windows(graph, context_length=LATENTS))
    assert torch.equal(edited(host, graph), whole)
    graph.set(graph.invert, model=graph.model[0], window_frames=4 * LATENTS)
    graph.set(graph.edit, model=graph.model[0])
    assert torch.equal(edited(host, graph), whole)


@pytest.mark.parametrize("mode", ["shape", "style"])
def test_windows_without_overlap_are_edits_of_their_parts(host, folder, graph, mode):
    def settings(graph):
        graph.set(graph.words, blend_source="square", blend_target="striped")
        graph.set(graph.edit, preset=mode)
        return graph

    settings(graph).both(windows(graph, context_schedule="batched"))
    found = edited(host, graph)
    for start, stop in ((0, 3), (3, LATENTS)):
        kind = type("Part", (LongGraph,), {"start": start, "stop": stop})
        part = edited(host, settings(kind(folder=str(folder), kind=graph.kind)))
        assert relative(found[:, :, start:stop], part) < 1e-5


@pytest.mark.parametrize("options", [{}, {"causal_window_fix": True}, {"cond_retain_index_list": "0"}])
def test_plain_edits_equal_the_hosts_own_loop(host, graph, options):
    graph.unfused()
    graph.both(windows(graph, **options))
    assert relative(edited(host, graph), host.latents(graph.prompt, hosts_guider(graph)[0])) < 1e-4


def from_the_clip(graph) -> Node:
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.source[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=2, seed=SEED,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset="flow_edit")
    return store


def test_flow_edit_in_our_windows_equals_it_in_the_hosts(host, graph):
    store = from_the_clip(graph)
    graph.set(store, **OURS)
    ours = edited(host, graph)
    graph.set(store, window_frames=0, window_overlap=0, model=windows(graph))
    graph.set(graph.edit, model=graph.prompt[store.id]["inputs"]["model"])
    assert relative(edited(host, graph), ours) < 1e-5


def test_the_same_prompt_replays_the_clip(host, folder, graph):
    graph = LongGraph(folder=str(folder), kind=graph.kind, target="a red square on water")
    store = from_the_clip(graph)
    graph.set(store, source_guidance=1.0, draws=1, **OURS)
    graph.set(graph.edit, guidance=1.0)
    graph.fuse(cross_replace_steps=1.0)
    assert relative(edited(host, graph), host.latents(graph.prompt, graph.latent[0])) < 1e-5


@pytest.mark.parametrize("kind", ["camera", "vace", "vace_reference", "animate"])
def test_the_default_is_the_length_of_training(host, folder, kind):
    """Without windows where the clip begins with a reference."""
    long = type("Long", (LongGraph,), {"latents": 23, "stop": 23})
    graph = long(folder=str(folder), kind=kind)
    usual = edited(host, graph)
    graph.set(graph.invert, window_frames=81 if kind in ("camera", "vace") else 4 * 23)
    assert torch.equal(edited(host, graph), usual)


def test_context_windows_as_long_as_the_clip_run_it_whole(host, folder):
    long = type("Long", (LongGraph,), {"latents": 23, "stop": 23})
    graph = long(folder=str(folder), kind="camera")
    usual = edited(host, graph)
    graph.set(graph.invert, window_frames=4 * 23)
    whole = edited(host, graph)
    graph.set(graph.invert, window_frames=0)
    graph.both(windows(graph, context_length=4 * 23))
    assert torch.equal(edited(host, graph), whole)
    assert relative(whole, usual) > 1e-4


def test_a_pair_has_the_windows_of_its_first_model(host, folder):
    """With the picture that these retain, whether the node is before or after the pair."""
    graph = LongGraph(folder=str(folder), kind="i2v")
    model, other = graph.model, graph.add("WanKind", kind=graph.kind, seed=1)
    pair = graph.add("FateZeroWanPair", model=windows(graph, cond_retain_index_list="0"), low_noise=other[0],
                     boundary=0.97)  # fmt: skip
    graph.both(pair[0])
    before = edited(host, graph)
    graph.model = graph.add("FateZeroWanPair", model=model[0], low_noise=other[0], boundary=0.97)
    graph.both(windows(graph, cond_retain_index_list="0"))
    assert torch.equal(edited(host, graph), before)


def test_windows_of_the_low_noise_model_only_are_refused(host, folder):
    graph = LongGraph(folder=str(folder), kind="i2v")
    other = graph.add("WanKind", kind=graph.kind, seed=1)
    plain, graph.model = graph.model, other
    low = windows(graph, cond_retain_index_list="0")
    graph.model = plain
    graph.both(graph.add("FateZeroWanPair", model=plain[0], low_noise=low, boundary=0.97)[0])
    with pytest.raises(NodeError, match="low_noise: has Context Windows of its own"):
        edited(host, graph)


def test_tokens_inside_a_mask(host, folder):
    graph = LongGraph(folder=str(folder), kind="i2v")
    solid = graph.add("SolidMask", value=0.0, width=48, height=32)
    left = graph.add("SolidMask", value=1.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=solid[0], source=left[0], x=0, y=0, operation="add")
    settings = graph.add("FateZeroKVEdit", background_steps=1.0, tokens="inside", grow=0)
    graph.set(graph.edit, mask=mask[0], preset="custom", settings=settings[0])
    graph.set(graph.invert, **OURS)
    found, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
    assert relative(found[..., 2:], clip[..., 2:]) < 1e-5
    graph.set(graph.invert, window_frames=0, window_overlap=0)
    graph.both(windows(graph))
    assert torch.equal(edited(host, graph), found)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dim": 0}, "along dim 0, but frames are along dim 2"),
        ({"freenoise": True}, "context windows with freenoise"),
        ({"latent_retain_index_list": "0"}, "context windows with latent_retain_index_list"),
    ],
)
def test_what_is_refused(host, folder, options, error):
    graph = LongGraph(folder=str(folder), kind="i2v")
    graph.both(windows(graph, **options))
    with pytest.raises(NodeError, match=error):
        edited(host, graph)
