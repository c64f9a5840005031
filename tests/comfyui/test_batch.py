"""A batch on real servers, and a result of Save Video with the prompt that made it."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from comfyui.conftest import HOSTS
from comfyui.host import REPO, started, wait_until
from commands import COMMAND, summary_rows, two_clips

from fatezero.video.read import read_metadata, read_video

WORKFLOW = REPO / "workflows/api/demo.json"
SOURCE = "a red square on water"
SLOW = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return two_clips(tmp_path)


def write(folder, **content) -> None:
    shared = {"workflow": str(WORKFLOW), "inputs": {"source": "4.source", "target": "4.target"}, "source": SOURCE}
    (folder / "jobs.yaml").write_text(yaml.safe_dump({**shared, "steps": 2, "count": 3, **content}, sort_keys=False))


def test_jobs_on_two_servers_and_one_unreachable(command, host, folder, tmp_path_factory):
    write(
        folder, clips="clips/*.mp4", targets=["a green square on water", "a red star on water"],
        jobs=[
            {"video": "clips/a.mp4", "target": "x", "crop_left": -1, "name": "refused"},
            {"video": "clips/a.mp4", "target": "x", "key_frames": ["nonsense"], "name": "failing"},
        ],
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    with started(HOSTS[0], tmp_path_factory.mktemp("second")) as other:
        servers = (part for url in (host.url, other.url, gone) for part in ("--comfyui", url))
        output = command("batch", "jobs.yaml", "--no-measure", *servers, code=1)
    assert "2 of 6 jobs failed" in output, output
    found = {row["job"]: row for row in summary_rows(folder / "jobs")}
    errors = {name.partition("_")[0]: row["error"] for name, row in found.items() if row["status"] == "failed"}
    assert "crop_left" in errors["refused"]
    assert errors["failing"].startswith("FateZeroInvert (node 6): key_frames: unknown entry 'nonsense'")
    done = [row for row in found.values() if row["status"] == "done"]
    assert {row["where"] for row in done} == {host.url, other.url}, "both had jobs"
    for row in done:
        within = json.loads(read_metadata(folder / "jobs" / row["result"])["prompt"])
        assert within["4"]["inputs"]["target"] == row["target"], "the job's own"
        assert read_video(folder / "jobs" / row["result"]).frames.shape == (3, 64, 64, 3)
    assert "6 jobs, 4 of them done" in command("batch", "jobs.yaml", "--comfyui", host.url, "--dry-run")


@pytest.mark.parametrize(
    "how", ["on the server", pytest.param("by a signal", marks=SLOW), pytest.param("by a timeout", marks=SLOW)]
)
def test_a_job_is_interrupted(host, folder, how):
    write(folder, jobs=[{"video": "clips/a.mp4", "target": "a green square on water", "steps": 400}])
    options = ("--timeout", "1") if how == "by a timeout" else ()
    run = subprocess.Popen(
        [*COMMAND, "batch", "jobs.yaml", "--comfyui", host.url, *options],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: host.get("/queue")["queue_running"] or run.poll() is not None)
    if how == "on the server":
        host.post("/interrupt", {})
    elif how == "by a signal":
        run.terminate()
    output = run.communicate()[0]
    expected = {
        "on the server": "it was interrupted on the server",
        "by a signal": "nothing half-written is left",
        "by a timeout": "it took more than 1 seconds",
    }
    assert expected[how] in output, output
    wait_until(lambda: not host.get("/queue")["queue_running"])
    assert not list((folder / "jobs").glob("*.mp4"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nodes (6, 7, 9, 13) have an input chunk_frames"),
        ({"nonsense": 3}, "no node has an input nonsense"),
        ({"inputs": {"source": "99.source"}}, "inputs: source is '99.source'"),
        ({"workflow": "workflows/demo.json"}, "is not the API form"),
        ({"workflow": None}, "name no workflow"),
    ],
)
def test_jobs_that_do_not_fit_their_workflow(refused, folder, content, message):
    if content.get("workflow"):
        content = {"workflow": str(REPO / content["workflow"])}
    chunk = {"chunk_frames": 4} if "chunk_frames" in message else {}
    write(folder, jobs=[{"video": "clips/a.mp4", "target": "x", **chunk}], **content)
    assert message in refused("batch", "jobs.yaml", "--comfyui", "http://127.0.0.1:9")


def test_the_prompt_embedded_by_save_video_reproduces_the_video(host):
    """The prompt in the file's metadata, queued on a host with an empty cache, gives the same frames."""
    prompt = json.loads(WORKFLOW.read_text())
    prompt["6"]["inputs"]["steps"] = 4
    for node in prompt.values():
        if node["class_type"] == "FateZeroLoadVideo":
            node["inputs"]["count"] = 3
    first = host.file(host.run(prompt), "12")
    within = json.loads(read_metadata(Path(first))["prompt"])
    frames = read_video(first).frames
    host.forget()
    run = host.run(within)
    assert "9" in run.executed(), "not from the cache"
    again = host.file(run, "12")
    assert again != first
    assert torch.equal(read_video(again).frames, frames)
    kept = json.loads(read_metadata(again)["prompt"])
    assert {name: node["inputs"] for name, node in kept.items()} == {n: node["inputs"] for n, node in within.items()}
