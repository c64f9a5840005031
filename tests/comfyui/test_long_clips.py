"""Windows of long clips on a Wan MODEL: ours and the host's Context Windows give the same latents."""

import pytest
import torch
from comfyui.graph import windows
from comfyui.host import NodeError
from comfyui.test_wan import (
    SOURCE,
    STEPS,
    TARGET,
    Hosts,
    WanGraph,
    by_host,
    checkpoint,
    folder,
    graph,
    inside,
    statistics,
)

from fatezero import PromptEdit, Windows, edit, invert
from fatezero.recipes.recipe import Recipe
from small import relative

__all__ = ["checkpoint", "folder", "graph"]
LATENTS = 5
OURS = {"window_frames": 9, "window_overlap": 4}
"""Of the video: three latents, which share one with the next window."""


def long(graph: WanGraph, latents: int = LATENTS) -> WanGraph:
    graph.set(graph.latent, shape=f"1,16,{latents},4,6")
    return graph


def fused(graph):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset="attribute+")
    return graph.invert


def sampled(graph):
    """FlowEdit, with two samples of noise."""
    start = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=2, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=start[0], preset="flow_edit")
    return start


def masked(graph):
    """KV-Edit, which computes the tokens inside a mask alone."""
    inside(graph)
    return graph.invert


@pytest.mark.every_host
@pytest.mark.parametrize("method", [fused, sampled, masked])
def test_they_equal_the_hosts(host, graph, checkpoint, method):
    start = method(long(graph))
    whole = by_host(host, graph, checkpoint)
    graph.set(start, **OURS)
    ours = by_host(host, graph, checkpoint)
    assert 1e-4 < relative(ours, whole) < 1
    graph.set(start, window_frames=0, window_overlap=0, model=windows(graph))
    graph.set(graph.edit, model=graph.prompt[start.id]["inputs"]["model"])
    assert torch.equal(by_host(host, graph, checkpoint), ours)
    inputs = host.known["ContextWindowsManual"]["input"]
    if not any("causal_window_fix" in named for named in inputs.values()):
        return
    anchored = windows(graph, causal_window_fix=True)
    graph.set(start, model=anchored)
    graph.set(graph.edit, model=anchored)
    assert 1e-5 < relative(by_host(host, graph, checkpoint), ours) < 1, "the host's frame before a window takes part"


def test_both_hosts_agree(host, graph, checkpoint):
    graph.set(fused(long(graph)), **OURS)
    mean, deviation = statistics(checkpoint)
    samples = torch.randn(1, 16, LATENTS, 4, 6, generator=torch.Generator().manual_seed(1))
    latents = ((samples - mean) / deviation)[0].transpose(0, 1)
    denoiser = Hosts(checkpoint.transformer, checkpoint.scheduler)
    source, target, empty = (checkpoint.encode_prompt(text, 48, 32) for text in (SOURCE, TARGET, ""))
    inversion = invert(denoiser, latents, source, STEPS, windows=Windows(3, 1))
    prompt = PromptEdit(SOURCE, TARGET, checkpoint.tokenizer, "refine", (["square"], ["striped"]))
    ours = edit(denoiser, inversion, target, empty, 5.0, prompt, Recipe.of_preset("attribute+").injection)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4


def test_the_default_is_the_length_of_training(host, graph, checkpoint):
    long(graph, 23)
    usual = by_host(host, graph, checkpoint)
    graph.set(graph.invert, window_frames=81)
    assert torch.equal(by_host(host, graph, checkpoint), usual)
    graph.set(graph.invert, window_frames=0, memory="queries_keys")
    whole = by_host(host, graph, checkpoint)
    assert relative(usual, whole) > 1e-4, "stored attention is that of the whole clip"
    graph.set(graph.invert, window_frames=4 * 23, memory="recompute")
    assert relative(by_host(host, graph, checkpoint), whole) < 1e-5


def test_unsuitable_windows_are_refused(host, graph):
    for frames in (0, 9):
        graph.set(graph.invert, window_frames=frames, window_overlap=9)
        with pytest.raises(NodeError, match="window_overlap is 9"):
            host.latents(graph.prompt, graph.edit[0])
