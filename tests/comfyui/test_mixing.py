"""Our nodes combined with others: LoRA, ControlNet, patches, precisions, other models."""

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError

from small import relative


def edited(host, graph) -> torch.Tensor:
    return host.latents(graph.prompt, graph.edit[0])


def noise(host, graph) -> torch.Tensor:
    return host.latents(graph.prompt, graph.invert[0])


def shape_graph(memory="recompute") -> DemoGraph:
    """An edit with all parts of FateZero: cross fusion, masked self fusion, latent blending."""
    graph = DemoGraph()
    graph.set(graph.words, target="a red circle on water", mode="replace")
    graph.set(graph.invert, memory=memory)
    graph.fuse(blend_self_attention=True, blend_latents=True)
    return graph


def lora_on(graph, lora, strength, on_inversion, on_edit, loader="LoraLoaderModelOnly"):
    model = graph.add(loader, model=graph.demo[0], lora_name=lora, strength_model=strength)[0]
    graph.set(graph.invert, model=model if on_inversion else graph.demo[0])
    graph.set(graph.edit, model=model if on_edit else graph.demo[0])


def bypass_lora_on(graph, lora, strength, on_inversion, on_edit):
    lora_on(graph, lora, strength, on_inversion, on_edit, "LoraLoaderBypassModelOnly")


def controlnet_on(graph, controlnet, strength, on_inversion, on_edit):
    if on_inversion:
        graph.set(graph.invert, source=graph.with_control(controlnet, graph.words[0], graph.negative[0], strength)[0])
    if on_edit:
        pair = graph.with_control(controlnet, graph.words[1], graph.negative[0], strength)
        graph.set(graph.edit, positive=pair[0], negative=pair[1])


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("mixed_in", "file"), [(lora_on, "lora"), (bypass_lora_on, "lora"), (controlnet_on, "controlnet")]
)
def test_nodes_on_the_inversion_the_edit_or_both(host, request, mixed_in, file):
    if mixed_in is bypass_lora_on and "LoraLoaderBypassModelOnly" not in host.known:
        pytest.skip("this host has no bypass LoRA")
    file = request.getfixturevalue(file)

    def run(strength, memory, on_inversion, on_edit):
        graph = shape_graph(memory)
        mixed_in(graph, file, strength, on_inversion, on_edit)
        return edited(host, graph), noise(host, graph)

    plain, plain_noise = run(0.0, "recompute", False, False)
    results = [plain]
    for place in ((True, False), (False, True), (True, True)):
        assert torch.equal(run(0.0, "recompute", *place)[0], plain)
        recomputed, inverted = run(1.0, "recompute", *place)
        assert (relative(inverted, plain_noise) > 1e-3) == place[0]
        assert all(relative(recomputed, other) > 1e-2 for other in results)
        # The source branch keeps the inversion's model, recomputed or recorded.
        assert relative(run(1.0, "queries_keys", *place)[0], recomputed) < 1e-5
        results.append(recomputed)
    assert torch.equal(run(0.0, "recompute", False, False)[0], plain)


def test_lora_loader_with_text_encoder(host, lora):
    graph = DemoGraph()
    both = graph.add(
        "LoraLoader", model=graph.demo[0], clip=graph.demo[1], lora_name=lora, strength_model=1.0, strength_clip=1.0
    )
    graph.both(both[0])
    graph.set(graph.words, clip=both[1])
    assert relative(edited(host, graph), edited(host, DemoGraph())) > 1e-2


def patched(host, kind, graph=None, **settings) -> torch.Tensor:
    """The edit with a node that patches the MODEL of inversion and edit."""
    graph = graph or shape_graph()
    graph.both(graph.add(kind, model=graph.demo[0], **settings)[0])
    return edited(host, graph)


def test_another_packs_attention_replacement_still_runs(host):
    plain = edited(host, shape_graph())
    assert relative(patched(host, "OtherAttn2", scale=1.0), plain) < 1e-5
    assert relative(patched(host, "OtherAttn2", scale=-1.0), plain) > 1e-2


def test_patches_entries_keep_working(host):
    plain = edited(host, shape_graph())
    assert relative(patched(host, "OtherAttn2Output", scale=1.0), plain) < 1e-5
    assert relative(patched(host, "OtherAttn2Output", scale=0.5), plain) > 1e-2
    freeu = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    assert relative(patched(host, "FreeU_V2", **freeu), plain) > 1e-2


def test_guidance_nodes_keep_working(host):
    plain = edited(host, shape_graph())
    assert relative(patched(host, "PerturbedAttentionGuidance", scale=0.0), plain) < 1e-6
    assert relative(patched(host, "PerturbedAttentionGuidance", scale=3.0), plain) > 1e-2
    assert relative(patched(host, "RescaleCFG", multiplier=0.7), plain) > 1e-3


def test_a_guidance_node_that_evaluates_the_negative_gets_the_negative(host):
    """The node's call lists the negative first; the host's calls list the positive first."""
    assert relative(patched(host, "OtherNegativeAgain"), edited(host, shape_graph())) < 1e-4


def test_an_override_on_the_edit_only_does_not_change_the_source(host):
    def run(memory, scale):
        graph = shape_graph(memory)
        graph.set(graph.invert, key_frames="self")
        graph.set(graph.edit, model=graph.add("OtherSparseAttention", model=graph.demo[0], scale=scale)[0])
        return edited(host, graph)

    computed, plain = run("recompute", 0.5), run("recompute", 1.0)
    assert relative(run("queries_keys", 0.5), computed) < 1e-5
    assert relative(computed, plain) > 1e-3


def test_a_skipped_layer_is_an_error_that_names_the_node(host):
    with pytest.raises(NodeError, match=r"1 of \d+ attention layers .mid.0.self.* SkipBlock"):
        patched(host, "OtherSkip")


def test_guidance_in_one_call_or_two(host):
    assert relative(patched(host, "OtherSeparateCalls"), edited(host, shape_graph())) < 1e-5


def test_weights_loaded_layer_by_layer(host, lora):
    """Offloaded weights, with a LoRA applied as they are loaded."""
    graph = shape_graph()
    lora_on(graph, lora, 1.0, True, True)
    whole = edited(host, graph)
    offloaded = graph.add("OtherLowVram", model=graph.prompt[graph.edit.id]["inputs"]["model"])
    graph.both(offloaded[0])
    assert relative(edited(host, graph), whole) < 1e-4


@pytest.mark.parametrize(("dtype", "within"), [("fp16", 1e-6), ("bf16", 0.2)])
def test_half_precision_weights_are_close_to_single(host, dtype, within):
    """The checkpoint's weights are fp16 already; bf16 rounds them."""
    graph = shape_graph()
    graph.both(graph.add("OtherDemoModel", dtype=dtype)[0])
    half, single = edited(host, graph), edited(host, shape_graph())
    assert (half - single).pow(2).mean().sqrt() / single.std() < within
    assert torch.equal(half, single) == (dtype == "fp16")


@pytest.mark.parametrize("kind", [pytest.param("sd2", marks=pytest.mark.slow), "sd2_v", "sdxl"])
def test_other_unets(host, kind):
    """SD 2.x with epsilon and v, and SDXL with pooled text: memories agree, and a replay returns the clip."""
    edits = {}
    for memory in ("recompute", "queries_keys", "maps"):
        graph = shape_graph(memory)
        graph.both(graph.add("OtherRandomModel", kind=kind)[0])
        source, target, negative = (
            graph.add("OtherConditioning", seed=seed, pooled=kind == "sdxl") for seed in (1, 2, 3)
        )
        graph.set(graph.invert, source=source[0])
        graph.set(graph.edit, positive=target[0], negative=negative[0])
        edits[memory] = edited(host, graph)
    assert torch.isfinite(edits["recompute"]).all()
    for memory in ("queries_keys", "maps"):
        assert relative(edits[memory], edits["recompute"]) < 1e-4
    clip = host.latents(graph.prompt, graph.latent[0])
    assert relative(edits["maps"], clip) > 1e-2


def test_latents_of_another_model_are_refused_for_a_transformer(host):
    """`test_flows.py` has what works on it."""
    graph = DemoGraph()
    graph.both(graph.add("OtherRandomModel", kind="flux")[0])
    with pytest.raises(NodeError, match="latent: has 4 channels, but Flux has latents of 16"):
        edited(host, graph)


def test_a_node_that_skips_unet_calls_is_refused(host):
    cache = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    with pytest.raises(NodeError, match="model: no attention layer ran in a call"):
        patched(host, "EasyCache", DemoGraph(steps=20), reuse_threshold=3.0, **cache)
    assert relative(patched(host, "EasyCache", reuse_threshold=0.0, **cache), edited(host, shape_graph())) < 1e-6


@pytest.mark.parametrize("node", ["TomePatchModel", "PatchModelAddDownscale"])
def test_a_node_that_changes_the_tokens_is_refused(host, node):
    settings = {
        "TomePatchModel": {"ratio": 0.3},
        "PatchModelAddDownscale": {
            "block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0,
            "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
        },
    }  # fmt: skip
    with pytest.raises(NodeError, match="another node on the model merges or rescales tokens"):
        patched(host, node, **settings[node])


def test_a_store_of_another_model_is_refused(host):
    graph = DemoGraph()
    graph.set(graph.edit, model=graph.add("OtherRandomModel", kind="sd2")[0])
    with pytest.raises(NodeError, match="made by another model|schedule"):
        edited(host, graph)


def test_key_frames_for_any_sampler(host):
    graph = DemoGraph()
    latent = graph.add("EmptyLatentImage", width=128, height=128, batch_size=3)

    def sampled(model):
        sampler = graph.add(
            "KSampler", model=model, positive=graph.words[1], negative=graph.negative[0], latent_image=latent[0],
            seed=1, steps=3, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        return host.latents(graph.prompt, sampler[0])

    def shared(**settings):
        node = graph.add("FateZeroSpatioTemporalAttention", model=graph.demo[0], **settings)
        return sampled(node[0])

    plain = sampled(graph.demo[0])
    assert relative(shared(key_frames="self", clip_norm=False), plain) < 1e-5
    middle = shared(key_frames="middle", clip_norm=False)
    assert relative(middle, plain) > 1e-2
    assert relative(shared(key_frames="middle", clip_norm=True), middle) > 1e-3
