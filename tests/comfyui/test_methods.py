"""Plug-and-Play and TokenFlow on a real host: equal to diffusers, and combined with other nodes."""

from dataclasses import replace

import pytest
import torch
from comfyui.graph import SOURCE, DemoGraph
from comfyui.host import NodeError
from comfyui.test_mixing import controlnet_on, edited, lora_on, noise
from comfyui.test_parity import checkpoint, parity  # noqa: F401

from fatezero import PnPSettings, TokenFlowSettings
from fatezero.cli.config.settings import EditConfig, with_preset
from small import relative

FRAMES = 5
FLOW = {"batch_frames": 2, "weights": "authors", "seed": 3}


def flowing(preset="pnp", frames=FRAMES, key_frames="self", **settings) -> DemoGraph:
    graph = DemoGraph(steps=5, frames=frames)
    graph.set(graph.invert, key_frames=key_frames)
    graph.set(graph.edit, preset=preset)
    return with_flow(graph, **settings)


def with_flow(graph, **settings) -> DemoGraph:
    graph.set(graph.edit, propagation=graph.add("FateZeroTokenFlow", **FLOW | settings)[0])
    return graph


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("preset", "flow"),
    [
        ("pnp", None),
        ("pnp", FLOW),
        ("none", FLOW | {"weights": "linear"}),
        ("style", FLOW | {"weights": "paper"}),
        ("shape+", FLOW),
    ],
)
def test_both_hosts_agree(host, checkpoint, preset, flow):  # noqa: F811
    config = EditConfig(source=SOURCE, target="a red circle on water", steps=5, count=FRAMES, key_frames=("self",))
    config = replace(config, injection="none") if preset == "none" else with_preset(config, preset)
    config = replace(config, key_frames=("self",))
    graph = flowing(preset)
    if flow is None:
        del graph.prompt[graph.edit.id]["inputs"]["propagation"]
    else:
        graph = flowing(preset, **flow)
        config = replace(config, propagation="tokenflow", tokenflow=TokenFlowSettings(**flow))
    theirs, ours = parity(host, checkpoint, graph, config)
    assert torch.linalg.norm(theirs - ours) < 1e-4 * torch.linalg.norm(ours)
    other = flowing("pnp" if preset == "none" else "none")
    assert torch.linalg.norm(edited(host, other) - theirs) > 1e-2


def test_settings_come_from_their_nodes(host):
    """The nodes' defaults equal the presets; other values change the edit."""
    by_preset = edited(host, flowing("pnp"))
    graph = flowing("pnp")
    node = graph.take("FateZeroPnP", attention_steps=0.5, feature_steps=0.8)
    assert torch.equal(edited(host, graph), by_preset)
    graph.set(node, feature_steps=0.0)
    assert (edited(host, graph) - by_preset).abs().max() > 1e-2
    graph = flowing("pnp", seed=4)
    assert (edited(host, graph) - by_preset).abs().max() > 1e-3


@pytest.mark.parametrize(("mixed_in", "file"), [(lora_on, "lora"), (controlnet_on, "controlnet")])
@pytest.mark.slow
def test_lora_and_controlnet_before_the_inversion_the_edit_or_both(host, request, mixed_in, file):
    file = request.getfixturevalue(file)

    def run(strength, *places):
        graph = flowing()
        mixed_in(graph, file, strength, *places)
        return edited(host, graph), noise(host, graph)

    plain, plain_noise = run(0.0, False, False)
    results = [plain]
    for places in ((True, False), (False, True), (True, True)):
        assert torch.equal(run(0.0, *places)[0], plain)
        result, inverted = run(1.0, *places)
        assert ((inverted - plain_noise).abs().max() > 1e-3) == places[0]
        assert all((result - other).abs().max() > 1e-3 for other in results)
        results.append(result)


def test_any_length_and_chunks(host):
    """A batch in chunks equals a whole one; single frames and remainders run."""
    whole = edited(host, flowing(batch_frames=3))
    graph = flowing(batch_frames=3)
    graph.set(graph.edit, chunk_frames=2)
    assert relative(edited(host, graph), whole) < 1e-4  # the host's latents have values of ten and more
    assert edited(host, flowing(frames=1)).isfinite().all()


@pytest.mark.slow
def test_less_strength_stays_closer_to_the_clip(host):
    """SDEdit: start from the clip with part of the inverted noise."""
    clip = None
    changes = []
    for strength in (1.0, 0.6, 0.2):
        graph = flowing("none")
        graph.set(graph.video, width=64, height=64)
        graph.set(graph.edit, strength=strength)
        result, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
        changes.append((result - clip).norm().item())
    assert changes[0] > changes[1] > changes[2] > 0
    graph.set(graph.edit, strength=0.0)
    with pytest.raises(NodeError, match="strength is 0"):
        edited(host, graph)


def test_a_mask_preserves_the_clip_outside_with_any_method(host):
    graph = flowing("pnp")
    image = graph.add("SolidMask", value=0.0, width=64, height=64)
    graph.set(graph.edit, mask=image[0])
    assert (edited(host, graph) - host.latents(graph.prompt, graph.latent[0])).abs().max() < 1e-4


@pytest.mark.slow
def test_guidance_nodes_combine_with_it(host):
    for kind in ("PerturbedAttentionGuidance", "FreeU_V2"):
        graph, plain = flowing(), edited(host, flowing())
        values = {"scale": 2.0} if kind.startswith("Perturbed") else {"b1": 1.2, "b2": 1.3, "s1": 0.9, "s2": 0.2}
        graph.set(graph.edit, model=graph.add(kind, model=graph.demo[0], **values)[0])
        result = edited(host, graph)
        assert result.isfinite().all() and (result - plain).abs().max() > 1e-3, kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.set(g.edit, preset="custom"), "settings: preset custom needs them"),
        (lambda g: (g.take("FateZeroPnP", attention_steps=0.5, feature_steps=0.8), g.set(g.edit, preset="style")),
         "settings: are connected"),
        (lambda g: (g.set(g.edit, preset="style"), g.prompt[g.edit.id]["inputs"].pop("prompt_edit")),
         "prompt_edit: FateZero needs it"),
        (lambda g: g.set(g.edit, mask=g.add("SolidMask", value=1.0, width=64, height=64)[0], mask_mode="union"),
         'how="union"'),
        (lambda g: g.both(g.add(
            "ContextWindowsManual", model=g.demo[0], context_length=3, context_overlap=1, context_stride=1,
            context_schedule="standard_static", closed_loop=False, fuse_method="pyramid", dim=0)[0]),
         "model: context windows conflict with TokenFlow"),
        (lambda g: g.both(g.add("TomePatchModel", model=g.demo[0], ratio=0.5)[0]), "merges or rescales tokens"),
    ],
)  # fmt: skip
def test_mismatches_are_refused_by_name(host, change, message):
    graph = flowing()
    change(graph)
    with pytest.raises(NodeError, match=message):
        edited(host, graph)


def test_the_report_has_settings_and_costs(host):
    graph = flowing(frames=5)
    shown = graph.add("PreviewAny", source=graph.edit[1])
    report = str(host.run(graph.prompt).outputs[shown.id])
    assert "injected queries and keys in 2 and the feature in 4 of 5 steps" in report
    assert "3 random pivots a step for 5 frames, in batches of 2, weights authors" in report
    assert "16 UNet evaluations of 5 frames, 8 more for the source" in report
    assert PnPSettings().attention_steps == 0.5


def test_flow_smoothing_makes_an_edit_steadier_with_any_method(host):
    pytest.importorskip("cv2", reason="the host's motion is found with OpenCV")

    def unrest(graph):
        result, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
        return (result - clip).diff(dim=2 if result.ndim == 5 else 0).norm().item()

    for preset in ("pnp", "style"):
        graph = flowing(preset)
        plain = unrest(graph)
        smoothing = graph.add("FateZeroFlowSmoothing", images=graph.video[0], amount=0.9, flow="dis")
        graph.set(graph.edit, smoothing=smoothing[0])
        assert unrest(graph) < 0.95 * plain, preset
        graph.set(smoothing, amount=0.0)
        assert unrest(graph) == plain
    other = graph.add(
        "ImageFromBatch", image=graph.video[0], batch_index=0, length=3
    )  # fmt: skip
    graph.set(smoothing, images=other[0], amount=0.5)
    with pytest.raises(NodeError, match="5 frames, but has that of 3"):
        edited(host, graph)


def test_a_finished_edit_is_smoothed(host):
    graph = flowing("none")
    decoded = graph.add("VAEDecode", samples=graph.edit[0], vae=graph.demo[2])
    steady = graph.add("FateZeroSteady", images=graph.video[0], edited=decoded[0], amount=0.8, flow="dis")
    saved = [
        graph.add("SaveImage", images=node[0], filename_prefix=name) for node, name in ((decoded, "a"), (steady, "b"))
    ]
    run = host.run(graph.prompt)
    assert [len(run.outputs[node.id]["images"]) for node in saved] == [5, 5]
    first, second = (host.file(run, node.id).read_bytes() for node in saved)
    assert first != second
    graph.set(
        steady,
        images=graph.add(
            "ImageScale", image=graph.video[0], upscale_method="area", width=16, height=16, crop="disabled"
        )[0],
    )
    with pytest.raises(NodeError, match="edited: 5 frames of 32x32, but images has 5 of 16x16"):
        host.run(graph.prompt)


@pytest.mark.parametrize("kind", [pytest.param("sd2", marks=pytest.mark.slow), "sd2_v", "sdxl"])
def test_other_families(host, kind):
    """On any model, TokenFlow edits a still clip like single frames, and PnP injects from it."""
    graph = DemoGraph(steps=4)
    model = graph.add("OtherRandomModel", kind=kind)[0]
    source, positive, negative = (
        graph.add("OtherConditioning", seed=seed, pooled=kind == "sdxl")[0] for seed in (1, 2, 3)
    )
    one = graph.add("LatentFromBatch", samples=graph.latent[0], batch_index=0, length=1)
    still = graph.add("RepeatLatentBatch", samples=one[0], amount=4)
    graph.set(graph.invert, model=model, source=source, latent=still[0], key_frames="self")
    graph.set(graph.edit, model=model, positive=positive, negative=negative, guidance=3.0)
    results = {}
    for preset in ("pnp", "none"):
        graph.set(graph.edit, preset=preset)
        graph.prompt[graph.edit.id]["inputs"].pop("propagation", None)
        results[preset] = edited(host, graph)
        with_flow(graph, weights="paper")
        flowed = edited(host, graph)
        assert torch.linalg.norm(flowed - results[preset]) < 1e-4 * torch.linalg.norm(flowed)
    assert torch.linalg.norm(results["pnp"] - results["none"]) > 1e-3 * torch.linalg.norm(results["pnp"])


def test_shares_by_word_and_attention_of_the_reconstruction(host):
    """Older workflows lack these widgets; their defaults change nothing."""
    graph = DemoGraph(steps=3)
    fused = graph.fuse()
    plain = host.latents(graph.prompt, graph.edit[0])
    graph.set(fused, cross_replace_from=0.0, self_replace_from=0.0, cross_replace_words="", attention_from="inversion")
    assert torch.equal(host.latents(graph.prompt, graph.edit[0]), plain)
    for changed in ({"cross_replace_words": "green=0.3:0.5, water=0"}, {"attention_from": "reconstruction"}):
        graph.set(fused, **changed)
        assert not torch.equal(host.latents(graph.prompt, graph.edit[0]), plain)
    graph.set(fused, cross_replace_words="jeep=0.3")
    with pytest.raises(NodeError, match="cross_replace_words: 'jeep' is not in the prompt"):
        host.latents(graph.prompt, graph.edit[0])


def test_attention_of_the_reconstruction_is_of_guided_sampling(host, checkpoint, lora):  # noqa: F811
    config = EditConfig(source=SOURCE, target="a red circle on water", steps=5, count=FRAMES, key_frames=("self",))
    config = replace(config, cross_replace_steps=0.7, self_replace_steps=0.8, attention_from="reconstruction")
    graph = DemoGraph(steps=5, frames=FRAMES)
    graph.set(graph.invert, key_frames="self")
    graph.set(graph.words, target="a red circle on water")
    graph.fuse(attention_from="reconstruction")
    theirs, ours = parity(host, checkpoint, graph, config)
    assert torch.linalg.norm(theirs - ours) < 1e-4 * torch.linalg.norm(ours)
    other = graph.add("LoraLoaderModelOnly", model=graph.demo[0], lora_name=lora, strength_model=1.0)
    graph.set(graph.edit, model=other[0])
    assert relative(edited(host, graph), theirs) > 1e-2, "runs with another MODEL than the inversion's"


def test_latents_blended_as_the_authors_do(host, checkpoint):  # noqa: F811
    """A separate switch from blend_latents, for older workflows."""
    config = EditConfig(source=SOURCE, target="a red circle on water", steps=5, count=FRAMES, key_frames=("self",))
    words = {"blend_source": ("square",), "blend_target": ("circle",), "blend_threshold": 0.8}
    fused = {"cross_replace_steps": 0.7, "self_replace_steps": 0.8, "blend_threshold": 0.8}
    graph = DemoGraph(steps=5, frames=FRAMES)
    graph.set(graph.invert, key_frames="self")
    graph.set(graph.words, target="a red circle on water", blend_source="square", blend_target="circle")
    graph.fuse(**fused, blend_latents=True, blend_latents_authors=True)
    config = replace(config, **words, cross_replace_steps=0.7, self_replace_steps=0.8, blend_latents="authors")
    theirs, ours = parity(host, checkpoint, graph, config)
    assert torch.linalg.norm(theirs - ours) < 1e-4 * torch.linalg.norm(ours)
    plain = parity(host, checkpoint, graph, replace(config, blend_latents=True))[1]
    assert torch.linalg.norm(plain - ours) > 1e-2


def test_more_inversion_steps_and_sampled_noise(host, checkpoint):  # noqa: F811
    """TokenFlow's starts of an edit, as in the command."""
    config = EditConfig(source=SOURCE, target="a red circle on water", steps=5, count=FRAMES, key_frames=("self",))
    config = replace(with_preset(config, "pnp"), inversion_steps=10, sdedit_seed=3, strength=0.8, key_frames=("self",))
    graph = DemoGraph(steps=5, frames=FRAMES)
    graph.set(graph.invert, key_frames="self", inversion_steps=10)
    graph.set(graph.edit, preset="pnp", strength=0.8, sdedit_seed=3)
    theirs, ours = parity(host, checkpoint, graph, config)
    assert torch.linalg.norm(theirs - ours) < 1e-4 * torch.linalg.norm(ours)
    with pytest.raises(NodeError, match="inversion_steps"):
        graph.set(graph.invert, inversion_steps=7)
        edited(host, graph)
