"""The host's nodes on MODEL and CONDITIONING of one side or both: all memories, chunks and the host's own
guider agree, or the node is refused by name."""

import pytest
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from comfyui.test_options import HONOURED, OF_NEGATIVES, OF_PROMPTS, add, by_the_host
from comfyui.test_wan import SLG, WanGraph, hosts_guider
from comfyui.test_wan import lora as wan_lora  # noqa: F401
from wan import write_wan

from small import relative

SIDES = ("inversion", "edit", "both")
CLIP_WIDE = ("APG", "Mahiro", "PerpNeg", "SelfAttentionGuidance", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance")
"""Guidance that is refused in chunks."""
WINDOWS = {"context_length": 2, "context_overlap": 1, "dim": 2, "freenoise": False}
OF_WAN = {
    "LoraLoaderModelOnly": {"lora_name": "wan.safetensors", "strength_model": 1.0},
    "LoraLoaderBypassModelOnly": {"lora_name": "wan.safetensors", "strength_model": 1.0},
    "ScaleROPE": {"scale_x": 0.5, "shift_t": 1.0}, "SkipLayerGuidanceDiT": SLG,
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1", "single_layers": ""}, "CFGZeroStar": {}, "CFGNorm": {},
    "RescaleCFG": {}, "APG": {}, "Mahiro": {}, "TCFG": {}, "Epsilon Scaling": {"scaling_factor": 1.05},
    "CFGOverride": {"cfg": 2.0}, "ModelComputeDtype": {"dtype": "bf16"}, "ModelAttentionBackend": {},
    "ModelSamplingSD3": {"shift": 5.0}, "ContextWindowsManual": WINDOWS, "OtherSparseAttention": {"scale": 0.5},
    "OtherAttention": {"scale": 0.5}, "OtherBlock": {"scale": 0.5},
}  # fmt: skip
"""Nodes on a Wan MODEL, and settings with which they change something."""
KERNELS = ("OtherSparseAttention", "OtherAttention")
"""Kernels that are not softmax attention, which maps are."""
OF_BOTH = {"ModelSamplingSD3": "its shift", "ContextWindowsManual": "context windows"}
"""Nodes that inversion and edit must both have, and their refusals."""
OFTEN = {
    ("LoraLoaderBypassModelOnly", "edit"), ("FreeU_V2", "inversion"), ("PerturbedAttentionGuidance", "edit"),
    ("Mahiro", "edit"), ("UNetSelfAttentionMultiply", "inversion"), ("SkipLayerGuidanceDiT", "edit"),
    ("ScaleROPE", "inversion"), ("ContextWindowsManual", "edit"), ("OtherSparseAttention", "edit"),
    ("prompts joined", "edit"), ("LoRA by a hook", "inversion"), ("GLIGEN", "edit"),
}  # fmt: skip
"""Representative nodes, which run by default."""


def table(kinds, sides=SIDES):
    return [
        pytest.param(kind, side, marks=[] if (kind, side) in OFTEN else pytest.mark.slow)
        for kind in kinds
        for side in sides
    ]


def on(graph, side, socket_of_inversion, socket_of_edit, link):
    if side != "edit":
        graph.set(graph.invert, **{socket_of_inversion: link})
    if side != "inversion":
        graph.set(graph.edit, **{socket_of_edit: link})


def given(host, graph):
    return host.latents(graph.prompt, graph.edit[0])


def check_memories(host, graph, memories):
    computed = given(host, graph)
    for memory in memories:
        graph.set(graph.invert, memory=memory)
        assert relative(given(host, graph), computed) < 1e-4, memory
    graph.set(graph.invert, memory="recompute")
    return computed


def check_maps_refused(host, graph, kind):
    graph.set(graph.invert, memory="maps")
    with pytest.raises(NodeError, match=f"maps.*softmax.* {kind.removeprefix('Other')} .* another kind"):
        given(host, graph)
    graph.set(graph.invert, memory="recompute")


def check_chunks(host, graph, whole, kind):
    graph.set(graph.edit, chunk_frames=2)
    if kind in CLIP_WIDE:
        with pytest.raises(NodeError, match=f"guidance of {kind} .* may depend on all frames"):
            given(host, graph)
    else:
        assert relative(given(host, graph), whole) < 1e-4
    graph.set(graph.edit, chunk_frames=0)


@pytest.mark.parametrize(("kind", "side"), table(k for k in HONOURED if k != "ModelMergeSubtract"))
def test_a_node_on_a_unet(host, kind, side, lora):
    graph = DemoGraph(steps=2)
    negative = graph.add("CLIPTextEncode", clip=graph.demo[1], text="a red square")
    more = {"empty_conditioning": graph.negative[0]} if kind == "PerpNeg" else {}
    model = add(host, graph, kind, model=graph.demo[0], **HONOURED[kind], **more)
    graph.set(graph.edit, negative=negative[0], preset="attribute")
    graph.set(graph.invert, key_frames="self")
    on(graph, side, "model", "model", model[0])
    computed = check_memories(host, graph, ["queries_keys"])
    check_chunks(host, graph, computed, kind if side != "inversion" else None)
    graph.set(graph.edit, preset="none")
    assert relative(given(host, graph), by_the_host(host, graph)) < 1e-4


@pytest.mark.parametrize(("option", "side"), table(OF_PROMPTS))
def test_an_option_of_a_prompt(host, option, side, controlnet, lora):
    graph = DemoGraph(steps=2)
    graph.set(graph.invert, key_frames="self")
    if side != "edit":
        graph.set(graph.invert, source=OF_PROMPTS[option](graph, graph.words[0], controlnet)[0])
    if side != "inversion":
        graph.set(graph.edit, positive=OF_PROMPTS[option](graph, graph.words[1], controlnet)[0])
    computed = check_memories(host, graph, ["queries_keys"])
    check_chunks(host, graph, computed, None)
    graph.set(graph.edit, preset="none")
    assert relative(given(host, graph), by_the_host(host, graph)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("option", OF_NEGATIVES)
def test_an_option_of_the_negative(host, option):
    graph = DemoGraph(steps=2)
    graph.set(graph.edit, negative=OF_NEGATIVES[option](graph, graph.words[0])[0])
    check_chunks(host, graph, check_memories(host, graph, ["queries_keys", "maps"]), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize(("kind", "side"), table(OF_WAN))
def test_a_node_on_wan(host, folder, kind, side, wan_lora):  # noqa: F811
    graph = WanGraph(folder=str(folder))
    graph.set(graph.invert, steps=2)
    graph.set(graph.edit, preset="attribute")
    on(graph, side, "model", "model", add(host, graph, kind, model=graph.model[0], **OF_WAN[kind])[0])
    if kind in OF_BOTH and side != "both":
        with pytest.raises(NodeError, match=OF_BOTH[kind]):
            given(host, graph)
        return
    others = ["queries_keys", "maps"]
    if kind == "ContextWindowsManual":
        others = ["auto"]
    elif kind in (*KERNELS, "ModelComputeDtype"):  # the last one rounds the product of softmax and values
        others = ["queries_keys"]
    check_memories(host, graph, others)
    if kind in KERNELS:
        check_maps_refused(host, graph, kind)
    graph.set(graph.edit, preset="none")
    theirs = hosts_guider(graph)
    assert relative(given(host, graph), host.latents(graph.prompt, theirs[0])) < 1e-4


@pytest.mark.parametrize(("kind", "side"), [("OtherAttention", "edit"), ("OtherSparseAttention", "inversion")])
def test_maps_of_a_unet_are_refused_with_another_kernel(host, kind, side):
    graph = DemoGraph(steps=2)
    graph.set(graph.edit, preset="attribute")
    on(graph, side, "model", "model", graph.add(kind, model=graph.demo[0], scale=0.5)[0])
    check_maps_refused(host, graph, kind)
    on(graph, side, "model", "model", graph.add(kind, model=graph.demo[0], scale=1.0)[0])
    assert relative(given(host, graph), check_memories(host, graph, ["maps"])) < 1e-4


OVER_FRAMES = ("RescaleCFG", "CFGZeroStar", "TCFG", "Mahiro")
"""Guidance that mixes the frames of a video transformer."""


@pytest.mark.parametrize("kind", [*OVER_FRAMES, "CFGNorm", "SkipLayerGuidanceDiT"])
def test_guidance_in_context_windows_of_wan(host, folder, kind):
    """The host's own windows guide the whole clip; ours are guided separately."""
    graph = WanGraph(folder=str(folder))
    graph.set(graph.invert, steps=2)
    graph.set(graph.edit, preset="none")
    windows = add(host, graph, "ContextWindowsManual", model=graph.model[0], **WINDOWS)
    on(graph, "both", "model", "model", add(host, graph, kind, model=windows[0], **OF_WAN[kind])[0])
    if kind in OVER_FRAMES:
        with pytest.raises(NodeError, match=f"guidance of {kind} .* may depend on all frames"):
            given(host, graph)
    else:
        assert relative(given(host, graph), host.latents(graph.prompt, hosts_guider(graph)[0])) < 1e-4


def test_guidance_that_is_rescaled_over_all_frames_is_refused_in_chunks(host):
    graph = DemoGraph(steps=2)
    slg = add(host, graph, "SkipLayerGuidanceDiT", model=graph.demo[0], **{**SLG, "rescaling_scale": 0.5})
    graph.set(graph.edit, model=slg[0], chunk_frames=2)
    with pytest.raises(NodeError, match="guidance of SkipLayerGuidanceDiT .* may depend on all frames"):
        given(host, graph)


@pytest.mark.parametrize("family", ["unet", "wan"])
def test_an_edit_of_a_compiled_model_runs_uncompiled(host, folder, family):
    graph = DemoGraph(steps=2) if family == "unet" else WanGraph(folder=str(folder))
    graph.set(graph.invert, steps=2, memory="recompute")
    graph.set(graph.edit, preset="attribute")
    plain = given(host, graph)
    model = graph.demo[0] if family == "unet" else graph.model[0]
    compiled = add(host, graph, "TorchCompileModel", model=model, backend="inductor")
    for side in SIDES:
        on(graph, "both", "model", "model", model)
        on(graph, side, "model", "model", compiled[0])
        assert relative(given(host, graph), plain) < 1e-5
