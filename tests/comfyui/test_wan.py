"""A Wan MODEL: both hosts agree, and other nodes in the host's chain take effect."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from comfyui.graph import Graph, Node
from comfyui.host import NodeError
from safetensors.torch import save_file
from wan import write_wan

from fatezero import FlowEditSettings, FlowSmoothing, PromptEdit, draw, edit, invert
from fatezero.attention.masks import GivenMask
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.hosts.diffusers.wan import WanCheckpoint
from fatezero.methods.kv_edit import KVEditSettings
from fatezero.recipes.recipe import Recipe
from fatezero.video.motion import Motion
from small import relative

SOURCE, TARGET = "a red square on water", "a green striped square on water"
STEPS, FRAMES, SHIFT = 4, 3, 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def checkpoint(folder) -> WanCheckpoint:
    return WanCheckpoint.load(str(folder))


class Hosts(VideoTransformerDenoiser):
    """The library's edit, with ComfyUI's "simple" sigmas for a shift."""

    shift = SHIFT

    def schedule(self, steps: int) -> FlowSchedule:
        u = torch.arange(1, 1001) / 1000
        table = self.shift * u / (1 + (self.shift - 1) * u)
        sigmas = torch.stack([*(table[-(1 + int(i * 1000 / steps))] for i in range(steps)), torch.zeros(())])
        return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


@dataclass
class WanGraph(Graph):
    """Random latents, inverted and edited by the transformer of a folder."""

    folder: str = ""
    size: tuple[int, int] = (4, 6)
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.add("OtherWan", folder=self.folder, shift=SHIFT)
        self.latent = self.add("OtherLatent", seed=1, shape=f"1,16,{FRAMES},{self.size[0]},{self.size[1]}")
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.model[1], source=SOURCE, target=TARGET, mode="refine",
            blend_source="", blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.model[1], text="")
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.words[0], latent=self.latent[0], steps=STEPS,
            key_frames="self, middle", clip_norm=False, memory="recompute", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=5.0, preset="style",
        )  # fmt: skip

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)


@pytest.fixture
def graph(folder) -> WanGraph:
    return WanGraph(folder=str(folder))


def statistics(checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    config = checkpoint.vae.config
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, deviation


def library_latents(checkpoint, size=(4, 6)) -> torch.Tensor:
    """The graph's latents, loaded for the library."""
    mean, deviation = statistics(checkpoint)
    samples = torch.randn(1, 16, FRAMES, *size, generator=torch.Generator().manual_seed(1))
    return ((samples - mean) / deviation)[0].transpose(0, 1)


def by_host(host, graph, checkpoint) -> torch.Tensor:
    mean, deviation = statistics(checkpoint)
    return ((host.latents(graph.prompt, graph.edit[0]) - mean) / deviation)[0].transpose(0, 1)


def by_library(checkpoint, fusion, drawn=None, memory="recompute", order=1, denoiser=None, **more) -> torch.Tensor:
    denoiser = denoiser or Hosts(checkpoint.transformer, checkpoint.scheduler)
    source, target, empty = (checkpoint.encode_prompt(text, 48, 32) for text in (SOURCE, TARGET, ""))
    latents = library_latents(checkpoint)
    if drawn is None:
        inversion = invert(denoiser, latents, source, STEPS, memory=memory, order=order)
    else:
        inversion = draw(denoiser, latents, source, STEPS, drawn)
    prompt = PromptEdit(SOURCE, TARGET, checkpoint.tokenizer, "refine", (["square"], ["striped"]))
    return edit(denoiser, inversion, target, empty, 5.0, prompt if fusion else None, fusion, **more)


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("preset", "memory", "order"),
    [("style", "recompute", 1), ("shape", "queries_keys", 1), ("attribute+", "recompute", 2), ("none", "recompute", 2)],
)
def test_both_hosts_agree(host, graph, checkpoint, preset, memory, order):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.invert, memory=memory, order=order)
    graph.set(graph.edit, preset=preset)
    fusion = None if preset == "none" else Recipe.of_preset(preset).injection
    ours = by_library(checkpoint, fusion, memory=memory, order=order)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4
    assert relative(ours, library_latents(checkpoint)) > 1e-2


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("preset", "more"),
    [("none", {}), ("style", {}), ("none", {"n_min": 2}), ("style", {"n_min": 1, "variant": "wan_edit"})],
)
def test_flow_edit_agrees(host, graph, checkpoint, preset, more):
    settings = FlowEditSettings(2.0, draws=2, seed=3, **more)
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=2, seed=3, **more,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset, strength=0.75)
    fusion = None if preset == "none" else Recipe.of_preset(preset).injection
    ours = by_library(checkpoint, fusion, settings, strength=0.75)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4


@pytest.mark.every_host
def test_a_pair_of_models_shares_the_steps(host, graph, checkpoint, tmp_path, lora):
    """Wan 2.2's pair: each model on its side of the boundary, as in diffusers, also for the source."""
    other = write_wan(tmp_path / "low", seed=1)
    low = graph.add("OtherWan", folder=str(other), shift=SHIFT)
    both = graph.add("FateZeroWanPair", model=graph.model[0], low_noise=low[0], boundary=0.8)
    graph.both(both[0])
    denoiser = Hosts(checkpoint.transformer, checkpoint.scheduler, WanCheckpoint.load(str(other)).transformer, 0.8)
    ours = by_library(checkpoint, Recipe.of_preset("style").injection, denoiser=denoiser)
    assert relative(by_host(host, graph, checkpoint), ours) < 1e-4
    assert relative(ours, by_library(checkpoint, Recipe.of_preset("style").injection)) > 1e-2
    loaded = {"lora_name": "wan.safetensors", "strength_model": 1.0}
    with_lora = [graph.add("LoraLoaderModelOnly", model=one[0], **loaded)[0] for one in (graph.model, low)]
    before = graph.add("FateZeroWanPair", model=with_lora[0], low_noise=with_lora[1], boundary=0.8)
    after = graph.add("LoraLoaderModelOnly", model=both[0], **loaded)
    expected = []
    for model in (before, after):
        graph.both(graph.add("RescaleCFG", model=model[0], multiplier=0.7)[0])
        expected.append(by_host(host, graph, checkpoint))
    assert relative(expected[1], expected[0]) < 1e-5, "nodes after the pair apply to both"
    if "LoraLoaderBypassModelOnly" in host.known:
        graph.both(graph.add("LoraLoaderBypassModelOnly", model=both[0], **loaded)[0])
        with pytest.raises(NodeError, match=r"LoRA Loader .Bypass. after Wan 2.2 Pair"):
            by_host(host, graph, checkpoint)
    graph.set(graph.edit, model=both[0])
    graph.set(graph.invert, model=graph.model[0])
    with pytest.raises(NodeError, match="made by another model|schedule"):
        by_host(host, graph, checkpoint)


# --- the tokens inside a mask -----------------------------------------------------------------


def box() -> torch.Tensor:
    """Two of the six columns of latents, and the whole height."""
    mask = torch.zeros(1, 32, 48)
    mask[..., :16] = 1
    return mask


def inside(graph, memory="recompute", **settings) -> None:
    """Edit with KV-Edit in the left third of the clip."""
    solid = graph.add("SolidMask", value=0.0, width=48, height=32)
    left = graph.add("SolidMask", value=1.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=solid[0], source=left[0], x=0, y=0, operation="add")
    given = {"background_steps": 1.0, "tokens": "inside", "grow": 0, **settings}
    graph.set(graph.invert, memory=memory)
    graph.set(graph.edit, mask=mask[0], preset="custom", settings=graph.add("FateZeroKVEdit", **given)[0])


def kv_edit_by_library(checkpoint, memory="recompute", denoiser=None, **settings) -> torch.Tensor:
    fusion = KVEditSettings(**{"grow": 0, **settings})
    return by_library(checkpoint, fusion, memory=memory, denoiser=denoiser, mask=GivenMask(box()))


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("memory", "settings"),
    [("recompute", {}), ("keys_values", {"background_steps": 0.5}), ("recompute", {"tokens": "all"})],
)
def test_tokens_inside_a_mask_agree(host, graph, checkpoint, memory, settings):
    inside(graph, memory, **settings)
    ours, clip = kv_edit_by_library(checkpoint, memory, **settings), library_latents(checkpoint)
    graph.add("SaveLatent", samples=graph.edit[0], filename_prefix="fatezero/inside")
    text = host.text(host.run(graph.prompt), graph.edit.id)
    found = by_host(host, graph, checkpoint)
    assert relative(found, ours) < 1e-4
    assert relative(found[..., 2:], clip[..., 2:]) < 1e-6
    assert relative(found[..., :2], clip[..., :2]) > 1e-2
    expected = {"recompute": "2.66667 model evaluations of 3 frames, 4 more", "keys_values": "5.33333"}[memory]
    assert (expected if "tokens" not in settings else "8 model evaluations of 3 frames, 4 more") in text


def test_a_pair_of_models_reads_the_source_of_its_step(host, graph, checkpoint, tmp_path):
    other = write_wan(tmp_path / "low", seed=1)
    low = graph.add("OtherWan", folder=str(other), shift=SHIFT)
    graph.both(graph.add("FateZeroWanPair", model=graph.model[0], low_noise=low[0], boundary=0.8)[0])
    denoiser = Hosts(checkpoint.transformer, checkpoint.scheduler, WanCheckpoint.load(str(other)).transformer, 0.8)
    inside(graph)
    assert relative(by_host(host, graph, checkpoint), kv_edit_by_library(checkpoint, denoiser=denoiser)) < 1e-4


def test_tokens_inside_with_other_calls(host, graph, checkpoint, lora):
    """Branches in separate calls, a LoRA on the edit only, a longer negative prompt, and skipped layers."""
    inside(graph)
    plain = by_host(host, graph, checkpoint)
    graph.both(graph.add("OtherSeparateCalls", model=graph.model[0])[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5
    edited = {
        "lora": graph.add("LoraLoaderModelOnly", model=graph.model[0], lora_name=lora, strength_model=1.0),
        "attention": graph.add("OtherAttention", model=graph.model[0], scale=1.0),
        "skipped": graph.add("SkipLayerGuidanceDiT", model=graph.model[0], **SLG),
        "rescaled": graph.add("RescaleCFG", model=graph.model[0], multiplier=0.7),
    }
    for name, model in edited.items():
        graph.set(graph.invert, model=graph.model[0], memory="recompute")
        graph.set(graph.edit, model=model[0])
        computed = by_host(host, graph, checkpoint)
        graph.set(graph.invert, memory="keys_values")
        assert relative(by_host(host, graph, checkpoint), computed) < 1e-5, name
        assert (relative(computed, plain) < 1e-5) == (name == "attention"), name
    graph.both(graph.model[0])
    joined = graph.add("ConditioningConcat", conditioning_to=graph.negative[0], conditioning_from=graph.words[0])
    graph.set(graph.edit, negative=joined[0])
    kept = by_host(host, graph, checkpoint)
    graph.set(graph.invert, memory="recompute")
    assert relative(by_host(host, graph, checkpoint), kept) < 1e-5


@pytest.mark.parametrize("kind", ["OtherBlock"])
def test_nodes_that_may_need_all_tokens_are_named(host, graph, checkpoint, kind):
    graph.both(graph.add(kind, model=graph.model[0], scale=1.0)[0])
    inside(graph, tokens="all")
    expected = by_host(host, graph, checkpoint)
    assert relative(expected, kv_edit_by_library(checkpoint, tokens="all")) < 1e-4
    inside(graph)
    with pytest.raises(NodeError, match=r"Block .*other_pack.* may need all tokens.* set tokens to all"):
        by_host(host, graph, checkpoint)


# --- with other nodes in the chain ----------------------------------------------------------


@pytest.fixture(scope="module")
def plain(host, folder, checkpoint) -> torch.Tensor:
    return by_host(host, WanGraph(folder=str(folder)), checkpoint)


def test_separate_calls_give_the_same(host, graph, checkpoint, plain):
    """On a full GPU the host runs branches separately; the source stays paired with the edit, to save memory."""
    graph.both(graph.add("OtherSeparateCalls", model=graph.model[0])[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5


def test_a_source_with_other_nodes_on_its_model_runs_as_inverted(host, graph, checkpoint, plain):
    """Another node on the edit's MODEL only does not change the source branch."""
    graph.set(graph.edit, model=graph.add("OtherBlock", model=graph.model[0], scale=1.0)[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5


def test_wrappers_of_predictions_also_get_the_sources(host, graph, checkpoint):
    """Also if the source could run paired with the edit, without a prediction of its own."""
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=2, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset="style")
    found = []
    for around_calls in (False, True):  # which separates the branches anyway
        model = graph.add("OtherPredictions", model=graph.model[0], around_calls=around_calls)
        graph.set(store, model=model[0])
        graph.set(graph.edit, model=model[0])
        found.append(by_host(host, graph, checkpoint))
    assert relative(found[0], found[1]) < 1e-5


@pytest.mark.parametrize("kind", ["OtherAttention", "OtherBlock"])
def test_other_packs_attention_and_blocks_are_kept(host, graph, checkpoint, plain, kind):
    other = graph.add(kind, model=graph.model[0], scale=1.0)
    graph.both(other[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5
    graph.set(other, scale=0.5)
    assert relative(by_host(host, graph, checkpoint), plain) > 1e-3


def test_the_hosts_compiler_is_off_in_our_calls_only(host, graph, checkpoint, plain):
    other = graph.add("OtherCompiler", model=graph.model[0], scale=0.5)
    graph.both(other[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5
    sampled = graph.add(
        "KSampler", model=graph.model[0], positive=graph.words[1], negative=graph.negative[0], seed=1, steps=1, cfg=1.0,
        sampler_name="euler", scheduler="simple", denoise=1.0, latent_image=graph.edit[0],
    )  # fmt: skip
    alone = host.latents(graph.prompt, sampled[0])
    graph.set(sampled, model=other[0])
    assert relative(host.latents(graph.prompt, sampled[0]), alone) > 1e-3


@pytest.mark.parametrize("preset", ["attribute", "shape+"])
def test_an_override_that_is_set_in_each_step_is_used_as_kernel(host, graph, checkpoint, preset):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset=preset)
    plain = by_host(host, graph, checkpoint)
    other = graph.add("OtherSparseAttention", model=graph.model[0], scale=1.0)
    graph.both(other[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5
    graph.set(other, scale=0.5)
    assert relative(by_host(host, graph, checkpoint), plain) > 1e-3


def test_a_skipped_layer_is_an_error_that_names_the_node(host, graph, checkpoint):
    graph.both(graph.add("OtherSkip", model=graph.model[0])[0])
    with pytest.raises(NodeError, match=r"2 of 8 attention layers .block.1.self.* SkipBlock"):
        by_host(host, graph, checkpoint)


def test_texts_of_different_lengths_run_in_separate_calls(host, graph, checkpoint):
    joined = graph.add("ConditioningConcat", conditioning_to=graph.words[1], conditioning_from=graph.words[0])
    graph.set(graph.edit, positive=joined[0])
    computed = by_host(host, graph, checkpoint)
    graph.set(graph.invert, memory="queries_keys")
    assert relative(by_host(host, graph, checkpoint), computed) < 1e-5


def test_offloaded_weights(host, graph, checkpoint, plain):
    graph.both(graph.add("OtherLowVram", model=graph.model[0])[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 0.1), ("fp8_e4m3fn", 0.3), ("scaled_fp8", 0.3)])
def test_other_precisions_are_close(host, graph, checkpoint, plain, dtype, near):
    if dtype not in str(host.known["OtherWan"]):
        pytest.skip("this host has no quantized layers")
    graph.set(graph.model, dtype=dtype)
    assert 1e-4 < relative(by_host(host, graph, checkpoint), plain) < near


def test_the_models_shift_is_used(host, graph, checkpoint, plain):
    graph.set(graph.model, shift=8.0)
    shifted = graph.add("ModelSamplingSD3", model=graph.model[0], shift=SHIFT)
    graph.both(shifted[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5
    graph.set(graph.edit, model=graph.model[0])
    with pytest.raises(NodeError, match="its shift 8 .* had 3"):
        by_host(host, graph, checkpoint)


@pytest.fixture
def lora(host, folder) -> str:
    """A random LoRA of all attention layers."""
    random, tensors = torch.Generator().manual_seed(0), {}
    for i in range(4):
        for layer in (f"blocks.{i}.{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"):
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = 0.3 * torch.randn(24, 2, generator=random)
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = 0.3 * torch.randn(2, 24, generator=random)
    save_file(tensors, host.base / "models/loras/wan.safetensors")
    return "wan.safetensors"


def test_a_lora_on_the_edit_only_does_not_change_the_source(host, graph, checkpoint, plain, lora):
    """The source then runs with its own weights, in separate calls."""
    loaded = graph.add("LoraLoaderModelOnly", model=graph.model[0], lora_name=lora, strength_model=1.0)
    graph.both(loaded[0])
    both = by_host(host, graph, checkpoint)
    graph.set(graph.invert, model=graph.model[0])
    single = by_host(host, graph, checkpoint)
    assert min(relative(both, plain), relative(single, plain), relative(single, both)) > 1e-3
    graph.set(loaded, strength_model=0.0)
    assert torch.equal(by_host(host, graph, checkpoint), plain)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoraLoaderBypassModelOnly", {"lora_name": "wan.safetensors", "strength_model": 1.0}),
        ("ScaleROPE", {"scale_x": 0.5, "scale_y": 0.5, "shift_t": 1.0}),
    ],
)
def test_a_node_on_the_edit_only_does_not_change_the_source(host, graph, checkpoint, plain, lora, kind, settings):
    """The recomputed source equals the stored one."""
    graph.set(graph.edit, model=graph.add(kind, model=graph.model[0], **settings)[0])
    computed = by_host(host, graph, checkpoint)
    graph.set(graph.invert, memory="queries_keys")
    assert relative(by_host(host, graph, checkpoint), computed) < 1e-5
    assert relative(computed, plain) > 1e-3


def test_windows_over_frames(host, graph, checkpoint, plain):
    windows = graph.add(
        "ContextWindowsManual", model=graph.model[0], context_length=FRAMES, context_overlap=1,
        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2,
        freenoise=False,
    )  # fmt: skip
    graph.both(windows[0])
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-5, "one window covers all frames"
    graph.set(windows, context_length=2)
    computed = by_host(host, graph, checkpoint)
    assert 1e-4 < relative(computed, plain) < 1
    graph.set(graph.invert, memory="auto")
    assert torch.equal(by_host(host, graph, checkpoint), computed), "nothing stored of one window"
    graph.set(graph.invert, memory="queries_keys")
    with pytest.raises(NodeError, match="one attention per frame"):
        by_host(host, graph, checkpoint)
    graph.set(graph.invert, model=graph.model[0], memory="recompute")
    with pytest.raises(NodeError, match="different context windows"):
        by_host(host, graph, checkpoint)
    graph.both(windows[0])
    graph.set(windows, dim=0)
    with pytest.raises(NodeError, match="along dim 0, but frames are along dim 2"):
        by_host(host, graph, checkpoint)


def hosts_guider(graph) -> Node:
    """The result of the host's own guider and Euler steps from the inverted noise."""
    inputs = graph.prompt[graph.edit.id]["inputs"]
    guider = graph.add("CFGGuider", cfg=inputs["guidance"], **{k: inputs[k] for k in ("model", "positive", "negative")})
    noise = graph.add("OtherLatentNoise", model=graph.model[0], latent=graph.invert[0])
    steps = graph.prompt[graph.invert.id]["inputs"]["steps"]
    sigmas = graph.add("FateZeroSigmas", model=inputs["model"], steps=steps)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    return graph.add(
        "SamplerCustomAdvanced", noise=noise[0], guider=guider[0], sampler=euler[0], sigmas=sigmas[0],
        latent_image=noise[1],
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_windows_equal_the_hosts(host, graph, schedule):
    """With key frames previous, and in the order of windows that wrap around the clip's end."""
    graph.set(graph.latent, shape="1,16,5,4,6")
    windows = graph.add(
        "ContextWindowsManual", model=graph.model[0], context_length=3, context_overlap=1, context_schedule=schedule,
        context_stride=1, closed_loop=True, fuse_method="pyramid", dim=2, causal_window_fix=True,
    )  # fmt: skip
    graph.set(graph.edit, model=windows[0], preset="none")
    ours = host.latents(graph.prompt, graph.edit[0])
    assert relative(ours, host.latents(graph.prompt, hosts_guider(graph)[0])) < 1e-4


SLG = {
    "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0, "end_percent": 1.0,
    "rescaling_scale": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), [("SkipLayerGuidanceDiT", SLG), ("CFGZeroStar", {})])
def test_other_guidance(host, graph, checkpoint, plain, kind, settings):
    graph.set(graph.edit, model=graph.add(kind, model=graph.model[0], **settings)[0])
    computed = by_host(host, graph, checkpoint)
    assert relative(computed, plain) > 1e-4
    graph.set(graph.invert, memory="queries_keys")
    assert relative(by_host(host, graph, checkpoint), computed) < 1e-5


def test_a_mask_of_the_latent_preserves_the_rest(host, graph, checkpoint):
    solid = graph.add("SolidMask", value=0.0, width=48, height=32)
    box = graph.add("SolidMask", value=1.0, width=24, height=32)
    mask = graph.add("MaskComposite", destination=solid[0], source=box[0], x=0, y=0, operation="add")
    masked = graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=mask[0])
    graph.set(graph.invert, latent=masked[0])
    done, clip = by_host(host, graph, checkpoint), library_latents(checkpoint)
    assert relative(done[..., 3:], clip[..., 3:]) < 1e-5
    assert relative(done[..., :3], clip[..., :3]) > 1e-2


@pytest.mark.parametrize("sampler", ["FateZeroDDIM", "euler"])
def test_the_guiders_do_the_same(host, graph, checkpoint, plain, sampler):
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    guider = graph.add(
        "FateZeroInvertGuider", model=graph.model[0], source=graph.words[0], key_frames="self, middle",
        clip_norm=False, memory="recompute", budget_gb=2.0,
    )  # fmt: skip
    ours, quiet = graph.add("FateZeroDDIM"), graph.add("DisableNoise")
    flipped = graph.add("FlipSigmas", sigmas=sigmas[0])
    noise = graph.add(
        "SamplerCustomAdvanced", noise=quiet[0], guider=guider[0], sampler=ours[0], sigmas=flipped[0],
        latent_image=graph.latent[0],
    )  # fmt: skip
    store = graph.add("FateZeroStoreOfInversion", noise=noise[0])
    edited = graph.add(
        "FateZeroEditGuider", model=graph.model[0], positive=graph.words[1], negative=graph.negative[0],
        store=store[0], prompt_edit=graph.words[2], guidance=5.0, preset="style",
    )  # fmt: skip
    chosen = ours if sampler == "FateZeroDDIM" else graph.add("KSamplerSelect", sampler_name=sampler)
    graph.edit = graph.add(
        "SamplerCustomAdvanced", noise=quiet[0], guider=edited[0], sampler=chosen[0], sigmas=sigmas[0],
        latent_image=noise[0],
    )  # fmt: skip
    assert relative(by_host(host, graph, checkpoint), plain) < 1e-6


def test_the_model_is_restored(host, graph):
    before = graph.add("OtherHooks", model=graph.model[0])
    again = host.run({name: node for name, node in graph.prompt.items() if name in (graph.model.id, before.id)})
    host.latents(graph.prompt, graph.edit[0])
    after = host.run({name: node for name, node in graph.prompt.items() if name in (graph.model.id, before.id)})
    assert again.outputs[before.id]["text"] == after.outputs[before.id]["text"]


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"preset": "pnp"}, "Plug-and-Play needs a UNet"),
        ({"propagation": "FateZeroTokenFlow"}, "TokenFlow needs a UNet"),
    ],
)
def test_parts_that_need_a_unet(host, graph, part, error):
    for name, value in part.items():
        given = value
        if name == "propagation":
            given = graph.add(value, batch_frames=2, weights="authors", seed=0)[0]
        graph.set(graph.edit, **{name: given})
    with pytest.raises(NodeError, match=error):
        host.latents(graph.prompt, graph.edit[0])


# --- from frames to frames --------------------------------------------------------------------


def by_host_of_demo(samples: torch.Tensor) -> torch.Tensor:
    """Latents of the demo's video transformer by the library."""
    return 0.18215 * samples[0].transpose(0, 1)


class DemoHosts(Hosts):
    shift = 2.0


def demo_edit(samples: torch.Tensor) -> torch.Tensor:
    """The library's edit of latents encoded by the host, with the same weights."""
    checkpoint = WanCheckpoint.load("demo-wan")
    denoiser = DemoHosts(checkpoint.transformer, checkpoint.scheduler)
    source, target, empty = (checkpoint.encode_prompt(text, 32, 32) for text in (SOURCE, TARGET, ""))
    inversion = invert(denoiser, by_host_of_demo(samples), source, 4, order=2)
    prompt = PromptEdit(SOURCE, TARGET, checkpoint.tokenizer, "refine", (["square"], ["striped"]))
    return edit(denoiser, inversion, target, empty, 5.0, prompt, Recipe.of_preset("shape+").injection)


@pytest.mark.every_host
def test_both_hosts_agree_on_the_demo_from_video_to_video(host):
    """Encode, invert, check, preview, edit, decode, save and load, with our nodes and the host's."""
    graph = Graph()
    model = graph.add("FateZeroDemoVideoModel")
    video = graph.add(
        "FateZeroLoadVideo", file="", start=0, stride=1, count=3, width=32, height=32,
        crop_left=0, crop_top=0, crop_right=0, crop_bottom=0, video=model[3],
    )  # fmt: skip
    latent = graph.add("FateZeroEncodeVideo", images=video[0], vae=model[2], chunk_size=8)
    words = graph.add(
        "FateZeroPromptEdit", clip=model[1], source=SOURCE, target=TARGET, mode="refine", blend_source="square",
        blend_target="striped", reweight="",
    )  # fmt: skip
    negative = graph.add("CLIPTextEncode", clip=model[1], text="")
    inverted = graph.add(
        "FateZeroInvert", model=model[0], source=words[0], latent=latent[0], steps=4, key_frames="self, middle",
        clip_norm=False, memory="recompute", budget_gb=2.0, order=2,
    )  # fmt: skip
    kept = graph.add("FateZeroSaveStore", store=inverted[1], filename_prefix="fatezero/wan")
    checked = graph.add("FateZeroReconstructionCheck", model=model[0], store=inverted[1], vae=model[2], images=video[0])
    looked = graph.add(
        "FateZeroMaskPreview", store=inverted[1], prompt_edit=words[2], words="square", from_share=0.2, to_share=0.8,
        threshold=0.3, width=32, height=32,
    )  # fmt: skip
    edited = graph.add(
        "FateZeroSampler", model=model[0], positive=words[1], negative=negative[0], store=inverted[1],
        prompt_edit=words[2], guidance=5.0, preset="shape+",
    )  # fmt: skip
    frames = graph.add("VAEDecode", samples=edited[0], vae=model[2])
    shown = [graph.add("PreviewImage", images=images[0]) for images in (checked, looked, frames)]
    run = host.run(graph.prompt)
    assert [len(run.outputs[node.id]["images"]) for node in shown] == [3, 3, 3]
    average = float(host.text(run, checked.id).split()[1])
    assert average > 15
    ours = demo_edit(host.latents(graph.prompt, latent[0]))
    assert relative(by_host_of_demo(host.latents(graph.prompt, edited[0])), ours) < 1e-4
    report = host.text(run, edited.id)
    assert "hooked 12 of 12 attention layers" in report and "model evaluations of 3 frames" in report
    file = host.text(run, kept.id).split(":")[0]
    loaded = graph.add("FateZeroLoadStore", file=file)
    before = host.latents(graph.prompt, edited[0])
    graph.set(edited, store=loaded[0])
    assert torch.equal(host.latents(graph.prompt, edited[0]), before)


def test_flow_smoothing_follows_the_motion_from_latent_to_latent(host, graph, checkpoint):
    """Nine still frames, of which the three latents are smoothed as by the library."""
    pytest.importorskip("cv2", reason="the host's motion is found with OpenCV")
    images = graph.add("EmptyImage", width=48, height=32, batch_size=4 * FRAMES - 3, color=0)
    smoothing = graph.add("FateZeroFlowSmoothing", images=images[0], amount=0.9, flow="dis")
    graph.set(graph.edit, preset="none", smoothing=smoothing[0])
    flow, shown = torch.zeros(8, 2, 8, 12), torch.ones(8, 8, 12)
    found = by_host(host, graph, checkpoint)
    assert (
        relative(found, by_library(checkpoint, None, smoothing=FlowSmoothing(0.9, Motion(flow, flow, shown, shown))))
        < 1e-3
    )
    assert relative(found, by_library(checkpoint, None)) > 0.1
