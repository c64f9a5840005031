"""A killed run continues with `--resume`, and a batch by itself, to the same frames."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fatezero.files.bundled import CLIP
from tests.commands import COMMAND, fatezero, frames_written

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SOURCE, TARGET = "a red square on water", "a blue square on water"
EDIT = ("edit", CLIP, "--source", SOURCE, "--steps", 8, "--count", 2, "-o", "out.mp4", "--target")


def killed(folder: Path, state: str, *arguments) -> None:
    """Kill a run as soon as it has written a state. state: a pattern of its file."""
    run = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    while not list(folder.glob(state)):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of the frames of an edit that runs through."""
    folder = tmp_path_factory.mktemp("whole")
    fatezero(*EDIT, TARGET, cwd=folder, env=ONE_THREAD)
    assert not (folder / "out.mp4.state").exists()
    return frames_written(folder / "out.mp4")


@pytest.mark.parametrize("state", ["latents.0004", "edit"])
def test_a_killed_edit_continues_from_its_last_step(tmp_path, whole, state):
    killed(tmp_path, f"out.mp4.state/{state}.safetensors", *EDIT, TARGET)
    other = fatezero(*EDIT, "a green square on water", "--resume", cwd=tmp_path, code=1)
    assert "state of another run" in other and "target" in other
    output = fatezero(*EDIT, TARGET, "--resume", cwd=tmp_path, env=ONE_THREAD)
    assert f"{'edit' if state == 'edit' else 'invert'} 1/8" not in output
    assert frames_written(tmp_path / "out.mp4") == whole
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"out.mp4", "out.mp4.json"}


def test_without_resume_a_run_starts_over(tmp_path):
    state = tmp_path / "out.mp4.state"
    invert = ("invert", CLIP, "--source", SOURCE, "--steps", 3, "--count", 1, "-o", "out.mp4")
    state.mkdir()
    (state / "run.json").write_text(json.dumps({"steps": 900}))
    assert "starts over" in fatezero(*invert, cwd=tmp_path)
    assert not state.exists()
    assert "nothing to resume" in fatezero(*invert, "--overwrite", "--resume", cwd=tmp_path)


@pytest.mark.slow
def test_a_killed_batch_continues_its_job(tmp_path, whole):
    values = {"video": str(CLIP), "source": SOURCE, "target": TARGET, "steps": 8, "count": 2}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [values]}))
    batch = ("batch", "jobs.yaml", "--no-measure", "--workers", 2)  # one thread for each
    killed(tmp_path, "jobs/*.mp4.state/edit.safetensors", *batch)
    (state,) = (tmp_path / "jobs").glob("*.state")
    fatezero(*batch, cwd=tmp_path, env=ONE_THREAD)
    assert frames_written(state.with_suffix("")) == whole
    assert not state.exists()
