"""Options that other nodes set on a CONDITIONING, a LATENT or a MODEL: honoured, or refused by name."""

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError

from small import relative

pytestmark = pytest.mark.every_host


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
    ("option", "told"),
    [(in_steps, "it is for 0% to 50% of the steps"), (in_area, r"\(area\)"), (in_mask, r"\(mask\)")],
)
@pytest.mark.parametrize("socket", ["source", "positive"])
def test_a_prompt_for_a_part_alone_is_refused(host, option, told, socket):
    graph = DemoGraph()
    node, prompt = (graph.invert, graph.words[0]) if socket == "source" else (graph.edit, graph.words[1])
    graph.set(node, **{socket: option(graph, prompt)[0]})
    with pytest.raises(NodeError, match=f"{socket}: .*{told}"):
        edited(host, graph)


def test_a_range_of_all_the_steps_is_none(host):
    graph = DemoGraph()
    expected = edited(host, graph)
    whole = graph.add("ConditioningSetTimestepRange", conditioning=graph.words[1], start=0.0, end=1.0)
    graph.set(graph.edit, positive=whole[0])
    assert relative(edited(host, graph), expected) < 1e-5


@pytest.mark.parametrize("preset", ["style", "shape"])
def test_a_noise_mask_of_the_clip_says_where_alone_it_may_change(host, preset):
    graph = DemoGraph()
    graph.set(graph.edit, preset=preset)
    clip, free = host.latents(graph.prompt, graph.latent[0]), edited(host, graph)
    masked = graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=left_half(graph))
    graph.set(graph.invert, latent=masked[0])
    result = edited(host, graph)
    assert relative(result[..., 8:], clip[..., 8:]) < 1e-5, "the right half is the clip's own"
    assert relative(result[..., :8], clip[..., :8]) > 0.1
    assert relative(free[..., 8:], clip[..., 8:]) > 0.05, "without it the right half changes too"

    save = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix=f"stores/masked_{preset}")
    file = host.text(host.run(graph.prompt), save.id)
    del graph.prompt[save.id]
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    assert relative(edited(host, graph), result) < 1e-5, "a file keeps it"

    graph.set(graph.edit, mask=graph.add("SolidMask", value=0.0, width=64, height=64)[0], preset="shape")
    assert not torch.allclose(edited(host, graph), result), "a mask on the socket goes over it"


@pytest.mark.parametrize("sampling", ["lcm", "x0"])
def test_another_kind_of_sampling_is_refused(host, sampling):
    graph = DemoGraph()
    graph.both(graph.add("ModelSamplingDiscrete", model=graph.demo[0], sampling=sampling, zsnr=False)[0])
    with pytest.raises(
        NodeError, match=r"model: ModelSamplingAdvanced \((LCM|X0)\) is not a schedule that DDIM can invert"
    ):
        edited(host, graph)


def test_a_model_that_predicts_something_else_than_the_inversions_is_refused(host):
    graph = DemoGraph()
    changed = graph.add("ModelSamplingDiscrete", model=graph.demo[0], sampling="v_prediction", zsnr=False)
    graph.set(graph.edit, model=changed[0])
    with pytest.raises(NodeError, match=r"made by another model.*predicts=epsilon.*predicts=v"):
        edited(host, graph)
