"""Nodes that wrap the sampling: their state is prepared, and the frames of each call are recognised."""

import pytest
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from comfyui.test_mixing import edited, noise
from comfyui.test_sampling import custom, without_fusion

from small import relative

pytestmark = pytest.mark.every_host
FRAMES, LENGTH = 5, 3


def windowed(graph, length=LENGTH, motion=True, model=None):
    """A MODEL with calls of a number of frames, which it mixes."""
    model = model or graph.demo[0]
    if motion:
        model = graph.add("OtherMotion", model=model)[0]
    return graph.add("OtherWindows", model=model, length=length)[0]


def fused(memory="recompute", **inversion):
    """An edit with cross fusion, masked self fusion and latent blending."""
    graph = DemoGraph(frames=FRAMES)
    graph.set(graph.words, target="a red circle on water", mode="replace")
    graph.set(graph.invert, memory=memory, **inversion)
    graph.fuse(blend_self_attention=True, blend_latents=True)
    return graph


@pytest.mark.parametrize("sides", ["both", "inversion", "edit"])
def test_without_fusion_it_equals_the_hosts_sampling(host, sides):
    graph = without_fusion(DemoGraph(frames=FRAMES))
    model = windowed(graph)
    first, then = {"both": (0, 0), "inversion": (0, 1), "edit": (1, 0)}[sides]
    models = (model, graph.demo[0])
    graph.set(graph.invert, model=models[first])
    graph.set(graph.edit, model=models[then])
    expected = edited(host, graph)
    source = graph.add("BasicGuider", model=models[first], conditioning=graph.words[0])
    inverted = custom(graph, source[0], graph.latent[0], flipped=True)[0]
    assert relative(noise(host, graph), host.latents(graph.prompt, inverted)) < 1e-5
    target = graph.add("CFGGuider", model=models[then], positive=graph.words[1], negative=graph.negative[0], cfg=7.5)
    assert relative(host.latents(graph.prompt, custom(graph, target[0], inverted)[0]), expected) < 1e-4
    plain = without_fusion(DemoGraph(frames=FRAMES))
    assert relative(edited(host, plain), expected) > 1e-2
    if sides == "both":
        plain.both(windowed(plain, FRAMES))
        assert relative(edited(host, plain), expected) > 1e-3, "frames are mixed only within their windows"


@pytest.mark.parametrize("preset", ["custom", "shape+", "pnp"])
def test_windows_change_nothing_for_independent_frames(host, preset):
    def run(length):
        graph = fused(key_frames="self")
        if preset != "custom":
            graph.set(graph.edit, preset=preset)
            del graph.prompt[graph.edit.id]["inputs"]["settings"]
        if length:  # with two MODELs that share weights
            like = graph.add("OtherAttn2", model=graph.demo[0], scale=1.0)[0]
            graph.set(graph.invert, model=windowed(graph, length, motion=False))
            graph.set(graph.edit, model=windowed(graph, length, motion=False, model=like))
        return edited(host, graph)

    assert relative(run(LENGTH), run(None)) < 1e-5


def test_memories_agree_or_are_refused(host):
    def run(memory, length, key_frames="self, middle"):
        graph = fused(memory, key_frames=key_frames)
        graph.both(windowed(graph, length))
        return edited(host, graph)

    whole, split = run("recompute", FRAMES), run("recompute", LENGTH)
    assert relative(run("queries_keys", FRAMES), whole) < 1e-5
    assert relative(split, whole) > 1e-3
    assert relative(run("auto", LENGTH), split) == 0
    assert relative(run("recompute", LENGTH, "self"), split) > 1e-3, "key frames are those of the call"
    with pytest.raises(NodeError, match="memory: .*context windows"):
        run("queries_keys", LENGTH)


def test_the_model_is_restored(host):
    graph = fused()
    hanging = graph.add("OtherHooks", model=graph.demo[0])
    before = host.text(host.run(graph.prompt), hanging.id)
    graph.both(windowed(graph))
    edited(host, graph)
    assert host.text(host.run(graph.prompt), hanging.id) == before


def test_a_node_on_one_side_does_not_change_the_other(host, lora):
    """The edit's weights and layers are swapped for the source's, with every memory."""

    def run(memory, motion_on):
        graph = fused(memory)
        model = graph.add("LoraLoaderModelOnly", model=graph.demo[0], lora_name=lora, strength_model=1.0)[0]
        sides = {
            "edit": (graph.demo[0], windowed(graph, FRAMES, model=model)),
            "inversion": (windowed(graph, FRAMES), model),
        }
        graph.set(graph.invert, model=sides[motion_on][0])
        graph.set(graph.edit, model=sides[motion_on][1])
        return edited(host, graph)

    for side in ("edit", "inversion"):
        assert relative(run("queries_keys", side), run("recompute", side)) < 1e-5


def test_other_windows_than_the_sources_are_refused(host):
    graph = fused()
    graph.set(graph.invert, model=windowed(graph))
    with pytest.raises(NodeError, match="model: the source's context windows differ"):
        edited(host, graph)
    graph.set(graph.edit, model=graph.prompt[graph.invert.id]["inputs"]["model"])
    alike = edited(host, graph)
    graph.set(graph.edit, model=windowed(graph))
    assert relative(edited(host, graph), alike) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.set(g.invert, model=windowed(g), chunk_frames=2), "model: a motion module of AnimateDiff needs"),
        (lambda g: g.set(g.invert, model=windowed(g, motion=False), chunk_frames=2), "model: a node's wrapper other"),
        (lambda g: g.set(g.edit, model=windowed(g), preset="none", propagation=g.add(
            "FateZeroTokenFlow", batch_frames=2, weights="authors", seed=0)[0]), "a motion module of AnimateDiff"),
        (lambda g: g.both(g.add("OtherTwice", model=g.demo[0])[0]), "model: a node on it samples more than once"),
    ],
)  # fmt: skip
def test_unsupported_windows_are_refused(host, change, message):
    graph = DemoGraph(frames=FRAMES)
    change(graph)
    with pytest.raises(NodeError, match=message):
        edited(host, graph)


def test_a_saved_store_does_not_depend_on_injected_layers(host):
    graph = fused()
    model = windowed(graph, FRAMES)
    graph.both(model)
    expected = edited(host, graph)
    save = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="stores/motion")
    file = host.text(host.run(graph.prompt), save.id)
    del graph.prompt[save.id]
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    assert relative(edited(host, graph), expected) < 1e-5
    graph.set(graph.edit, model=graph.demo[0])
    assert relative(edited(host, graph), expected) > 1e-3
