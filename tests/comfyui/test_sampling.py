"""Inversion and edit by the host's *SamplerCustomAdvanced*: equal to our nodes; with its samplers and sigmas."""

import pytest
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from comfyui.test_mixing import edited, noise, shape_graph

from small import relative

pytestmark = pytest.mark.every_host


def custom(graph, guider, latent, flipped=False, sampler=None, sigmas=None):
    """Add the host's sampling with a guider."""
    sigmas = sigmas or graph.add("FateZeroSigmas", model=graph.demo[0], steps=graph.steps)[0]
    if flipped:
        sigmas = graph.add("FlipSigmas", sigmas=sigmas)[0]
    sampler = sampler or graph.add("FateZeroDDIM")[0]
    quiet = graph.add("DisableNoise")[0]
    return graph.add(
        "SamplerCustomAdvanced", noise=quiet, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )


def invert_guider(graph):
    inputs = {k: v for k, v in graph.prompt[graph.invert.id]["inputs"].items() if k not in ("steps", "latent")}
    return graph.add("FateZeroInvertGuider", **inputs)


def invert_with(graph, sigmas=None):
    """(noise, store) by a guider with the settings of the graph's own inversion."""
    latent = graph.prompt[graph.invert.id]["inputs"]["latent"]
    sampled = custom(graph, invert_guider(graph)[0], latent, flipped=True, sigmas=sigmas)
    return sampled[0], graph.add("FateZeroStoreOfInversion", noise=sampled[0])[0]


def edit_with(graph, begin, store, **more):
    """The edited latents by a guider with the settings of the graph's own edit."""
    inputs = {**graph.prompt[graph.edit.id]["inputs"], "store": store}
    guider = graph.add("FateZeroEditGuider", **inputs)
    return custom(graph, guider[0], begin, **more)


def by_host(graph):
    return edit_with(graph, *invert_with(graph))[0]


@pytest.mark.parametrize("memory", ["recompute", pytest.param("queries_keys", marks=pytest.mark.slow)])
def test_the_results_equal_our_nodes(host, memory):
    graph = shape_graph(memory)
    expected = edited(host, graph)
    begin, store = invert_with(graph)
    assert relative(host.latents(graph.prompt, begin), noise(host, graph)) < 1e-6
    assert relative(host.latents(graph.prompt, edit_with(graph, begin, store)[0]), expected) < 1e-5
    graph.set(graph.edit, store=store)
    assert relative(edited(host, graph), expected) < 1e-5, "Edit Video accepts the guider's store"


def test_a_sampler_of_the_host_uses_the_edits_predictions(host):
    graph = DemoGraph()
    expected = edited(host, graph)
    plain = DemoGraph()
    plain.set(plain.edit, preset="none")
    begin, store = invert_with(graph)
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    by_euler = host.latents(graph.prompt, edit_with(graph, begin, store, sampler=euler)[0])
    assert relative(by_euler, expected) < 2e-3, "except for the last noise level, which the host does not remove"
    assert relative(by_euler, edited(host, plain)) > 0.05


def test_noise_levels_of_the_hosts_schedulers(host):
    graph = DemoGraph(steps=8)
    sigmas = graph.add("BasicScheduler", model=graph.demo[0], scheduler="karras", steps=8, denoise=1.0)[0]
    begin, store = invert_with(graph, sigmas)
    graph.set(graph.edit, guidance=1.0, positive=graph.words[0], prompt_edit=graph.add(
        "FateZeroPromptEdit", clip=graph.demo[1], source="a red square on water", target="a red square on water",
        mode="refine", blend_source="", blend_target="", reweight="")[2])  # fmt: skip
    replay = host.latents(graph.prompt, edit_with(graph, begin, store, sigmas=sigmas)[0])
    assert relative(replay, host.latents(graph.prompt, graph.latent[0])) < 0.35
    assert relative(replay, host.latents(graph.prompt, begin)) > 0.5
    graph.set(graph.edit, store=store)
    assert relative(edited(host, graph), replay) < 1e-3, "Edit Video uses the store's levels"


def test_the_mask_of_a_latent_is_applied(host):
    graph = DemoGraph()
    mask = graph.add("SolidMask", value=0.0, width=64, height=64)[0]
    clip = host.latents(graph.prompt, graph.latent[0])
    masked = graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=mask)[0]
    graph.set(graph.invert, latent=masked)
    begin, store = invert_with(graph)
    assert relative(host.latents(graph.prompt, edit_with(graph, begin, store)[0]), clip) < 1e-5
    everything = graph.add("SolidMask", value=1.0, width=64, height=64)[0]
    at_the_edit = graph.add("SetLatentNoiseMask", samples=begin, mask=everything)
    assert relative(host.latents(graph.prompt, edit_with(graph, at_the_edit[0], store)[0]), clip) > 0.05, "the newer"
    free = DemoGraph()
    begin, store = invert_with(free)
    none, whole = (free.add("SolidMask", value=value, width=64, height=64)[0] for value in (0.0, 1.0))
    at_the_edit = free.add("SetLatentNoiseMask", samples=begin, mask=none)
    assert relative(host.latents(free.prompt, edit_with(free, at_the_edit[0], store)[0]), clip) < 1e-5
    at_the_edit = free.add("SetLatentNoiseMask", samples=begin, mask=whole)
    free.set(free.edit, mask=none, preset="shape")
    expected = edited(host, free)
    found = host.latents(free.prompt, edit_with(free, at_the_edit[0], store)[0])
    assert relative(found, expected) < 1e-5, "the socket's mask, as in Edit Video"


def test_progress_and_previews_are_the_hosts(host):
    graph = DemoGraph()
    end = {"class_type": "PreviewAny", "inputs": {"source": by_host(graph)}}
    run = host.run({**graph.prompt, "end": end})
    progress = [data for kind, data in run.messages if kind == "progress" and data["max"] == graph.steps]
    assert [data["value"] for data in progress][-graph.steps :] == list(range(1, graph.steps + 1))
    assert run.previews


def test_another_target_does_not_invert_again(host):
    graph = DemoGraph()
    begin, store = invert_with(graph)
    edit_with(graph, begin, store)
    guided = edit_with(graph, begin, store)
    host.latents(graph.prompt, guided[0])
    graph.set(graph.words, target="a blue square on water")
    end = {"class_type": "PreviewAny", "inputs": {"source": guided[0]}}
    run = host.run({**graph.prompt, "end": end})
    assert guided.id in run.executed() and begin[0] not in run.executed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, b, s: {"begin": g.latent[0]}, "latent_image: is not the noise of this store"),
        (lambda g, b, s: {"sampler": g.add("KSamplerSelect", sampler_name="heun")[0]}, "sampler: evaluates sigma"),
        (lambda g, b, s: {"flipped": True}, "sigmas: "),
        (lambda g, b, s: {"sigmas": g.add("FateZeroSigmas", model=g.demo[0], steps=5)[0]}, "5 steps .* inversion has"),
    ],
)  # fmt: skip
def test_unsupported_edits_are_refused(host, change, message):
    graph = DemoGraph()
    begin, store = invert_with(graph)
    more = change(graph, begin, store)
    with pytest.raises(NodeError, match=message):
        host.latents(graph.prompt, edit_with(graph, more.pop("begin", begin), store, **more)[0])


def test_an_edit_that_blends_latents_needs_our_sampler(host):
    graph = shape_graph()
    begin, store = invert_with(graph)
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    with pytest.raises(NodeError, match="sampler: this edit blends latents"):
        host.latents(graph.prompt, edit_with(graph, begin, store, sampler=euler)[0])


def test_unsupported_inversions_are_refused(host):
    graph = DemoGraph()
    guider = invert_guider(graph)
    with pytest.raises(NodeError, match="sigmas: are decreasing"):
        host.latents(graph.prompt, custom(graph, guider[0], graph.latent[0])[0])
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    with pytest.raises(NodeError, match="sampler: Inversion Guider needs DDIM Sampler"):
        host.latents(graph.prompt, custom(graph, guider[0], graph.latent[0], flipped=True, sampler=euler)[0])
    noisy = custom(graph, guider[0], graph.latent[0], flipped=True)
    graph.set(noisy, noise=graph.add("RandomNoise", noise_seed=1)[0])
    with pytest.raises(NodeError, match="noise: an inversion adds no noise"):
        host.latents(graph.prompt, noisy[0])
    store = graph.add("FateZeroStoreOfInversion", noise=graph.latent[0])
    graph.set(graph.edit, store=store[0])
    with pytest.raises(NodeError, match="noise: is not the direct output"):
        edited(host, graph)


def without_fusion(graph):
    graph.set(graph.invert, key_frames="self")
    graph.set(graph.edit, preset="none")
    return graph


def test_the_hosts_own_guiders_equal_ours_without_key_frames_and_fusion(host):
    """Their result, independent of our hooks, equals our nodes' without key frames or fusion."""
    graph = without_fusion(DemoGraph())
    expected = edited(host, graph)
    source = graph.add("BasicGuider", model=graph.demo[0], conditioning=graph.words[0])
    inverted = custom(graph, source[0], graph.latent[0], flipped=True)[0]
    assert relative(host.latents(graph.prompt, inverted), noise(host, graph)) < 1e-5
    target = graph.add("CFGGuider", model=graph.demo[0], positive=graph.words[1], negative=graph.negative[0], cfg=7.5)
    assert relative(host.latents(graph.prompt, custom(graph, target[0], inverted)[0]), expected) < 1e-4


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddpm"])
def test_without_fusion_an_edit_guider_equals_the_hosts(host, name):
    graph = without_fusion(DemoGraph())
    begin, store = invert_with(graph)
    sampler = graph.add("KSamplerSelect", sampler_name=name)[0]
    theirs = graph.add("CFGGuider", model=graph.demo[0], positive=graph.words[1], negative=graph.negative[0], cfg=7.5)
    expected = host.latents(graph.prompt, custom(graph, theirs[0], begin, sampler=sampler)[0])
    assert relative(host.latents(graph.prompt, edit_with(graph, begin, store, sampler=sampler)[0]), expected) < 1e-4


def test_one_guider_is_used_for_two_samplings(host):
    """Two clips inverted with one guider, and one store edited twice by one guider, without interference."""
    graph = DemoGraph()
    other = graph.add("LatentFlip", samples=graph.latent[0], flip_method="y-axis: horizontally")
    guider = invert_guider(graph)
    noises = [custom(graph, guider[0], latent, flipped=True)[0] for latent in (graph.latent[0], other[0])]
    stores = [graph.add("FateZeroStoreOfInversion", noise=noise)[0] for noise in noises]
    found = [host.latents(graph.prompt, edit_with(graph, *pair)[0]) for pair in zip(noises, stores, strict=True)]
    for latent, edit in zip((graph.latent[0], other[0]), found, strict=True):
        graph.set(graph.invert, latent=latent)
        assert relative(edit, edited(host, graph)) < 1e-5
    assert relative(found[0], found[1]) > 0.1


def test_guiders_support_lora_controlnets_and_chunks(host, lora, controlnet):
    graph = DemoGraph(frames=5)
    model = graph.add("LoraLoaderModelOnly", model=graph.demo[0], lora_name=lora, strength_model=1.0)[0]
    graph.set(graph.invert, source=graph.with_control(controlnet, graph.words[0], graph.negative[0], 1.0)[0])
    pair = graph.with_control(controlnet, graph.words[1], graph.negative[0], 1.0)
    graph.set(graph.edit, model=model, positive=pair[0], negative=pair[1], chunk_frames=2)
    graph.set(graph.invert, chunk_frames=3)
    expected = edited(host, graph)
    assert relative(host.latents(graph.prompt, by_host(graph)), expected) < 1e-5


@pytest.mark.slow
def test_other_nodes_accept_a_guiders_store(host):
    graph = shape_graph()
    begin, store = invert_with(graph)
    save = graph.add("FateZeroSaveStore", store=store, filename_prefix="stores/guided")
    file = host.text(host.run(graph.prompt), save.id)
    del graph.prompt[save.id]
    expected = edited(host, graph)
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    assert relative(edited(host, graph), expected) < 1e-5
