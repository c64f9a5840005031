"""The nodes on a real server: list, run, progress, interrupt, cache, refusals."""

import threading

import pytest
from comfyui.graph import SIDE, SOURCE, DemoGraph
from comfyui.host import NodeError

from fatezero.methods import METHODS
from fatezero.video.read import read_video

IDS = {
    "FateZeroLoadVideo", "FateZeroEncodeVideo", "FateZeroPromptEdit", "FateZeroInvert", "FateZeroSampler",
    "FateZeroMaskPreview", "FateZeroFlowMaskPreview", "FateZeroEditMaps", "FateZeroSlice",
    "FateZeroRestoreUnchanged", "FateZeroCropToMask", "FateZeroStitchBack",
    "FateZeroSaveStore", "FateZeroLoadStore", "FateZeroSpatioTemporalAttention",
    "FateZeroReconstructionCheck", "FateZeroEvaluate", "FateZeroCompareVideos", "FateZeroDemoModel",
    "FateZeroDemoVideoModel",
    "FateZeroFlowSmoothing", "FateZeroSteady",
    "FateZeroLayout", "FateZeroLayoutGuider", "FateZeroAttentionMaps", "FateZeroFlowEdit", "FateZeroWanPair",
    "FateZeroEditGuides",
    "FateZeroLoadTemporalLayers", "FateZeroTuneOnVideo",
    "FateZeroSigmas", "FateZeroDDIM", "FateZeroInvertGuider", "FateZeroStoreOfInversion", "FateZeroEditGuider",
    *(method.node_id for method in METHODS if method.part in ("injection", "propagation")),
}  # fmt: skip
JPEG = b"\xff\xd8\xff"


def test_the_host_lists_every_node_with_a_tooltip_on_every_socket(host):
    listed = {name: about for name, about in host.get("/object_info").items() if name.startswith("FateZero")}
    assert set(listed) == IDS
    for name, about in listed.items():
        assert about["category"] == "FateZero"
        assert about["description"]
        for options in (*about["input"].get("required", {}).values(), *about["input"].get("optional", {}).values()):
            assert len(options) > 1 and options[1]["tooltip"], (name, options)
        assert all(about["output_tooltips"]), name


@pytest.mark.every_host
def test_a_clip_is_edited_to_a_video_file_with_progress_and_previews(host):
    graph = DemoGraph(steps=5)  # used by no other test, so that nothing is cached; likewise the words
    graph.set(graph.words, reweight="green=1.5")
    saved = graph.save_video()
    run = host.run(graph.prompt)
    video = read_video(host.file(run, saved.id))
    assert video.frames.shape == (3, SIDE, SIDE, 3)
    assert video.fps == 8
    for node in (graph.invert, graph.edit):
        steps = [d["value"] for kind, d in run.messages if kind == "progress" and d["node"] == node.id]
        assert steps == [1, 2, 3, 4, 5]
    assert sum(JPEG in preview[:20] for preview in run.previews) == 10
    assert host.text(run, graph.invert.id).startswith("recompute in RAM, ")
    assert "hooked 14 of 14 attention layers" in host.text(run, graph.edit.id)
    assert "green <- (new)" in host.text(run, graph.words.id)


@pytest.mark.every_host
@pytest.mark.parametrize("memory", ["recompute", "queries_keys", "maps"])
def test_only_nodes_behind_a_change_run_again(host, memory):
    graph = DemoGraph()
    graph.set(graph.invert, memory=memory)
    graph.save_video()
    host.run(graph.prompt)

    def runs(node, **inputs):
        graph.set(node, **inputs)
        run = host.run(graph.prompt)
        assert graph.edit.id in run.executed()
        assert (graph.invert.id in run.cached()) != (graph.invert.id in run.executed())
        return graph.invert.id in run.executed()

    assert not runs(graph.edit, guidance=5.0)
    assert not runs(graph.edit, preset="shape")
    assert not runs(graph.negative, text="a circle")
    if memory == "recompute":
        assert runs(graph.invert, steps=3)
        assert runs(graph.video, start=1)
        assert runs(graph.words, source="a red circle on water")


def test_another_target_prompt_does_not_invert_again(host):
    graph = DemoGraph()
    graph.save_video()
    host.run(graph.prompt)
    graph.set(graph.words, target="a blue square on water")
    run = host.run(graph.prompt)
    assert graph.edit.id in run.executed()
    assert graph.invert.id in run.cached()
    assert graph.invert.id not in run.executed()


def test_interrupting_either_node_stops_it_and_restores_the_model(host):
    graph = DemoGraph(steps=200)
    graph.set(graph.invert, clip_norm=True)
    graph.save_video()

    def interrupt(node):
        """Interrupt at a node's second step; return the number of steps after that."""
        steps = []

        def watch(kind, data):
            if kind == "progress" and data["node"] == node.id:
                steps.append(data["value"])
                if len(steps) == 2:
                    threading.Thread(target=host.post, args=("/interrupt", {})).start()

        with pytest.raises(NodeError) as stopped:
            host.run(graph.prompt, watch)
        assert stopped.value.report["node_id"] == node.id
        return steps[-1]

    assert interrupt(graph.invert) < 50
    graph.set(graph.invert, steps=4)
    graph.set(graph.edit, guidance=7.0)
    expected = host.latents(graph.prompt, graph.edit[0])
    graph.set(graph.invert, steps=100)
    assert interrupt(graph.edit) < 50
    state = graph.add("OtherHooks", model=graph.demo[0])
    run = host.run({name: graph.prompt[name] for name in (graph.demo.id, state.id)})
    assert host.text(run, state.id) == "0 hooks, 0 forwards, options [], wrappers []"
    del graph.prompt[state.id]
    graph.set(graph.invert, steps=4)
    assert (host.latents(graph.prompt, graph.edit[0]) - expected).abs().max() == 0


def check_refusal(host, graph, message, node=None):
    graph.save_video()
    with pytest.raises(NodeError) as refused:
        host.run(graph.prompt)
    report = refused.value.report
    text = report.get("exception_message") or str(report)
    assert message in text, report
    if node is not None:
        assert report["node_id"] == node.id
    return report


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("video", {"count": 99}, "99 are needed"),
        ("video", {"crop_left": 300}, "crop"),
        ("video", {"file": "", "video": None}, "file: choose a video"),
        ("words", {"target": "  "}, "target: is empty"),
        ("words", {"blend_source": "jeep"}, "blend_source: 'jeep' is not in the prompt"),
        ("words", {"reweight": "green"}, "reweight is 'green'; it must be word=number"),
        ("words", {"reweight": "jeep=2"}, "'jeep' is not in the prompt"),
        ("words", {"mode": "replace", "target": "a square"}, "5 words and the target 2"),
        ("words", {"source": ""}, "source: is empty"),
        ("invert", {"key_frames": "centre"}, "key_frames: "),
        ("invert", {"memory": "maps", "budget_gb": 0.0001}, "of budget_gb 0.0001. Sizes: recompute"),
    ],
)
def test_errors_name_the_node_and_the_socket(host, node, inputs, message):
    graph = DemoGraph()
    graph.set(getattr(graph, node), **inputs)
    graph.prompt = {
        name: {**one, "inputs": {k: v for k, v in one["inputs"].items() if v is not None}}
        for name, one in graph.prompt.items()
    }
    check_refusal(host, graph, message, getattr(graph, node))


def test_conditioning_of_another_size_is_refused(host):
    graph = DemoGraph()
    other = graph.add("FateZeroPromptEdit", **{**graph.prompt[graph.words.id]["inputs"], "target": "a blue square"})
    graph.set(graph.edit, positive=other[1])
    check_refusal(host, graph, "positive: was made from 'a blue square'", graph.edit)

    graph = DemoGraph()
    graph.set(graph.edit, prompt_edit=graph.add(
        "FateZeroPromptEdit", **{**graph.prompt[graph.words.id]["inputs"], "source": "a circle"}
    )[2])  # fmt: skip
    check_refusal(host, graph, f"made with the prompt {SOURCE!r}, not 'a circle'", graph.edit)

    graph = DemoGraph()
    two = graph.add("ConditioningCombine", conditioning_1=graph.words[1], conditioning_2=graph.words[0])
    graph.set(graph.edit, positive=two[0])
    check_refusal(host, graph, "positive: combines 2 prompts", graph.edit)

    graph = DemoGraph()
    latent = graph.add("EmptyLatentImage", width=128, height=64, batch_size=2)
    graph.set(graph.invert, latent=latent[0])
    check = graph.add(
        "FateZeroReconstructionCheck", model=graph.demo[0], store=graph.invert[1], vae=graph.demo[2],
        images=graph.video[0],
    )  # fmt: skip
    graph.add("PreviewImage", images=check[0])
    check_refusal(host, graph, "images: 3 frames, but the store has 2", check)


def test_the_replay_is_checked_frame_by_frame(host):
    graph = DemoGraph(steps=20, side=64)
    check = graph.add(
        "FateZeroReconstructionCheck", model=graph.demo[0], store=graph.invert[1], vae=graph.demo[2],
        images=graph.video[0],
    )  # fmt: skip
    picture = graph.add("SaveImage", images=check[0], filename_prefix="replay")
    run = host.run(graph.prompt)
    lines = host.text(run, check.id).splitlines()
    assert [line.split(":")[0] for line in lines] == ["average", "frame 0", "frame 1", "frame 2"]
    assert all(float(line.split()[-2]) > 25 for line in lines)
    assert len(run.outputs[picture.id]["images"]) == 3
