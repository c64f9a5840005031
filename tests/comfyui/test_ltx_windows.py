"""Windows of long clips on LTX-2, whose latents pack a video with its sound."""

import pytest
import torch
from comfyui import test_ltx
from comfyui.graph import Node, windows
from comfyui.host import NodeError
from comfyui.test_ltx import LTXGraph, model, of_folder, video_and_sound
from comfyui.test_ltx_guides import GuidedGraph

from fatezero import Windows
from fatezero.recipes.recipe import Recipe
from small import relative

__all__ = ["model", "of_folder"]
LATENTS, SOUND = 5, 12
OURS = {"window_frames": 17, "window_overlap": 8}
"""Of the video: three latents, one of which the next window shares."""


@pytest.fixture
def graph() -> LTXGraph:
    return LTXGraph(sound=SOUND, shape=f"1,128,{LATENTS},2,3")


def last_frames(graph) -> list:
    """A mask of the frames of the last latent."""
    masks = [graph.add("SolidMask", value=value, width=96, height=64) for value in (0.0, 1.0)]
    counts = (8 * (LATENTS - 2) + 1, 8)
    parts = [graph.add("RepeatImageBatch", image=graph.add("MaskToImage", mask=mask[0])[0], amount=count)
             for mask, count in zip(masks, counts, strict=True)]  # fmt: skip
    both = graph.add("ImageBatch", image1=parts[0][0], image2=parts[1][0])
    return graph.add("ImageToMask", image=both[0], channel="red")[0]


def fused(graph, preset="shape+") -> Node:
    graph.set(graph.edit, preset=preset, mask=last_frames(graph))
    return graph.invert


def plain(graph) -> Node:
    graph.set(graph.edit, preset="none")
    return graph.invert


def kept(graph) -> Node:
    return fused(graph, "kv_edit")


def sampled(graph) -> Node:
    """FlowEdit with fusion, from two samples of noise."""
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=test_ltx.STEPS,
        source_guidance=2.0, draws=2, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0])
    return store


@pytest.mark.parametrize("sound", ["keep", "edit"])
@pytest.mark.parametrize("method", [fused, plain, kept, sampled])
def test_ours_equal_the_hosts(host, graph, method, sound):
    start = method(graph)
    graph.set(start, sound=sound)
    whole, clip = (video_and_sound(host, graph, link) for link in (graph.edit[0], graph.latent[0]))
    graph.set(start, **OURS)
    ours = video_and_sound(host, graph, graph.edit[0])
    assert 1e-5 < relative(ours[0], whole[0]) < 1
    assert (relative(ours[1], clip[1]) < 1e-6) == (sound == "keep")
    if method in (fused, kept):
        assert relative(ours[0][:, :, :-1], clip[0][:, :, :-1]) < 1e-5 < relative(ours[0][:, :, -1], clip[0][:, :, -1])
    graph.set(start, window_frames=0, window_overlap=0)
    for handler, expected in ((windows(graph), ours), (windows(graph, context_length=LATENTS), whole)):
        graph.set(start, model=handler)
        graph.set(graph.edit, model=handler)
        for one, other in zip(video_and_sound(host, graph, graph.edit[0]), expected, strict=True):
            assert relative(one, other) < 1e-5, "the host calls both branches at once"


@pytest.mark.parametrize("preset", ["style", "shape+"])
def test_windows_without_overlap_are_edits_of_their_parts(host, graph, preset):
    graph.set(graph.edit, preset=preset)
    if preset == "shape+":
        graph.set(graph.edit, mask=test_ltx.left_kept(graph))
    graph.set(graph.invert, sound="edit")
    graph.both(windows(graph, context_schedule="batched"))
    found = video_and_sound(host, graph, graph.edit[0])
    graph.both(graph.model[0])
    for part, sound_part in (("0:3", "0:7"), ("3:5", "7:12")):
        graph.set(graph.latent, part=part, sound_part=sound_part)
        for whole, own, of in zip(found, video_and_sound(host, graph, graph.edit[0]), (part, sound_part), strict=True):
            assert relative(whole[:, :, slice(*map(int, of.split(":")))], own) < 1e-5


HANDLERS = [
    {},
    {"causal_window_fix": True},
    {"fuse_method": "overlap-linear"},
    {"fuse_method": "relative"},
    {"context_schedule": "looped_uniform", "closed_loop": True},
]


@pytest.mark.parametrize("options", HANDLERS)
def test_plain_edits_equal_the_hosts_own_loop(host, graph, options):
    """FlowEdit without attention control is called and split by the host."""
    store = sampled(graph)
    graph.set(graph.edit, preset="none")
    handler = windows(graph, **options)
    graph.set(store, model=handler, sound="edit")
    graph.set(graph.edit, model=handler)
    by_host = video_and_sound(host, graph, graph.edit[0])
    graph.set(graph.edit, **controlled_without_effect(graph))
    for ours, theirs in zip(video_and_sound(host, graph, graph.edit[0]), by_host, strict=True):
        assert relative(ours, theirs) < 1e-5


def controlled_without_effect(graph) -> dict:
    values = {
        "cross_replace_steps": 0.0, "self_replace_steps": 0.0, "blend_self_attention": False, "blend_latents": False,
        "blend_threshold": 0.3, "max_tokens": 0, "mask_tokens": 256, "mask_from": "attention",
        "blend_latents_until": 0.8, "separate_words": 0.0,
    }  # fmt: skip
    return {"preset": "custom", "settings": graph.add("FateZeroFusion", **values)[0]}


def test_the_same_prompt_replays_the_clip(host, graph):
    store = sampled(graph)
    graph.set(store, source_guidance=1.0, draws=1, sound="edit", **OURS)
    graph.set(graph.words, target=test_ltx.SOURCE)
    graph.set(graph.edit, guidance=1.0)
    clip = video_and_sound(host, graph, graph.latent[0])
    for found, own in zip(video_and_sound(host, graph, graph.edit[0]), clip, strict=True):
        assert relative(found, own) < 1e-5


@pytest.mark.parametrize("preset", ["style", "attribute+", "shape+"])
def test_both_hosts_agree(host, model, of_folder, preset):
    graph, (found, texts, _) = of_folder, model
    graph.set(graph.latent, shape="1,8,5,4,6")
    graph.set(graph.edit, preset=preset)
    graph.set(graph.invert, memory="recompute", **OURS)
    injection = Recipe.of_preset(preset, test_ltx.SOURCE, test_ltx.TARGET).injection
    noise, ours = test_ltx.by_library(found, texts, injection, frames=LATENTS, windows=Windows(3, 1))
    inverted, theirs = (
        host.latents(graph.prompt, link)[0].transpose(0, 1) for link in (graph.invert[0], graph.edit[0])
    )
    assert relative(inverted, noise) < 1e-4
    assert relative(theirs, ours) < 1e-4


def test_the_default_is_the_length_of_training(host):
    graph = LTXGraph(sound=40, shape="1,128,34,1,2")
    usual = video_and_sound(host, graph, graph.edit[0])
    graph.set(graph.invert, window_frames=257)
    ours = video_and_sound(host, graph, graph.edit[0])
    graph.set(graph.invert, window_frames=8 * 34)
    whole = video_and_sound(host, graph, graph.edit[0])
    assert torch.equal(usual[0], ours[0])
    assert relative(usual[0], whole[0]) > 1e-4


@pytest.mark.parametrize(
    ("options", "error"),
    [({"dim": 0}, "along dim 0, but frames are along dim 2"), ({"freenoise": True}, "context windows with freenoise"),
     ({"cond_retain_index_list": "0"}, "context windows with cond_retain_index_list")],
)  # fmt: skip
def test_what_is_refused(host, graph, options, error):
    graph.both(windows(graph, **options))
    with pytest.raises(NodeError, match=error):
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize("more", [{"sound": SOUND}, {"sound": SOUND, "first": 1.0, "guides": ()}])
@pytest.mark.parametrize("ours", [True, False])
def test_guides_need_the_whole_clip(host, ours, more):
    graph = GuidedGraph(**more)
    if ours:
        graph.set(graph.invert, **OURS)
    else:
        graph.both(windows(graph))
    with pytest.raises(NodeError, match="denoise_mask.* of a prompt needs all frames"):
        host.latents(graph.prompt, graph.edit[0])
