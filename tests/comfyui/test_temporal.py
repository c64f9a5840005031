"""Temporal layers on the host's UNet: their results, removal and tuning."""

from dataclasses import replace

import pytest
import torch
from comfyui.graph import SOURCE, DemoGraph
from comfyui.host import NodeError
from comfyui.test_parity import EDITS, parity
from safetensors.torch import load_file

from fatezero.attention.temporal_layers import trains
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.files.temporal_layers import write_temporal_layers
from fatezero.hosts.diffusers import with_temporal_layers
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.temporal import temporal_layers
from fatezero.methods.tokenflow import TokenFlowSettings
from fatezero.methods.tune_a_video import ClassPictures, TuneSettings, Validation, ValidationSettings, tune
from small import relative

KINDS = {"official": ("official", None), "lora": ("fatezero", 4), "full": ("fatezero", None)}


@pytest.fixture(scope="session")
def files(host):
    """Files of random layers of every kind, with queries close to the model's; "fresh" ones change nothing."""
    folder = host.base / "models/temporal_layers"
    for name, (kind, rank) in KINDS.items():
        torch.manual_seed(3)
        unet = with_temporal_layers(Checkpoint.load("demo").unet, None, kind, rank)
        layers = temporal_layers(unet).named()
        if name == "official":
            write_temporal_layers(folder / "fresh.safetensors", layers)
        weights = layers | {n: w for n, w in unet.named_parameters() if trains(n)}
        moved = {n: w + 0.05 * w.std().nan_to_num(1).clamp(min=0.2) * torch.randn_like(w) for n, w in weights.items()}
        write_temporal_layers(folder / f"{name}.safetensors", moved)
    return folder


def edited(name, preset, **options):
    """A demo graph with temporal layers, and the same edit by the diffusers host."""
    graph = DemoGraph(steps=4, frames=4)
    layers = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name=f"{name}.safetensors")
    graph.both(layers[0])
    graph.set(graph.invert, key_frames="first, previous", clip_norm=True)
    config = EditConfig(
        source=SOURCE, target=EDITS["attribute"], steps=4, count=4, memory="recompute", guidance_scale=7.5
    )
    config = with_preset(config, preset)
    return graph, replace(config, key_frames=("first", "previous"), clip_norm=True, **options)


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("name", "preset"),
    [("official", "attribute"), ("lora", "shape+"), ("full", "style"), ("full", "pnp"), ("official", "tokenflow")],
)
def test_both_hosts_agree(host, files, name, preset):
    graph, config = edited(name, preset)
    graph.set(graph.edit, preset="pnp" if preset == "tokenflow" else preset)
    if preset == "tokenflow":
        flow = graph.add("FateZeroTokenFlow", batch_frames=2, weights="authors", seed=0)
        graph.set(graph.edit, propagation=flow[0])
        config = replace(config, tokenflow=TokenFlowSettings(2))
    checkpoint = Checkpoint.load("demo", temporal=str(files / f"{name}.safetensors"))
    assert relative(*parity(host, checkpoint, graph, config)) < 1e-4


def test_inversion_and_prompt_match_the_papers(host, files):
    graph, config = edited("official", "tune_a_video")
    graph.set(graph.edit, preset="none")
    checkpoint = Checkpoint.load("demo", temporal=str(files / "official.safetensors"))
    assert relative(*parity(host, checkpoint, graph, config)) < 1e-4


def sampled(graph, model):
    noise = graph.add("EmptyLatentImage", width=128, height=128, batch_size=4)
    return graph.add(
        "KSampler", model=model, seed=1, steps=3, cfg=5.0, sampler_name="euler", scheduler="normal",
        positive=graph.words[1], negative=graph.negative[0], latent_image=noise[0], denoise=1.0,
    )  # fmt: skip


@pytest.mark.every_host
def test_fresh_layers_change_nothing_and_are_removed(host, files):
    graph = DemoGraph()
    plain = host.latents(graph.prompt, sampled(graph, graph.demo[0])[0])
    layers = {name: graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name=f"{name}.safetensors")
              for name in ("fresh", "official")}  # fmt: skip
    fresh, tuned = (host.latents(graph.prompt, sampled(graph, node[0])[0]) for node in layers.values())
    assert torch.equal(fresh, plain)
    assert relative(tuned, plain) > 1e-3
    assert torch.equal(host.latents(graph.prompt, sampled(graph, graph.demo[0])[0]), plain)


@pytest.mark.slow
def test_temporal_layers_mix_frames_in_a_plain_sampler(host, files):
    """Changing one frame changes the others, but not without layers."""
    results = {}
    for name in ("fresh", "official"):
        for seed in (5, 6):
            graph = DemoGraph(frames=3)
            model = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name=f"{name}.safetensors")
            one = graph.add("ImageFromBatch", image=graph.video[0], batch_index=0, length=2)
            other = graph.add("ImageInvert", image=one[0]) if seed == 6 else one
            batch = graph.add("ImageBatch", image1=one[0], image2=other[0])
            latent = graph.add("FateZeroEncodeVideo", images=batch[0], vae=graph.demo[2], chunk_size=8)
            node = graph.add(
                "KSampler", model=model[0], seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal",
                positive=graph.words[1], negative=graph.negative[0], latent_image=latent[0], denoise=0.5,
            )  # fmt: skip
            results[name, seed] = host.latents(graph.prompt, node[0])
    assert torch.equal(results["fresh", 5][:2], results["fresh", 6][:2])
    assert relative(results["official", 6][:2], results["official", 5][:2]) > 1e-3


def test_lora_before_or_after_is_the_same(host, files, lora):
    def with_lora(graph, model):
        return graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=0.5)

    def with_layers(graph, model):
        return graph.add("FateZeroLoadTemporalLayers", model=model, name="official.safetensors")

    results = []
    for first, second in ((with_lora, with_layers), (with_layers, with_lora)):
        graph = DemoGraph()
        results.append(host.latents(graph.prompt, sampled(graph, second(graph, first(graph, graph.demo[0])[0])[0])[0]))
    assert relative(*results) < 1e-5


def test_refusals(host, files):
    graph = DemoGraph()
    layers = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name="official.safetensors")
    twice = graph.add("FateZeroLoadTemporalLayers", model=layers[0], name="full.safetensors")
    with pytest.raises(NodeError, match="already has temporal layers"):
        host.latents(graph.prompt, sampled(graph, twice[0])[0])
    write_temporal_layers(files / "other.safetensors", {"down_blocks.0.temp_convs.0.conv1.weight": torch.zeros(1)})
    graph = DemoGraph()
    other = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name="other.safetensors")
    with pytest.raises(NodeError, match="ModelScope's temporal layers"):
        host.latents(graph.prompt, sampled(graph, other[0])[0])


def tuned(graph, model, **values):
    settings = {
        "steps": 3, "learning_rate": 3e-3, "weight_decay": 0.01, "clip_gradients": 1.0, "optimizer": "adamw",
        "seed": 5, "key_frames": "first, previous", "clip_norm": True, "layers": "official", "rank": 0, "name": "",
    }  # fmt: skip
    return graph.add("FateZeroTuneOnVideo", model=model, latent=graph.latent[0], prompt=graph.words[0],
                     **(settings | values))  # fmt: skip


@pytest.mark.every_host
@pytest.mark.parametrize("prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_tuning_equals_the_diffusers_hosts(host, files, prediction):
    """Starting from a file's layers, which are updated; the loaded model does not change."""
    graph = DemoGraph(frames=3)
    plain = host.latents(graph.prompt, sampled(graph, graph.demo[0])[0])
    layers = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name="full.safetensors")
    given = layers[0]
    if prediction == "v_prediction":
        given = graph.add("ModelSamplingDiscrete", model=given, sampling=prediction, zsnr=False)[0]
    node = tuned(graph, given, name="mine")
    result = host.latents(graph.prompt, sampled(graph, node[0])[0])
    ours = load_file(files / "mine.safetensors")

    checkpoint = Checkpoint.load("demo", temporal=str(files / "full.safetensors"))
    latents = host.latents(graph.prompt, graph.latent[0]) * checkpoint.vae.config["scaling_factor"]
    begun = load_file(files / "full.safetensors")
    text = checkpoint.encode_prompt(SOURCE, 64, 64)
    checkpoint.scheduler.register_to_config(prediction_type=prediction)
    tune(checkpoint.denoiser, latents, text, TuneSettings(steps=3, learning_rate=3e-3, seed=5))
    theirs = {n: w for n, w in checkpoint.unet.named_parameters() if trains(n)}
    theirs |= temporal_layers(checkpoint.unet).named()
    assert ours.keys() == theirs.keys()
    changed = {n for n in ours if not torch.equal(ours[n], begun[n])}
    assert changed and {n for n in ours if "attn_temporal" in n} <= changed
    moved = torch.cat([(theirs[n].detach() - begun[n]).flatten() for n in sorted(changed)])
    difference = torch.cat([(theirs[n].detach() - ours[n]).flatten() for n in sorted(changed)])
    assert difference.norm() < 2e-2 * moved.norm()

    if prediction == "epsilon":
        again = DemoGraph(frames=3)
        loaded = again.add("FateZeroLoadTemporalLayers", model=again.demo[0], name="mine.safetensors")
        assert relative(host.latents(again.prompt, sampled(again, loaded[0])[0]), result) < 1e-4
    assert torch.equal(host.latents(graph.prompt, sampled(graph, graph.demo[0])[0]), plain)
    (files / "mine.safetensors").unlink()


def test_tuning_with_convolutions_class_pictures_and_validation_equals_the_diffusers_hosts(host, files):
    graph = DemoGraph(frames=3)
    layers = graph.add("FateZeroLoadTemporalLayers", model=graph.demo[0], name="lora.safetensors")
    pictures = graph.add("ImageInvert", image=graph.video[0])
    of_class = graph.add("FateZeroEncodeVideo", images=pictures[0], vae=graph.demo[2], chunk_size=8)
    more = {"train_convolutions": True, "prior_preservation": 0.5, "class_batch": 2,
            "validate_every": 2, "validate_steps": 3, "validate_guidance": 4.0}  # fmt: skip
    node = tuned(graph, layers[0], name="mine", **more, class_pictures=of_class[0], class_prompt=graph.words[1],
                 validation=graph.words[1], negative=graph.negative[0])  # fmt: skip
    clips = host.latents(graph.prompt, node[2])
    ours = load_file(files / "mine.safetensors")
    (files / "mine.safetensors").unlink()

    checkpoint = Checkpoint.load("demo", temporal=str(files / "lora.safetensors"))
    factor, shown = checkpoint.vae.config["scaling_factor"], []
    latents, classes = (host.latents(graph.prompt, link) * factor for link in (graph.latent[0], of_class[0]))
    source, target, empty = (checkpoint.encode_prompt(t, 64, 64) for t in (SOURCE, EDITS["attribute"], ""))
    negative = checkpoint.encode_negative("", 64, 64)
    clips_of = ValidationSettings(2, 3, 4)
    tune(
        checkpoint.denoiser, latents, source,
        TuneSettings(3, 3e-3, seed=5, train_convolutions=True, prior_preservation=0.5, class_batch=2),
        class_pictures=ClassPictures(classes, target),
        validation=Validation([target], empty, negative, lambda _, made: shown.extend(made), clips_of),
    )  # fmt: skip
    theirs = {n: w for n, w in checkpoint.unet.named_parameters() if trains(n)}
    theirs |= temporal_layers(checkpoint.unet).named()
    begun = load_file(files / "lora.safetensors")
    moved = torch.cat([(theirs[n].detach() - begun[n]).flatten() for n in sorted(ours)])
    difference = torch.cat([(theirs[n].detach() - ours[n]).flatten() for n in sorted(ours)])
    assert any("conv_temporal" in n and not torch.equal(ours[n], begun[n]) for n in ours)
    assert difference.norm() < 2e-2 * moved.norm()
    assert relative(clips * factor, torch.cat(shown)) < 1e-3


def test_missing_inputs_of_a_tuning_are_named(host):
    graph = DemoGraph()
    for more, message in (
        ({"validate_every": 1}, "negative: is missing"),
        ({"validation": graph.words[1]}, "has no effect without validate_every"),
        ({"train_convolutions": True}, "train_convolutions has no effect"),
    ):
        node = tuned(graph, graph.demo[0], **more)
        graph.add("PreviewImage", images=node[1])
        with pytest.raises(NodeError, match=message):
            host.run(graph.prompt)
        graph = DemoGraph()


@pytest.mark.slow
def test_a_tuned_model_is_edited_with_lora_and_controlnet(host, files, lora, controlnet):
    graph = DemoGraph(frames=3)
    styled = graph.add("LoraLoaderModelOnly", model=graph.demo[0], lora_name=lora, strength_model=0.3)
    node = tuned(graph, styled[0], layers="fatezero", rank=4)
    graph.both(node[0])
    both = graph.with_control(controlnet, graph.words[1], graph.negative[0], 0.5)
    graph.set(graph.edit, positive=both[0], negative=both[1])
    result = host.latents(graph.prompt, graph.edit[0])
    assert result.isfinite().all()
    graph.add("PreviewImage", images=node[1])
    host.run(graph.prompt)


def test_file_names_with_folders_are_refused(host):
    graph = DemoGraph()
    node = tuned(graph, graph.demo[0], name="../up")
    graph.add("PreviewImage", images=node[1])
    with pytest.raises(NodeError, match="file name"):
        host.run(graph.prompt)
