"""Jobs on a Ray cluster of several nodes, and one clip on several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import COMMAND, frames_written, two_clips

from fatezero.files.bundled import CLIP
from fatezero.video.read import read_metadata

SOURCE = "a red square on water"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fatezero"]
"""The command on two processes of gloo."""


@pytest.fixture
def cluster():
    """A head without cores, and two nodes of one core each."""
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster  # noqa: N806
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made, nodes
    made.shutdown()


@pytest.mark.slow
def test_no_job_is_lost_if_a_node_is_killed(command, cluster, tmp_path):
    made, nodes = cluster
    two_clips(tmp_path)
    content = {
        "source": SOURCE, "steps": 2, "count": 2, "clips": "clips/*.mp4",
        "targets": ["a green square on water", "a blue square on water"],
        "jobs": [{"video": "clips/none.mp4", "target": "x"}],
    }  # fmt: skip
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(content))
    batch = [*COMMAND, "batch", "jobs.yaml", "--ray", made.address, "--ray-inputs", "sent"]
    run = subprocess.Popen(batch, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "jobs" / "jobs.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    made.remove_node(nodes[0], allow_graceful=False)
    output = run.communicate()[0].decode()
    assert run.returncode == 1 and "1 of 5 jobs failed" in output, output
    ended = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({one["name"] for one in ended}) == len(ended) == 5, "each ended once"
    failed = [one["error"] for one in ended if one["error"]]
    assert failed == ["no video at clips/none.mp4"]
    results = sorted(path for path in (tmp_path / "jobs").glob("*.mp4"))
    assert len(results) == 4
    record = json.loads(Path(f"{results[0]}.json").read_text())
    assert record["video"] == str(tmp_path / "clips" / "a.mp4"), "the local path of the clip, not that on the node"
    command("edit", "--config", f"{results[0]}.json", "-o", "again.mp4")
    assert frames_written(tmp_path / "again.mp4") == frames_written(results[0])


def test_an_unreachable_cluster(refused, tmp_path):
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"source": "x", "clips": str(CLIP), "targets": "y"}))
    assert "no Ray cluster responds at 127.0.0.1:1" in refused("batch", "jobs.yaml", "--ray", "127.0.0.1:1")
    assert "only one of --ray and --comfyui" in refused("batch", "jobs.yaml", "--ray", "auto", "--comfyui", "http://x")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["shape", "attribute+", "pnp"])
def test_two_processes_edit_one_clip_as_one_does(command, tmp_path, preset):
    words = (
        CLIP,
        "--source",
        SOURCE,
        "--target",
        "a red circle on water",
        "--steps",
        2,
        "--preset",
        preset,
        "--device",
        "cpu",
    )
    command("edit", *words, "--chunk-frames", 4, "-o", "one.mp4", threads=1)
    done = subprocess.run(
        [*LAUNCHED, "edit", *map(str, words), "-o", "two.mp4"],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to two.mp4") == 1, "only one process prints and writes"
    assert frames_written(tmp_path / "one.mp4") == frames_written(tmp_path / "two.mp4")
    assert json.loads(read_metadata(tmp_path / "two.mp4")["fatezero"])["chunk_frames"] == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_two_processes_share_the_windows_of_a_transformer(command, tmp_path):
    """Killed in the edit, they continue to the frames of one process."""
    words = ("edit", CLIP, "--model", "demo-wan", "--source", SOURCE, "--target", "a blue square on water")
    words += ("--steps", 4, "--device", "cpu", "--window-frames", 4, "--window-overlap", 2)
    assert "3 windows of 4 latents" in command(*words, "--dry-run", "-o", "one.mp4")
    command(*words, "-o", "one.mp4", threads=1)
    both = [*LAUNCHED, *map(str, words), "-o", "two.mp4"]
    run = subprocess.Popen(both, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "two.mp4.state" / "edit.safetensors").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=True)
    for pid in [run.pid, *map(int, workers.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    run.communicate()
    done = subprocess.run([*both, "--resume"], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "invert 1/4" not in done.stdout + done.stderr
    assert frames_written(tmp_path / "one.mp4") == frames_written(tmp_path / "two.mp4")
    assert not (tmp_path / "two.mp4.state").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "demo-wan"), "windows shorter than the clip's 8 latents"),
        (("--key-frames", "previous"), "give --window-frames"),
        (("--memory", "maps"), "memory maps needs one process"),
        (("--preset", "tokenflow"), "TokenFlow and layouts run in one process"),
    ],
)
def test_what_several_processes_cannot_share(refused, monkeypatch, options, message):
    monkeypatch.setattr("fatezero.cli.commands.edit.team_of", lambda session: (session, _Two()))
    words = ("--source", SOURCE, "--target", "x", "--steps", 2)
    assert message in refused("edit", CLIP, *words, *options, "-o", "o.mp4")


class _Two:
    count, is_main = 2, True
