"""UNets for few steps in the host: LCM's sampling with sampled noise, the others at trailing timesteps."""

import pytest
from comfyui.graph import SIDE, SOURCE, TARGET, DemoGraph
from comfyui.host import NodeError
from comfyui.test_wan import Hosts

from fatezero import FlowEditSettings, draw, edit
from fatezero.hosts.diffusers.load import open_model
from small import relative

SEED = 5


def few_steps(graph, model, **more):
    """FlowEdit in few steps, of one frame, because the other pack's loop edits single frames."""
    store = graph.add(
        "FateZeroFlowEdit", model=model, source=graph.words[0], latent=graph.latent[0], steps=4, source_guidance=1.0,
        draws=1, seed=SEED, **more,
    )  # fmt: skip
    graph.set(graph.edit, model=model, store=store[0], preset="few_steps", guidance=0.0, strength=1.0)
    return store


def by_loop(graph, model, scheduler):
    sigmas = graph.add("BasicScheduler", model=model, scheduler=scheduler, steps=4, denoise=1.0)
    return graph.add(
        "FlowLoop", model=model, source=graph.words[0], positive=graph.words[1], negative=graph.negative[0],
        latent=graph.latent[0], sigmas=sigmas[0], guidance=1.0, source_guidance=1.0, first=0, seed=SEED,
    )  # fmt: skip


def sampled_as(graph, sampling):
    return graph.add("ModelSamplingDiscrete", model=graph.demo[0], sampling=sampling, zsnr=False)[0]


@pytest.mark.parametrize(("sampling", "scheduler"), [("lcm", "simple"), ("eps", "sgm_uniform")])
def test_an_edit_from_sampled_noise_equals_the_papers_loop(host, sampling, scheduler):
    graph = DemoGraph(frames=1)
    model = sampled_as(graph, sampling)
    few_steps(graph, model, **({"timesteps": "trailing"} if sampling == "eps" else {}))
    ours = host.latents(graph.prompt, graph.edit[0])
    assert relative(ours, host.latents(graph.prompt, by_loop(graph, model, scheduler)[0])) < 1e-4
    assert relative(ours, host.latents(graph.prompt, graph.latent[0])) > 1e-2
    graph.set(graph.edit, positive=graph.words[0])
    assert relative(host.latents(graph.prompt, graph.edit[0]), host.latents(graph.prompt, graph.latent[0])) < 1e-5


def test_lcm_is_not_inverted(host):
    graph = DemoGraph(frames=1)
    graph.both(sampled_as(graph, "lcm"))
    with pytest.raises(NodeError, match=r"LCM.* cannot be inverted: use the FlowEdit node"):
        host.latents(graph.prompt, graph.edit[0])


def test_a_store_of_other_timesteps_is_refused(host):
    graph = DemoGraph(frames=1)
    few_steps(graph, graph.demo[0])
    graph.set(graph.edit, model=sampled_as(graph, "lcm"))
    with pytest.raises(NodeError, match="another model|timesteps"):
        host.latents(graph.prompt, graph.edit[0])


def test_an_inversion_at_trailing_timesteps(host):
    """The node's steps equal the host's sgm_uniform."""
    graph = DemoGraph(frames=1)
    graph.set(graph.invert, timesteps="trailing")
    by_node = host.latents(graph.prompt, graph.invert[0])
    sigmas = graph.add("BasicScheduler", model=graph.demo[0], scheduler="sgm_uniform", steps=4, denoise=1.0)
    given = graph.prompt[graph.invert.id]["inputs"]
    guider = graph.add(
        "FateZeroInvertGuider", **{n: v for n, v in given.items() if n not in ("latent", "steps", "timesteps")}
    )
    noise = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0],
        sampler=graph.add("FateZeroDDIM")[0],
        sigmas=graph.add("FlipSigmas", sigmas=sigmas[0])[0], latent_image=graph.latent[0],
    )  # fmt: skip
    assert relative(by_node, host.latents(graph.prompt, noise[0])) < 1e-4, "Flip Sigmas turns 0 into 1e-4"


def test_timesteps_have_no_effect_on_a_flow(host):
    graph = DemoGraph(frames=1)
    video = graph.add("FateZeroDemoVideoModel")
    graph.set(graph.words, clip=video[1])
    graph.set(graph.latent, vae=video[2])
    few_steps(graph, video[0], timesteps="trailing")
    with pytest.raises(NodeError, match="timesteps: trailing has no effect on a flow"):
        host.latents(graph.prompt, graph.edit[0])


class DemoHosts(Hosts):
    shift = 2.0


def test_the_demos_lora_is_that_of_the_command(host):
    graph = DemoGraph(frames=3)
    video = graph.add("FateZeroDemoVideoModel", few_steps=True)
    graph.set(graph.words, clip=video[1])
    graph.set(graph.negative, clip=video[1])
    graph.set(graph.latent, vae=video[2])
    few_steps(graph, video[0])
    clip, ours = (
        0.18215 * host.latents(graph.prompt, node[0])[0].transpose(0, 1) for node in (graph.latent, graph.edit)
    )
    model = open_model("demo-wan", lora="demo-few-steps")
    source, target = (model.encode_prompt(text, SIDE, SIDE) for text in (SOURCE, TARGET))
    denoiser = DemoHosts(model.networks[0], model.scheduler)
    start = draw(denoiser, clip, source, 4, FlowEditSettings(1.0, seed=SEED))
    expected = edit(denoiser, start, target, guidance_scale=1.0)
    assert relative(ours, expected) < 1e-3
    assert relative(ours, clip) > 1e-2
