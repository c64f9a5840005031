"""Long clips in chunks, stores on disk, and many edits of one inversion."""

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError, wait_until
from safetensors.torch import load_file

from small import relative

FRAMES = 5


def edited(host, graph) -> torch.Tensor:
    return host.latents(graph.prompt, graph.edit[0])


def graph_of(key_frames="self, middle", clip_norm=False, **invert) -> DemoGraph:
    """An edit with masks from attention, of a clip long enough for chunks."""
    graph = DemoGraph(frames=FRAMES, steps=3)
    graph.set(graph.words, target="a red circle on water", mode="replace")
    graph.set(graph.invert, key_frames=key_frames, clip_norm=clip_norm, **invert)
    graph.fuse(blend_self_attention=True, blend_latents=True)
    return graph


def in_chunks(graph, frames) -> DemoGraph:
    graph.set(graph.invert, chunk_frames=frames)
    graph.set(graph.edit, chunk_frames=frames)
    return graph


def in_windows(graph, length, overlap=1, schedule="standard_static", fuse="pyramid", dim=0) -> DemoGraph:
    graph.both(graph.add(
        "ContextWindowsManual", model=graph.demo[0], context_length=length, context_overlap=overlap, context_stride=1,
        context_schedule=schedule, closed_loop=False, fuse_method=fuse, dim=dim,
    )[0])  # fmt: skip
    return graph


def test_chunks_give_the_whole_clips_result(host):
    whole = edited(host, graph_of())
    for memory in ("recompute", "queries_keys"):
        assert relative(edited(host, in_chunks(graph_of(memory=memory), 2)), whole) < 1e-5


def test_chunks_use_their_own_frames_of_a_controlnet(host, controlnet):
    def guided(graph):
        pair = graph.with_control(controlnet, graph.words[1], graph.negative[0], 1.0)
        graph.set(graph.edit, positive=pair[0], negative=pair[1])
        source = graph.with_control(controlnet, graph.words[0], graph.negative[0], 1.0)
        graph.set(graph.invert, source=source[0])
        return edited(host, graph)

    chunked = guided(in_chunks(graph_of(), 2))
    assert relative(chunked, guided(graph_of())) < 1e-5, "the hint is whole again afterwards"


@pytest.mark.parametrize(("key_frames", "clip_norm"), [("previous, first", False), ("self, middle", True)])
@pytest.mark.slow
def test_with_other_key_frames_chunks_approximate(host, key_frames, clip_norm):
    whole = edited(host, graph_of(key_frames, clip_norm))
    assert 1e-5 < relative(edited(host, in_chunks(graph_of(key_frames, clip_norm), 3)), whole) < 0.5


@pytest.mark.every_host
def test_context_windows_give_the_whole_clips_result_through_fixed_key_frames(host):
    windowed = edited(host, in_windows(graph_of(), 3, 1, "standard_static", "relative"))
    assert relative(windowed, edited(host, graph_of())) < 1e-5


@pytest.mark.slow
def test_context_windows_approximate_it_through_neighbours(host):
    near = edited(host, in_windows(graph_of("previous"), 4, 2, "standard_uniform", "pyramid"))
    assert 1e-5 < relative(near, edited(host, graph_of("previous"))) < 0.5


def test_context_windows_along_another_dimension_are_refused(host):
    with pytest.raises(NodeError, match="model: context windows along dim 2"):
        edited(host, in_windows(graph_of(), 3, dim=2))


def test_a_store_on_disk_is_in_the_temp_folder_while_the_host_keeps_it(host):
    expected = edited(host, graph_of(memory="queries_keys"))
    graph = graph_of(memory="queries_keys", place="disk")
    run = host.run({**graph.prompt, "end": {"class_type": "PreviewAny", "inputs": {"source": graph.edit[1]}}})
    assert host.text(run, graph.invert.id).startswith(f"queries_keys on disk in {host.base / 'temp'}, ")
    assert len(list((host.base / "temp").rglob("store.safetensors"))) == 1
    assert relative(edited(host, graph), expected) < 1e-5
    host.forget()
    wait_until(lambda: not list((host.base / "temp").rglob("store.safetensors")))  # collected every ten seconds at most


def test_auto_reports_its_choice_and_reason(host):
    def choice(**settings):
        graph = graph_of(memory="auto", **settings)
        graph.add("OtherRamUsage", store=graph.invert[1])
        return host.text(host.run(graph.prompt), graph.invert.id)

    assert choice(budget_gb=1.0).startswith("queries_keys in RAM, ")
    little = choice(budget_gb=0.001)
    assert little.startswith("recompute in RAM, ")
    assert "queries_keys takes" in little


def test_fewer_steps_and_a_lower_precision_are_stored_on_request(host):
    expected = edited(host, graph_of())
    assert relative(edited(host, graph_of(memory="queries_keys", keep_steps=0.5)), expected) < 1e-5
    errors = [
        relative(edited(host, graph_of(memory="queries_keys", precision=precision)), expected)
        for precision in ("float16", "float8")
    ]
    assert 0 < errors[0] < errors[1] < 0.5


def alone_and_together(host, **prompts) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Edits of some prompts one by one, together, and the number of steps of the latter."""
    ((socket, texts),) = prompts.items()
    single = []
    for text in texts:
        graph = DemoGraph()
        graph.set(graph.words, **{socket: text})
        single.append(edited(host, graph))
    graph = DemoGraph()
    graph.set(graph.words, **{socket: graph.add("OtherLines", text="\n".join(texts))[0]})
    save = graph.add("SaveLatent", samples=graph.edit[0], filename_prefix="latents/many")
    run = host.run(graph.prompt)
    assert run.executed().count(graph.edit.id) == 1
    saved = [host.base / s["type"] / s["subfolder"] / s["filename"] for s in run.outputs[save.id]["latents"]]
    steps = [d["value"] for kind, d in run.messages if kind == "progress" and d["node"] == graph.edit.id]
    return single, [load_file(path)["latent_tensor"] for path in saved], steps


def test_a_list_of_targets_is_edited_in_one_pass(host):
    single, together, steps = alone_and_together(host, target=["a green square on water", "a red square on grass"])
    assert all(relative(a, b) < 1e-5 for a, b in zip(together, single, strict=True))
    assert steps == [1, 2, 3, 4], "one pass"


def test_each_of_a_list_of_inversions_is_edited_in_one_pass(host):
    single, together, steps = alone_and_together(host, source=["a red square on water", "a red square"])
    assert all(relative(a, b) < 1e-5 for a, b in zip(together, single, strict=True))
    assert steps == [1, 2, 3, 4] * 2


def test_keys_and_values_of_a_text_are_computed_for_one_row_per_branch(host):
    """Also with another pack's replacement, which gets them for every frame."""
    graph = graph_of()
    counted = graph.add("OtherTextRows", model=graph.demo[0])
    graph.both(graph.add("OtherAttn2", model=counted[0], scale=1.0)[0])
    rows = graph.add("OtherTextRowsSeen", after=graph.edit[0])
    assert host.text(host.run(graph.prompt), rows.id) == "[1, 2]"
