"""The host's caches: results are right whatever is evicted or changed between runs."""

import random

import pytest
import torch
from comfyui.conftest import HOSTS
from comfyui.graph import DemoGraph
from comfyui.host import started
from comfyui.test_mixing import edited
from comfyui.test_sampling import edit_with, invert_with

CHOICES = {
    "target": ["a green square on water", "a blue circle on water", "a red square on grass"],
    "steps": [2, 3],
    "memory": ["recompute", "queries_keys"],
    "key_frames": ["self, middle", "first"],
    "preset": ["style+", "attribute", "attribute+"],
    "guidance": [5.0, 7.5],
    "by": ["nodes", "sampler"],
}
"""Settings changed between runs; `by`: our nodes, or the host's SamplerCustomAdvanced."""


def result(host, settings) -> torch.Tensor:
    graph = DemoGraph(steps=settings["steps"])
    graph.set(graph.words, target=settings["target"])
    graph.set(graph.invert, memory=settings["memory"], key_frames=settings["key_frames"])
    graph.set(graph.edit, preset=settings["preset"], guidance=settings["guidance"])
    if settings["by"] == "nodes":
        return edited(host, graph)
    begin, store = invert_with(graph)
    return host.latents(graph.prompt, edit_with(graph, begin, store)[0])


def walk(host, length, seed):
    """Results by settings, for random changes of one setting at a time; equal settings must give equal results."""
    chosen, settings, found = random.Random(seed), {name: values[0] for name, values in CHOICES.items()}, {}
    for _ in range(length):
        name = chosen.choice([*CHOICES])
        settings = {**settings, name: chosen.choice([value for value in CHOICES[name] if value != settings[name]])}
        key = tuple(settings.items())
        now = result(host, settings)
        assert torch.allclose(found.setdefault(key, now), now, atol=1e-4), settings
    return found


@pytest.mark.parametrize("options", ["--cache-ram 1000", "", "--cache-classic", "--cache-lru 3"])
@pytest.mark.slow  # test_nodes, test_sampling and test_workflows also change one thing and run again
def test_cached_results_equal_fresh_ones(host, tmp_path, options):
    """--cache-ram 1000: the host has to free more memory than there is, so it evicts all it can."""
    with started(HOSTS[0], tmp_path / "walked", options=options) as walked:
        found = walk(walked, 7, seed=len(options))
    assert len(found) > 3
    for settings, latents in found.items():
        host.forget()
        assert torch.allclose(result(host, dict(settings)), latents, atol=1e-4), settings
