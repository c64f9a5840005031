"""Layout and its guider on a real host: the diffusers host's numbers, any sampler, and what other nodes mix in."""

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError

from fatezero import generate
from fatezero.hosts.checkpoint import Checkpoint
from fatezero.methods.layout import Layout, Path, Wanted
from fatezero.methods.layout_guidance import LayoutSettings
from small import relative

PROMPT = "a red circle on grass"
OBJECTS = "red circle: 0:0.3,0.5,0.4; 3:0.7,0.5,0.4"
STEPS, FRAMES, SCALE = 4, 4, 5.0
STRONG = {"energy": "inside", "scale": 60.0, "repeats": 2, "most_change": 0.2}


def drawing(layers="demo", sampler=None, sigmas=None, cfg=SCALE, prompt=PROMPT, objects=OBJECTS, **settings):
    """A clip drawn by SamplerCustomAdvanced with a Layout Guider; `graph.layout` and `graph.guider` may be changed."""
    graph = DemoGraph(steps=STEPS)
    graph.model = graph.demo[0]
    if layers:
        layered = graph.add("FateZeroLoadTemporalLayers", model=graph.model, name=layers)
        graph.model = graph.add(
            "FateZeroSpatioTemporalAttention", model=layered[0], key_frames="first, previous", clip_norm=True
        )[0]
    values = {
        "mode": "backward", "energy": "shape", "scale": 15.0, "weight": 4.0, "amount": 0.7, "repeats": 1,
        "enough": 0.0, "most_change": 0.0, "carry": 0.7, "object_threshold": 0.4, "form": "box", "frames": FRAMES,
    }  # fmt: skip
    graph.layout = graph.add("FateZeroLayout", clip=graph.demo[1], prompt=prompt, objects=objects, **values | settings)
    graph.guider = graph.add(
        "FateZeroLayoutGuider", model=graph.model, positive=graph.layout[0], negative=graph.negative[0],
        layout=graph.layout[1], guidance=cfg,
    )  # fmt: skip
    graph.noise = graph.add("RandomNoise", noise_seed=7)
    graph.empty = graph.add("EmptyLatentImage", width=128, height=128, batch_size=FRAMES)
    graph.sampled = graph.add(
        "SamplerCustomAdvanced", noise=graph.noise[0], guider=graph.guider[0],
        sampler=sampler or graph.add("FateZeroDDIM")[0],
        sigmas=sigmas or graph.add("FateZeroSigmas", model=graph.model, steps=STEPS)[0], latent_image=graph.empty[0],
    )  # fmt: skip
    return graph


def drawn(host, graph):
    return host.latents(graph.prompt, graph.sampled[0])


def named(graph, sampler):
    graph.set(graph.sampled, sampler=graph.add("KSamplerSelect", sampler_name=sampler)[0])
    return graph


def plainly(graph):
    """The host's own guider in the place of ours."""
    plain = graph.add("CFGGuider", model=graph.model, positive=graph.layout[0], negative=graph.negative[0], cfg=SCALE)
    graph.set(graph.sampled, guider=plain[0])
    return graph


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("layers", "settings"),
    [("demo", {}), ("demo", STRONG), ("", {"energy": "centroid", "scale": 200.0}), ("demo", {"mode": "forward"})],
)
def test_the_two_hosts_agree(host, layers, settings):
    theirs = drawn(host, drawing(layers, **settings))
    checkpoint = Checkpoint.load("demo", temporal=layers or None)
    noise = torch.randn(FRAMES, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    text, empty = (checkpoint.encode_prompt(words, 64, 64) for words in (PROMPT, ""))
    layout = Layout(
        PROMPT, checkpoint.tokenizer, (Wanted("red circle", Path.parse(OBJECTS.partition(":")[2])),),
        LayoutSettings(**settings),
    )  # fmt: skip
    keys, norm = (("first", "previous"), True) if layers else (("self",), False)
    alpha = checkpoint.denoiser.schedule(STEPS).alphas[-1]

    def ours(layout):
        # The host adds noise to nothing by its sigma: x = sigma eps, so z = sqrt(1 - abar) eps.
        begun = (1 - alpha) ** 0.5 * noise
        return generate(checkpoint.denoiser, begun, text, empty, STEPS, SCALE, keys, norm, layout=layout)

    guided = ours(layout.guidance(FRAMES, 128, 128, text.text_tokens))
    assert relative(theirs * checkpoint.vae.config.scaling_factor, guided) < 1e-4
    assert relative(guided, ours(None)) > 1e-2


@pytest.mark.every_host
def test_no_strength_is_the_host_alone_to_the_bit(host):
    for settings in ({"scale": 0.0}, {"mode": "forward", "amount": 0.0}):
        for sampler in ("euler", "dpmpp_2m"):
            graph = named(drawing(**settings), sampler)
            guided = drawn(host, graph)
            assert torch.equal(guided, drawn(host, plainly(graph)))


@pytest.mark.every_host
def test_any_sampler_and_no_trace(host):
    """A guided run changes the drawing under samplers of all kinds, and leaves the model as it was."""
    for sampler in ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "lcm"):
        plain = drawn(host, plainly(named(drawing(), sampler)))
        guided = drawn(host, named(drawing(**STRONG), sampler))
        assert guided.isfinite().all() and relative(guided, plain) > 1e-2, sampler
        fresh = plainly(named(drawing(), sampler))
        fresh.set(fresh.noise, noise_seed=8)
        drawn(host, fresh)
        assert torch.equal(drawn(host, plainly(named(drawing(), sampler))), plain), sampler
    with pytest.raises(NodeError, match="sampler: steps from a copy"):
        drawn(host, named(drawing(**STRONG), "uni_pc"))
