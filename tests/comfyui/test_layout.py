"""Layout and its guider on a real host: the diffusers host's numbers, any sampler, and what other nodes mix in."""

import threading
from dataclasses import replace

import pytest
import torch
from comfyui.graph import SOURCE, DemoGraph
from comfyui.host import NodeError
from comfyui.test_mixing import edited
from comfyui.test_parity import checkpoint, parity  # noqa: F401
from comfyui.test_sampling import edit_with, invert_with
from PIL import Image

from fatezero import generate
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.methods.layout import Layout, LayoutObject, Path
from fatezero.methods.layout_guidance import LayoutSettings
from small import relative

PROMPT = "a red circle on grass"
OBJECTS = "red circle: 0:0.3,0.5,0.4; 3:0.7,0.5,0.4"
STEPS, FRAMES, SCALE = 4, 4, 5.0
STRONG = {"energy": "inside", "scale": 60.0, "repeats": 2, "most_change": 0.2}


VALUES = {
    "mode": "backward", "energy": "shape", "scale": 15.0, "weight": 4.0, "amount": 0.7, "repeats": 1, "enough": 0.0,
    "most_change": 0.0, "carry": 0.7, "object_threshold": 0.4,
}  # fmt: skip


def drawing(layers="demo", prompt=PROMPT, **settings):
    """A clip drawn by SamplerCustomAdvanced with a Layout Guider; `graph.layout` and `graph.guider` may be changed."""
    graph = DemoGraph(steps=STEPS)
    graph.model = graph.demo[0]
    if layers:
        layered = graph.add("FateZeroLoadTemporalLayers", model=graph.model, name=layers)
        graph.model = graph.add(
            "FateZeroSpatioTemporalAttention", model=layered[0], key_frames="first, previous", clip_norm=True
        )[0]
    graph.layout = graph.add(
        "FateZeroLayout", clip=graph.demo[1], prompt=prompt, objects=OBJECTS, form="box", frames=FRAMES,
        **VALUES | settings,
    )  # fmt: skip
    graph.guider = graph.add(
        "FateZeroLayoutGuider", model=graph.model, positive=graph.layout[0], negative=graph.negative[0],
        layout=graph.layout[1], guidance=SCALE,
    )  # fmt: skip
    graph.noise = graph.add("RandomNoise", noise_seed=7)
    graph.empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=FRAMES)
    graph.sampled = graph.add(
        "SamplerCustomAdvanced", noise=graph.noise[0], guider=graph.guider[0],
        sampler=graph.add("FateZeroDDIM")[0],
        sigmas=graph.add("FateZeroSigmas", model=graph.model, steps=STEPS)[0], latent_image=graph.empty[0],
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
    drawer = Checkpoint.load("demo", temporal=layers or None)
    noise = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    text, empty = (drawer.encode_prompt(words, 64, 64) for words in (PROMPT, ""))
    layout = Layout(
        PROMPT, drawer.tokenizer, (LayoutObject("red circle", Path.parse(OBJECTS.partition(":")[2])),),
        LayoutSettings(**settings),
    )  # fmt: skip
    keys, norm = (("first", "previous"), True) if layers else (("self",), False)
    alpha = drawer.denoiser.schedule(STEPS).alphas[-1]

    def ours(layout):
        # The host adds noise to nothing by its sigma: x = sigma eps, so z = sqrt(1 - abar) eps.
        begun = (1 - alpha) ** 0.5 * noise
        return generate(drawer.denoiser, begun, text, empty, STEPS, SCALE, keys, norm, layout=layout)

    guided = ours(layout.guidance(FRAMES, 64, 64, text.text_tokens))
    assert relative(theirs * drawer.vae.config.scaling_factor, guided) < 1e-4
    assert relative(guided, ours(None)) > 1e-2


@pytest.mark.every_host
def test_attention_maps_sample_as_the_host_and_show_the_words(host):
    graph = named(drawing(), "euler")
    plain = drawn(host, plainly(graph))
    inputs = graph.prompt[graph.sampled.id]["inputs"]
    maps = graph.add(
        "FateZeroAttentionMaps", model=graph.model, clip=graph.demo[1], negative=graph.negative[0], prompt=PROMPT,
        words="red circle, grass", guidance=SCALE,
        **{name: inputs[name] for name in ("noise", "sampler", "sigmas", "latent_image")},
    )  # fmt: skip
    assert relative(host.latents(graph.prompt, maps[0]), plain) < 1e-5
    saved = [graph.add("SaveImage", images=maps[i], filename_prefix=f"heat{i}") for i in (1, 2)]
    run = host.run(graph.prompt)
    heat, steps = (Image.open(host.file(run, node.id)) for node in saved)
    assert heat.size == (128, 64) and steps.size[0] > 4 * 64
    graph.set(maps, words="square")
    with pytest.raises(NodeError, match="'square' is not in the prompt"):
        host.latents(graph.prompt, maps[0])


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
    for sampler in ("euler_ancestral", "heun", "dpmpp_2m"):
        plain = drawn(host, plainly(named(drawing(), sampler)))
        guided = drawn(host, named(drawing(**STRONG), sampler))
        assert guided.isfinite().all() and relative(guided, plain) > 1e-2, sampler
    fresh = plainly(named(drawing(), sampler))
    fresh.set(fresh.noise, noise_seed=8)
    drawn(host, fresh)  # so that what follows is not cached
    assert torch.equal(drawn(host, plainly(named(drawing(), sampler))), plain)
    with pytest.raises(NodeError, match="sampler: steps from a copy"):
        drawn(host, named(drawing(**STRONG), "uni_pc"))


@pytest.mark.slow
def test_other_nodes_go_with_it(host, lora, controlnet):
    """LoRA, ControlNet and guidance of other packs change a guided drawing as they change a plain one."""
    plain = drawn(host, drawing("", **STRONG))

    def with_lora(graph):
        graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=lora, strength_model=1.0)[0]

    def with_freeu(graph):
        graph.model = graph.add("FreeU_V2", model=graph.model, b1=1.2, b2=1.3, s1=0.9, s2=0.2)[0]

    def with_pag(graph):
        graph.model = graph.add("PerturbedAttentionGuidance", model=graph.model, scale=2.0)[0]

    def with_control(graph):
        pair = graph.with_control(controlnet, graph.layout[0], graph.negative[0], 1.0)
        graph.set(graph.guider, positive=pair[0], negative=pair[1])

    for change in (with_lora, with_freeu, with_pag, with_control):
        graph = drawing("", **STRONG)
        change(graph)
        graph.set(graph.guider, model=graph.model)
        changed = drawn(host, graph)
        assert changed.isfinite().all() and relative(changed, plain) > 1e-3, change.__name__
    assert torch.equal(drawn(host, drawing("", **STRONG)), plain)


@pytest.mark.slow
def test_weights_brought_in_layer_by_layer_give_the_same(host):
    graph = drawing("demo", **STRONG)
    whole = drawn(host, graph)
    graph.set(graph.guider, model=graph.add("OtherLowVram", model=graph.model)[0])
    assert relative(drawn(host, graph), whole) < 1e-4


@pytest.mark.slow
def test_context_windows_are_guided_one_by_one(host):
    graph = drawing("", **STRONG)
    graph.set(graph.guider, model=in_windows(graph))
    plain = drawing("")
    plain.model = in_windows(plain)
    try:
        drawn(host, plainly(plain))
    except NodeError:
        pytest.skip("this host's own guider takes no context windows over a batch")
    whole = drawn(host, drawing("", **STRONG))
    assert relative(drawn(host, graph), whole) < 1e-3, "frames of a model of pictures do not meet"


@pytest.mark.parametrize("kind", ["sd2", "sd2_v", "sdxl"])
@pytest.mark.slow
def test_other_families_are_guided(host, kind):
    """Random models of other shapes, in epsilon and v: what guides them is the layout, and at scale 0 nothing does."""
    results = {}
    for scale in (0.0, 60.0):
        graph = drawing("", **STRONG | {"scale": scale})
        model = graph.add("OtherRandomModel", kind=kind)[0]
        positive, negative = (graph.add("OtherConditioning", seed=seed, pooled=kind == "sdxl")[0] for seed in (2, 3))
        graph.set(graph.guider, model=model, positive=positive, negative=negative)
        graph.set(graph.empty, width=128, height=128)
        results[scale] = drawn(host, graph)
        plain = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=SCALE)
        graph.set(graph.sampled, guider=plain[0])
        results["plain"] = drawn(host, graph)
    assert torch.equal(results[0.0], results["plain"])
    assert results[60.0].isfinite().all() and relative(results[60.0], results[0.0]) > 1e-3


def test_an_interrupt_ends_it_and_leaves_no_trace(host):
    graph = drawing("demo", **STRONG | {"repeats": 8})
    expected = drawn(host, named(drawing("demo"), "euler"))
    seen = []

    def watch(kind, data):
        if kind == "progress" and data["node"] == graph.sampled.id and not seen:
            seen.append(data["value"])
            threading.Thread(target=host.post, args=("/interrupt", {})).start()

    with pytest.raises(NodeError) as stopped:
        end = {"class_type": "PreviewAny", "inputs": {"source": graph.sampled[0]}}
        host.run({**graph.prompt, "end": end}, watch)
    assert stopped.value.report["node_id"] == graph.sampled.id
    state = graph.add("OtherHooks", model=graph.demo[0])
    run = host.run({name: graph.prompt[name] for name in (graph.demo.id, state.id)})
    assert host.text(run, state.id) == "0 hooks, 0 forwards, options [], wrappers []"
    again = named(drawing("demo"), "euler")
    again.set(again.noise, noise_seed=9)
    drawn(host, again)
    assert torch.equal(drawn(host, named(drawing("demo"), "euler")), expected)


@pytest.mark.slow
def test_half_precision_is_close_to_single(host):
    single, half = (drawing("", energy="inside", scale=60.0, most_change=0.1) for _ in range(2))
    half.set(half.guider, model=half.add("OtherDemoModel", dtype="bf16")[0])
    assert relative(drawn(host, half), drawn(host, single)) < 0.3
    eighth = drawing("")
    eighth.set(eighth.guider, model=eighth.add("OtherDemoModel", dtype="fp8_e4m3fn")[0])
    with pytest.raises(NodeError, match="model: has weights in float8_e4m3fn"):
        drawn(host, eighth)
    eighth.set(eighth.layout, mode="forward")
    assert drawn(host, eighth).isfinite().all()


def in_windows(graph):
    return graph.add(
        "ContextWindowsManual", model=graph.demo[0], context_length=3, context_overlap=1, context_stride=1,
        context_schedule="standard_static", closed_loop=False, fuse_method="pyramid", dim=0,
    )[0]  # fmt: skip


def white(graph):
    return graph.add("SolidMask", value=1.0, width=64, height=64)[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda g: g.set(g.layout, objects="blue star: 0:0.5,0.5,0.3"), "'blue star' is not in the prompt"),
        (lambda g: g.set(g.layout, objects=""), "objects: is empty"),
        (lambda g: g.set(g.layout, objects="circle"), "objects: 'circle' has no path"),
        (lambda g: g.set(g.layout, form="shift", objects="circle: 0:0.1,0"), "a shift moves an existing object"),
        (lambda g: g.set(g.layout, mask=white(g)), "mask: every object has a path"),
        (lambda g: g.set(g.guider, positive=g.words[1]), "positive: was made from"),
        (lambda g: (g.set(g.layout, mode="forward"), g.set(g.guider, model=in_windows(g))), "support context windows"),
        (lambda g: g.set(
            g.sampled, latent_image=g.add("SetLatentNoiseMask", samples=g.empty[0], mask=white(g))[0]
        ), "has a noise mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(host, change, told):
    graph = drawing("")
    change(graph)
    with pytest.raises(NodeError, match=told):
        drawn(host, graph)


def test_masks_and_several_layouts(host):
    """Two objects by a box and a mask are drawn otherwise than one, and shown in the picture."""
    prompt = "a red circle and a blue square on grass"
    one = drawing("", prompt=prompt, **STRONG)
    both = drawing("", prompt=prompt, **STRONG)
    mask = both.add(
        "MaskComposite", destination=both.add("SolidMask", value=0.0, width=64, height=64)[0],
        source=both.add("SolidMask", value=1.0, width=24, height=64)[0], x=40, y=0, operation="add",
    )  # fmt: skip
    values = {**both.prompt[both.layout.id]["inputs"], "objects": "blue square", "mask": mask[0]}
    more = both.add("FateZeroLayout", **values)
    both.set(both.layout, more=more[1])
    assert relative(drawn(host, both), drawn(host, one)) > 1e-2
    pictures = both.add("SaveImage", images=both.layout[2], filename_prefix="layout")
    assert len(host.run(both.prompt).outputs[pictures.id]["images"]) == FRAMES


# --- edits ------------------------------------------------------------------------------------

SHIFTED = "red square: 0:0.2,0.1; 2:-0.2,0.2,1.3"


def moving(preset="style+"):
    """A demo graph whose edit moves the square; `graph.layout` may be changed."""
    graph = DemoGraph(steps=5)
    graph.set(graph.words, target=SOURCE)
    graph.layout = graph.add(
        "FateZeroLayout", clip=graph.demo[1], prompt=SOURCE, form="shift", objects=SHIFTED, frames=3,
        **VALUES | {"energy": "inside", "scale": 60.0, "most_change": 0.1},
    )  # fmt: skip
    graph.set(graph.edit, preset=preset, layout=graph.layout[1])
    return graph


@pytest.mark.every_host
@pytest.mark.parametrize("preset", ["style+", pytest.param("shape+", marks=pytest.mark.slow), "none"])
def test_the_two_hosts_move_an_object_alike(host, checkpoint, preset):  # noqa: F811
    config = EditConfig(source=SOURCE, target=SOURCE, steps=5, count=3, shift=(SHIFTED,))
    config = replace(config, injection="none") if preset == "none" else with_preset(config, preset)
    theirs, ours = parity(host, checkpoint, moving(preset), config)
    assert relative(theirs, ours) < 1e-4
    still = moving(preset)
    del still.prompt[still.edit.id]["inputs"]["layout"]
    assert relative(edited(host, still), theirs) > 1e-2


def test_what_cannot_be_moved_is_refused(host):
    for change, told in (
        (lambda g: g.set(g.layout, prompt="a red square on grass"), "but the layout's prompt is"),
        (lambda g: g.set(g.layout, mode="forward"), "edits need backward"),
        (lambda g: g.set(g.edit, preset="pnp"), "Plug-and-Play keeps objects in place"),
        (lambda g: g.set(g.layout, objects="red square: 0:0.1"), "must be frame:right,down"),
    ):
        graph = moving()
        change(graph)
        with pytest.raises(NodeError, match=told):
            edited(host, graph)
    graph = moving()
    begin, store = invert_with(graph)
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    with pytest.raises(NodeError, match=r"sampler: this edit .*needs DDIM Sampler"):
        host.latents(graph.prompt, edit_with(graph, begin, store, sampler=euler)[0])
    by_guider = host.latents(graph.prompt, edit_with(graph, begin, store)[0])
    assert relative(by_guider, edited(host, graph)) < 1e-5


@pytest.mark.slow
def test_a_mask_tells_where_the_object_is(host):
    """The true mask is near to what attention tells, and another mask moves something else."""
    told = edited(host, moving())
    results = []
    for x in (4, 40):
        graph = moving()
        black, white = (graph.add("SolidMask", value=v, width=s, height=s)[0] for v, s in ((0.0, 64), (1.0, 24)))
        mask = graph.add("MaskComposite", destination=black, source=white, x=x, y=18, operation="add")
        graph.set(graph.layout, object_mask=mask[0])
        results.append(edited(host, graph))
    assert all(relative(one, told) > 1e-2 for one in results) and relative(*results) > 1e-2
