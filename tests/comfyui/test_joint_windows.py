"""Windows of long clips on MiniMax H3, whose latents come in groups of five, packed with a sound."""

import pytest
import torch
from comfyui import test_joint
from comfyui.graph import windows
from comfyui.host import NodeError
from comfyui.test_joint import JointGraph, model, weights

from fatezero import FlowEditSettings, Windows
from small import relative

__all__ = ["model", "weights"]
LONG = ((1, 24, 12, 4, 6), (1, 32, 2, 65))


@pytest.fixture
def joint(weights) -> JointGraph:
    graph = JointGraph(weights=weights)
    graph.set(graph.latent, video=",".join(map(str, LONG[0])), sound=LONG[1][-1])
    return graph


@pytest.mark.parametrize("method", ["style", "attribute", "shape+", "kv_edit", "flow_edit"])
def test_h3_agrees_with_the_library(host, joint, model, method):
    """Two windows, of ten latents and of the last seven, that share five."""
    graph, start, more = joint, joint.invert, {}
    graph.set(graph.edit, preset=method)
    if method == "attribute":
        graph.set(graph.words, blend_source="square", blend_target="striped")
        more["blend"] = (["square"], ["striped"])
    if method in ("shape+", "kv_edit"):
        graph.set(graph.edit, mask=graph.add("SolidMask", value=0.5, width=96, height=64)[0])
        more["mask"] = torch.full((1, 4, 6), 0.5)
    if method == "flow_edit":
        start = graph.add(
            "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0],
            steps=test_joint.STEPS, source_guidance=2.0, draws=2, seed=3, sound="edit",
        )  # fmt: skip
        graph.set(graph.edit, store=start[0], preset="style")
        more["drawn"] = FlowEditSettings(source_guidance=2.0, draws=2, seed=3)
    whole = test_joint.by_host(host, graph)
    graph.set(start, window_frames=34, window_overlap=17)
    found = test_joint.by_host(host, graph)
    preset = "style" if method == "flow_edit" else method
    ours = test_joint.by_library(model, preset, shapes=LONG, windows=Windows(10, 5), **more)
    assert relative(found, ours) < 1e-4
    assert relative(found, whole) > 1e-5


def test_h3_in_windows_without_overlap(host, joint):
    """Edits of their parts: latents in groups of 17 frames, and the sound during them."""
    graph = joint
    graph.set(graph.invert, window_frames=17)
    found = test_joint.streams(host, graph, graph.edit[0])
    graph.set(graph.invert, window_frames=0)
    for part, sound in ((slice(0, 5), slice(0, 28)), (slice(5, 10), slice(28, 57)), (slice(10, 12), slice(57, 65))):
        graph.set(graph.latent, part=f"{part.start}:{part.stop}", sound_part=f"{sound.start}:{sound.stop}")
        own = test_joint.streams(host, graph, graph.edit[0])
        assert relative(found[0][:, :, part], own[0]) < 1e-5
        assert relative(found[1][..., sound], own[1]) < 1e-5


def test_what_h3_refuses(host, joint):
    graph = joint
    graph.both(windows(graph))
    with pytest.raises(NodeError, match="Context Windows.*set window_frames"):
        test_joint.by_host(host, graph)
    graph.both(graph.model[0])
    graph.set(graph.invert, window_frames=17, source=test_joint.with_picture(graph, test_joint.SOURCE))
    with pytest.raises(NodeError, match="minimax_keyframes of a prompt needs all frames"):
        test_joint.by_host(host, graph)
