"""Options that other nodes set on a CONDITIONING, LATENT or MODEL: applied, or refused by name."""

import re

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from comfyui.test_sampling import custom, without_fusion

from small import relative

every_host = pytest.mark.every_host


def edited(host, graph):
    return host.latents(graph.prompt, graph.edit[0])


def left_half(graph):
    """A MASK of the left half of 64x64 pixels."""
    black, white = (graph.add("SolidMask", value=v, width=w, height=64)[0] for v, w in ((0.0, 64), (1.0, 32)))
    return graph.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")[0]


def in_steps(graph, prompt):
    return graph.add("ConditioningSetTimestepRange", conditioning=prompt, start=0.0, end=0.5)


def in_area(graph, prompt):
    return graph.add("ConditioningSetArea", conditioning=prompt, width=64, height=64, x=0, y=0, strength=1.0)


def in_mask(graph, prompt):
    return graph.add(
        "ConditioningSetMask", conditioning=prompt, mask=left_half(graph), strength=1.0, set_cond_area="default"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [(in_steps, "is restricted to 0% to 50% of the steps"), (in_area, r"\(area\)"), (in_mask, r"\(mask\)")],
)
@pytest.mark.parametrize("socket", ["source", "positive"])
def test_a_prompt_for_only_a_part_is_refused(host, option, message, socket):
    graph = DemoGraph()
    node, prompt = (graph.invert, graph.words[0]) if socket == "source" else (graph.edit, graph.words[1])
    graph.set(node, **{socket: option(graph, prompt)[0]})
    with pytest.raises(NodeError, match=f"{socket}: .*{message}"):
        edited(host, graph)


def test_a_range_of_all_steps_is_accepted(host):
    graph = DemoGraph()
    expected = edited(host, graph)
    whole = graph.add("ConditioningSetTimestepRange", conditioning=graph.words[1], start=0.0, end=1.0)
    graph.set(graph.edit, positive=whole[0])
    assert relative(edited(host, graph), expected) < 1e-5


@every_host
@pytest.mark.parametrize("preset", ["style", "shape"])
def test_a_noise_mask_limits_where_the_clip_may_change(host, preset):
    graph = DemoGraph()
    graph.set(graph.edit, preset=preset)
    clip, free = host.latents(graph.prompt, graph.latent[0]), edited(host, graph)
    masked = graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=left_half(graph))
    graph.set(graph.invert, latent=masked[0])
    result = edited(host, graph)
    assert relative(result[..., 4:], clip[..., 4:]) < 1e-5, "the right half is preserved"
    assert relative(result[..., :4], clip[..., :4]) > 0.1
    assert relative(free[..., 4:], clip[..., 4:]) > 0.05, "without it the right half changes too"

    save = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix=f"stores/masked_{preset}")
    file = host.text(host.run(graph.prompt), save.id)
    del graph.prompt[save.id]
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    assert relative(edited(host, graph), result) < 1e-5, "a file keeps it"

    graph.set(graph.edit, mask=graph.add("SolidMask", value=0.0, width=64, height=64)[0], preset="shape")
    assert not torch.allclose(edited(host, graph), result), "a mask on the socket overrides it"


@every_host
def test_another_kind_of_sampling_is_refused(host):
    graph = DemoGraph()
    graph.both(graph.add("ModelSamplingDiscrete", model=graph.demo[0], sampling="x0", zsnr=False)[0])
    with pytest.raises(NodeError, match=r"model: DDIM cannot invert the schedule ModelSamplingDiscrete \(X0\)"):
        edited(host, graph)


@every_host
def test_a_model_with_another_prediction_type_than_the_inversion_is_refused(host):
    graph = DemoGraph()
    changed = graph.add("ModelSamplingDiscrete", model=graph.demo[0], sampling="v_prediction", zsnr=False)
    graph.set(graph.edit, model=changed[0])
    with pytest.raises(NodeError, match=r"made by another model.*predicts=epsilon.*predicts=v"):
        edited(host, graph)


# --- the table: each line compared with the host's own sampling --------------------------------------


def defaults(host, kind):
    """The page's default values of a node."""
    found = {}
    for name, option in host.known[kind]["input"].get("required", {}).items():
        more = option[1] if len(option) > 1 else {}
        choices = option[0] if isinstance(option[0], list) else more.get("options")
        if "default" in more or choices:
            found[name] = more.get("default", choices[0] if choices else None)
    return found


def add(host, graph, kind, **inputs):
    if kind not in host.known:
        pytest.skip(f"this host has no {kind}")
    return graph.add(kind, **{**defaults(host, kind), **inputs})


def by_the_host(host, graph):
    """The result of the host's own guider and plain DDIM steps from the inverted noise."""
    inputs = graph.prompt[graph.edit.id]["inputs"]
    theirs = graph.add("CFGGuider", **{name: inputs[name] for name in ("model", "positive", "negative")}, cfg=7.5)
    return host.latents(graph.prompt, custom(graph, theirs[0], graph.invert[0])[0])


def as_the_host(host, graph):
    """(our edit without fusion, the host's own)."""
    return edited(host, graph), by_the_host(host, graph)


OF_PROMPTS = {
    "ControlNet of some steps": lambda g, p, file: g.add("ControlNetApplyAdvanced", positive=p, negative=p,
        control_net=g.add("ControlNetLoader", control_net_name=file)[0], image=g.video[0], strength=1.0,
        start_percent=0.2, end_percent=0.8),
    "GLIGEN": lambda g, p, file: g.add("OtherGligen", model=g.demo[0], positive=p),
    "LoRA by a hook": lambda g, p, file: g.add("ConditioningSetProperties", cond_NEW=p, strength=1.0,
        set_cond_area="default", hooks=g.add("CreateHookLoraModelOnly", lora_name="random.safetensors",
        strength_model=1.0)[0]),
    "LoRA by a hook that changes by step": lambda g, p, file: g.add("ConditioningSetProperties", cond_NEW=p,
        strength=1.0, set_cond_area="default", hooks=g.add("SetHookKeyframes", hooks=g.add("CreateHookLoraModelOnly",
        lora_name="random.safetensors", strength_model=1.0)[0], hook_kf=g.add("CreateHookKeyframe", strength_mult=0.3,
        start_percent=0.5)[0])[0]),
    "strength": lambda g, p, file: g.add("ConditioningSetAreaStrength", conditioning=p, strength=0.5),
    "guidance of Flux": lambda g, p, file: g.add("FluxGuidance", conditioning=p, guidance=3.5),
    "zeros": lambda g, p, file: g.add("ConditioningZeroOut", conditioning=p),
    "prompts averaged": lambda g, p, file: g.add("ConditioningAverage", conditioning_to=p,
        conditioning_from=g.add("CLIPTextEncode", clip=g.demo[1], text="a blue circle")[0],
        conditioning_to_strength=0.5),
    "prompts joined": lambda g, p, file: g.add("ConditioningConcat", conditioning_to=p,
        conditioning_from=g.add("CLIPTextEncode", clip=g.demo[1], text="a blue circle")[0]),
}  # fmt: skip
"""Nodes that set options of a prompt which are applied."""

OF_NEGATIVES = {
    "range of steps": in_steps,
    "area": lambda g, p: g.add(
        "ConditioningSetAreaPercentage", conditioning=p, width=0.5, height=1.0, x=0.0, y=0.0, strength=1.0
    ),
    "mask": in_mask,
    "combined, of two lengths": lambda g, p: g.add(
        "ConditioningCombine",
        conditioning_1=p,
        conditioning_2=g.add("ConditioningConcat", conditioning_to=g.words[0], conditioning_from=p)[0],
    ),
    "default for what is left": lambda g, p: g.add(
        "ConditioningSetDefaultCombine",
        cond=in_mask(g, p)[0],
        cond_DEFAULT=g.add("CLIPTextEncode", clip=g.demo[1], text="a green circle")[0],
    ),
}
"""Further options of a negative, whose attention is not controlled."""

WITHOUT_EFFECT = ("strength", "guidance of Flux")
IMPLIED = {("negative", option) for option in OF_PROMPTS if option not in ("LoRA by a hook", "prompts averaged")}
"""A negative is converted like a positive, and no control uses it."""


@pytest.mark.parametrize(
    ("socket", "option"),
    [
        pytest.param(socket, option, marks=pytest.mark.slow if (socket, option) in IMPLIED else [])
        for socket in ("positive", "source", "negative")
        for option in OF_PROMPTS
    ],
)
def test_an_option_of_a_prompt_is_applied(host, socket, option, controlnet, lora):
    graph = without_fusion(DemoGraph())
    if socket == "source":
        of_host = graph.add("BasicGuider", model=graph.demo[0], conditioning=graph.words[0])
        plain = host.latents(graph.prompt, graph.invert[0])
        optioned = OF_PROMPTS[option](graph, graph.words[0], controlnet)[0]
        graph.set(of_host, conditioning=optioned)
        graph.set(graph.invert, source=optioned)
        ours = host.latents(graph.prompt, graph.invert[0])
        theirs = host.latents(graph.prompt, custom(graph, of_host[0], graph.latent[0], flipped=True)[0])
    else:
        negative = graph.add("CLIPTextEncode", clip=graph.demo[1], text="a red square")
        graph.set(graph.edit, negative=negative[0])
        plain = edited(host, graph)
        prompt = graph.words[1] if socket == "positive" else negative[0]
        graph.set(graph.edit, **{socket: OF_PROMPTS[option](graph, prompt, controlnet)[0]})
        ours, theirs = as_the_host(host, graph)
    assert relative(ours, theirs) < 1e-4
    assert (relative(ours, plain) < 1e-5) == (option in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("option", "other"), [("prompts averaged", True), ("prompts joined", True), ("zeros", True), ("strength", False)]
)
def test_the_report_mentions_a_text_other_than_the_pairs(host, option, other):
    graph = DemoGraph(steps=1)
    graph.set(graph.edit, positive=OF_PROMPTS[option](graph, graph.words[1], None)[0])
    end = {"class_type": "PreviewAny", "inputs": {"source": graph.edit[1]}}
    run = host.run({**graph.prompt, "end": end})
    assert ("Prompt Edit's target" in host.text(run, "end")) == other


@pytest.mark.parametrize("option", OF_NEGATIVES)
def test_a_negative_may_be_for_only_a_part(host, option):
    graph = without_fusion(DemoGraph())
    negative = graph.add("CLIPTextEncode", clip=graph.demo[1], text="a red square")
    graph.set(graph.edit, negative=negative[0])
    plain = edited(host, graph)
    graph.set(graph.edit, negative=OF_NEGATIVES[option](graph, negative[0])[0])
    ours, theirs = as_the_host(host, graph)
    assert relative(ours, theirs) < 1e-4
    assert relative(ours, plain) > 1e-3


def test_an_area_of_the_negative_does_not_change_the_injection(host):
    """The host evaluates the positive there once more, with attention not aligned with the source's."""
    graph = DemoGraph()
    plain = edited(host, graph)
    graph.set(graph.edit, negative=OF_NEGATIVES["area"](graph, graph.words[0])[0])
    computed = edited(host, graph)
    assert relative(computed, plain) > 1e-3
    graph.set(graph.invert, memory="queries_keys")
    assert relative(edited(host, graph), computed) < 1e-5


@pytest.mark.parametrize("socket", ["source", "positive"])
@pytest.mark.parametrize(
    "name",
    [
        "area", "mask", "concat_latent_image", "concat_mask", "reference_latents", "unclip_conditioning",
        "context_latents", "time_dim_concat",
    ],
)  # fmt: skip
def test_an_option_unsupported_for_clips_is_refused_by_name(host, name, socket):
    graph = DemoGraph()
    node, prompt = (graph.invert, graph.words[0]) if socket == "source" else (graph.edit, graph.words[1])
    graph.set(node, **{socket: graph.add("OtherOption", positive=prompt, name=name)[0]})
    with pytest.raises(NodeError, match=rf"{socket}: .*\({name}\)"):
        edited(host, graph)


def test_combined_prompts_are_refused(host):
    graph = DemoGraph()
    graph.set(graph.edit, positive=graph.add(
        "ConditioningSetDefaultCombine", cond=graph.words[1], cond_DEFAULT=graph.words[0])[0])  # fmt: skip
    with pytest.raises(NodeError, match="positive: combines 2 prompts"):
        edited(host, graph)


HONOURED = {
    "APG": {}, "CFGNorm": {"strength": 0.5}, "CFGOverride": {"cfg": 2.0, "end_percent": 0.5}, "CFGZeroStar": {},
    "Epsilon Scaling": {"scaling_factor": 1.05}, "FreSca": {"freq_cutoff": 2}, "FreeU": {}, "FreeU_V2": {},
    "Mahiro": {}, "NAGuidance": {}, "PerpNeg": {}, "PerturbedAttentionGuidance": {}, "RescaleCFG": {},
    "SelfAttentionGuidance": {}, "TCFG": {}, "UNetCrossAttentionMultiply": {"q": 1.3},
    "UNetSelfAttentionMultiply": {"k": 1.3}, "VideoLinearCFGGuidance": {}, "VideoTriangleCFGGuidance": {},
    "ModelMergeSubtract": {"multiplier": 0.1}, "LoraLoaderModelOnly": {"lora_name": "random.safetensors"},
    "LoraLoaderBypassModelOnly": {"lora_name": "random.safetensors"},
}  # fmt: skip
"""Nodes on the MODEL that change its prediction, and settings with an effect."""

NO_EFFECT = ["DifferentialDiffusion", "ModelAttentionBackend", "SkipLayerGuidanceSD3", "ScaleROPE", "wanBlockSwap"]
"""Nodes without effect here and with the host's samplers."""


HOOKED_ALIKE = {
    "CFGNorm", "CFGZeroStar", "Epsilon Scaling", "FreSca", "FreeU", "Mahiro", "RescaleCFG", "TCFG",
    "UNetSelfAttentionMultiply", "VideoTriangleCFGGuidance", *NO_EFFECT[1:],
}  # fmt: skip
"""Nodes that use a hook for which another node runs by default."""


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in HOOKED_ALIKE else []) for k in [*HONOURED, *NO_EFFECT]]
)
def test_a_node_on_the_model_is_applied(host, kind, lora):
    graph = without_fusion(DemoGraph())
    negative = graph.add("CLIPTextEncode", clip=graph.demo[1], text="a red square")
    graph.set(graph.edit, negative=negative[0])
    plain = edited(host, graph)
    inputs = {"model": graph.demo[0], **HONOURED.get(kind, {})}
    if kind == "PerpNeg":
        inputs["empty_conditioning"] = graph.negative[0]
    if kind.startswith("ModelMerge"):
        inputs |= {"model1": inputs["model"], "model2": inputs.pop("model")}
    graph.set(graph.edit, model=add(host, graph, kind, **inputs)[0])
    ours, theirs = as_the_host(host, graph)
    assert relative(ours, theirs) < 1e-4
    assert (relative(ours, plain) < 1e-5) == (kind in NO_EFFECT)


NOT_A_SCHEDULE = "DDIM cannot invert the schedule"
WITH_TOKENS = "merges or rescales tokens"
REFUSED = [
    ("TomePatchModel", {}, WITH_TOKENS),
    ("HyperTile", {"tile_size": 32}, WITH_TOKENS),
    ("PatchModelAddDownscale", {"end_percent": 1.0}, WITH_TOKENS),
    ("EasyCache", {"reuse_threshold": 3.0}, "skips calls"),
    ("LazyCache", {"reuse_threshold": 3.0}, "skips calls"),
    ("ModelSamplingContinuousEDM", {"sampling": "eps"}, NOT_A_SCHEDULE),
    ("ModelSamplingContinuousV", {}, NOT_A_SCHEDULE),
    ("ModelSamplingStableCascade", {}, NOT_A_SCHEDULE),
    ("ModelSamplingSD3", {}, NOT_A_SCHEDULE),
    ("ModelSamplingDiscrete", {"sampling": "img_to_img"}, NOT_A_SCHEDULE),
    ("ModelSamplingDiscrete", {"zsnr": True}, "made on another schedule"),
    ("OtherGPUs", {}, "model: uses 2 GPUs"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED, ids=[f"{k} {v}" for k, v, _ in REFUSED])
def test_an_unsupported_node_on_the_model_is_refused(host, kind, settings, message):
    graph = DemoGraph(steps=10)
    graph.set(graph.edit, model=add(host, graph, kind, model=graph.demo[0], **settings)[0])
    with pytest.raises(NodeError, match=message):
        edited(host, graph)


def test_a_node_that_changes_guidance_needs_guidance(host):
    graph = DemoGraph()
    graph.set(graph.edit, model=add(host, graph, "CFGOverride", model=graph.demo[0], cfg=2.0)[0], guidance=1.0)
    with pytest.raises(NodeError, match=r"guidance: at 1, and after guidance_until, no negative prompt is evaluated"):
        edited(host, graph)
    graph.set(graph.edit, guidance=7.5, guidance_until=0.5)
    with pytest.raises(NodeError, match=r"guidance: at 1, and after guidance_until"):
        edited(host, graph)


def test_masks_of_both_prompts_have_no_guidance_of_other_nodes(host):
    """CFG Override at the edit's own guidance changes nothing."""
    graph = DemoGraph()
    graph.set(graph.edit, preset="attribute+", guidance=3.0)
    expected = edited(host, graph)
    graph.set(graph.edit, model=add(host, graph, "CFGOverride", model=graph.demo[0], cfg=3.0)[0])
    assert relative(edited(host, graph), expected) < 1e-5


def test_a_noise_mask_that_changes_by_step_is_refused(host):
    graph = DemoGraph()
    graph.set(graph.invert, latent=graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=left_half(graph))[0])
    graph.set(graph.edit, model=graph.add("DifferentialDiffusion", model=graph.demo[0])[0])
    with pytest.raises(NodeError, match=r"model: changes the latent's noise mask step by step"):
        edited(host, graph)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("freenoise", True), ("cond_retain_index_list", "0"), ("latent_retain_index_list", "0"),
        ("split_conds_to_windows", True),
    ],
)  # fmt: skip
def test_unsupported_context_windows_are_refused(host, name, value):
    graph = DemoGraph()
    if name not in host.known["ContextWindowsManual"]["input"]["required"]:
        pytest.skip(f"this host's context windows have no {name}")
    graph.both(add(host, graph, "ContextWindowsManual", model=graph.demo[0], **{name: value})[0])
    with pytest.raises(NodeError, match=re.escape(f"context windows with {name}")):
        edited(host, graph)


@pytest.mark.parametrize("kind", ["Mahiro", "VideoLinearCFGGuidance", "RescaleCFG"])
def test_guidance_over_all_frames_is_refused_in_chunks(host, kind):
    graph = without_fusion(DemoGraph(steps=2))
    graph.set(graph.edit, model=add(host, graph, kind, model=graph.demo[0])[0])
    whole = edited(host, graph)
    graph.set(graph.edit, chunk_frames=2)
    if kind == "RescaleCFG":
        assert relative(edited(host, graph), whole) < 1e-5, "for each frame separately"
        return
    with pytest.raises(NodeError, match=f"guidance of {kind} .* may depend on all frames"):
        edited(host, graph)


FUSED = ("flat", "pyramid", "relative", "overlap-linear")
WINDOWS = ("standard_static", "standard_uniform", "batched")
OFTEN = {("pyramid", "standard_uniform"), ("relative", "batched")}


@pytest.mark.parametrize(
    ("fuse_method", "schedule"),
    [pytest.param(f, s, marks=[] if (f, s) in OFTEN else pytest.mark.slow) for f in FUSED for s in WINDOWS],
)
def test_context_windows_are_fused_as_by_the_host(host, fuse_method, schedule):
    """With key frames previous, a frame's prediction differs at a window's edge, so fusion weights matter."""
    if fuse_method not in str(host.known["ContextWindowsManual"]["input"]["required"]["fuse_method"]):
        pytest.skip(f"this host has no {fuse_method}")
    graph = without_fusion(DemoGraph(frames=6))
    graph.set(graph.invert, key_frames="self, previous")
    whole = edited(host, graph)
    windowed = add(
        host, graph, "ContextWindowsManual", model=graph.demo[0], context_length=4, context_overlap=2,
        context_schedule=schedule, fuse_method=fuse_method,
    )  # fmt: skip
    graph.set(graph.edit, model=windowed[0])
    ours = edited(host, graph)
    seeing = graph.add(
        "FateZeroSpatioTemporalAttention", model=windowed[0], key_frames="self, previous", clip_norm=False
    )
    graph.set(graph.edit, model=seeing[0])
    assert relative(ours, by_the_host(host, graph)) < 1e-4
    assert relative(ours, whole) > 1e-3


def test_a_latent_of_other_media_is_refused(host):
    graph = DemoGraph()
    audio = graph.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    graph.set(graph.invert, latent=audio[0])
    with pytest.raises(NodeError, match="latent: has shape"):
        edited(host, graph)


def test_a_latent_of_another_autoencoder_is_refused(host):
    graph = DemoGraph()
    graph.set(graph.invert, latent=graph.add("OtherLatent", seed=1, shape="3,16,4,4")[0])
    with pytest.raises(NodeError, match="latent: has 16 channels, but BaseModel has latents of 4"):
        edited(host, graph)


def test_the_batch_index_of_a_latent_is_ignored(host):
    graph = DemoGraph()
    expected = edited(host, graph)
    numbered = graph.add("LatentFromBatch", samples=graph.latent[0], batch_index=0, length=graph.frames)
    graph.set(graph.invert, latent=numbered[0])
    assert relative(edited(host, graph), expected) < 1e-5
