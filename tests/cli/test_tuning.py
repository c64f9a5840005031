"""`fatezero tune`: files, refusals, resuming after a kill, several processes."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import COMMAND, alike, here
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.temporal import temporal_layers
from fatezero.video.read import read_video

TARGET = "a green square on water"
PROMPT = ("--prompt", "a red square on water")
TUNE = ("tune", CLIP, *PROMPT, "--count", 2, "--learning-rate", 0.003)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The output folder of three steps, with the whole model next to it."""
    folder = tmp_path_factory.mktemp("tuned")
    output = here(*TUNE, "--steps", 3, "--folder", "-o", "mine", cwd=folder)
    assert "467,648 trained numbers" in output and "activations of a step" in output
    assert "tune 3/3, loss 0." in output
    assert "--temporal mine --key-frames first,previous --clip-norm" in output
    return folder / "mine"


def test_a_tuning_writes_layers_losses_a_plot_and_a_state(tuned):
    assert {"temporal.safetensors", "state.safetensors", "loss.csv", "loss.png"} <= {p.name for p in tuned.iterdir()}
    rows = (tuned / "loss.csv").read_text().split()
    assert rows[0] == "step,loss" and [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]
    with safe_open(tuned / "temporal.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["key_frames"] == "first, previous" and about["clip_norm"] == "true" and about["steps"] == "3"


def test_the_folder_and_the_file_are_the_same_model(tuned):
    whole, part = Checkpoint.load(str(tuned)), Checkpoint.load("demo", temporal=str(tuned))
    assert temporal_layers(whole.unet) is not None
    ours, theirs = whole.unet.state_dict(), part.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tuned / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel"


def test_edits_with_it(command, tuned, tmp_path):
    part = ("edit", CLIP, "--target", TARGET, "--steps", 2, "--count", 2)
    output = command(*part, "--preset", "tune_a_video", "--temporal", tuned, "-o", "file.mp4")
    assert "were tuned with" not in output
    command(*part, "--preset", "tune_a_video", "--model", tuned, "-o", "folder.mp4")
    command(*part, "--preset", "tune_a_video", "-o", "base.mp4")
    file, folder, base = (read_video(tmp_path / f"{name}.mp4").frames for name in ("file", "folder", "base"))
    assert alike(file, folder) and not alike(file, base)
    output = command(*part, *("--source", "a red square on water"), "--temporal", tuned, "-o", "fused.mp4", "--dry-run")
    text = " ".join(output.split())
    assert "tuned with key_frames first, previous, not self, middle; clip_norm true, not false" in text
    output = command(*part, "--preset", "tune_a_video", "--temporal", tuned, "-o", "c.mp4", "--dry-run")
    assert "approximate" not in output


def test_a_source_is_needed_only_for_fusion(refused, command, tmp_path):
    part = ("edit", CLIP, "--target", TARGET, "--steps", 1, "--count", 2, "-o", "x.mp4", "--dry-run")
    assert "missing --source" in refused(*part)
    command(*part, "--preset", "pnp")


def test_convolutions_class_pictures_and_validation(command, tmp_path):
    """Class pictures may differ in size; clips are named by step and prompt."""
    (tmp_path / "squares").mkdir()
    for number, size in enumerate([(64, 64), (80, 60), (70, 96)]):
        Image.new("RGB", size, (40 * number, 90, 0)).save(tmp_path / "squares" / f"{number}.png")
    layers = ("--layers", "fatezero", "--rank", 4)
    more = ("--train-convolutions", "--class-pictures", "squares", "--class-batch", 1)
    clips = ("--validate", "a red circle on water", "--validate", TARGET, "--validate-every", 2, "--validate-steps", 2)
    output = command(*TUNE, *layers, *more, *clips, "--steps", 3, "-o", "all")
    assert "class pictures: 3" in output and "validation: 2 clips after 2 steps" in output
    assert {path.name for path in (tmp_path / "all" / "validation").iterdir()} == {
        f"step_{step}_{number}.mp4" for step in (2, 3) for number in (1, 2)
    }
    assert read_video(tmp_path / "all" / "validation" / "step_3_1.mp4").frames.shape == (2, 64, 64, 3)
    weights = load_file(tmp_path / "all" / "temporal.safetensors")
    assert any(weight.any() for name, weight in weights.items() if name.endswith("conv_temporal.up.weight"))
    output = command(*TUNE, *layers, "--steps", 3, "-o", "none", "--dry-run")
    assert "have no effect untrained" in " ".join(output.split())


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_result(command, tmp_path):
    part = (*TUNE, "--keep-every", 1, "--steps")
    begun = [*COMMAND, *map(str, part), "400", "-o", "stopped"]
    run = subprocess.Popen(begun, cwd=tmp_path, stdout=subprocess.DEVNULL)
    state = tmp_path / "stopped" / "state.safetensors"
    while not state.exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    steps = len(load_file(state)["losses"]) + 2
    assert not (tmp_path / "stopped" / "temporal.safetensors").exists()
    command(*part, steps, "-o", "stopped", "--resume")
    command(*part, steps, "-o", "whole")
    ours, theirs = (load_file(tmp_path / name / "temporal.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_refusals(refused, tuned, tmp_path):
    assert "missing --prompt" in refused("tune", CLIP)
    assert "missing VIDEO" in refused("tune", *PROMPT)
    assert "exists" in refused(*TUNE, "--steps", 1, "-o", tuned)
    assert "nothing to resume" in refused(*TUNE, "--resume", "-o", "new")
    assert "has done 3 steps: give more with --steps" in refused(*TUNE, "--steps", 3, "--resume", "-o", tuned)
    output = refused("tune", CLIP, *PROMPT, "--count", 2, "--steps", 9, "--resume", "-o", tuned)
    assert "started with learning_rate 0.003, not 3e-05" in output
    assert "rank has no effect" in refused(*TUNE, "--rank", 4)
    assert "without --layers fatezero" in refused(*TUNE, "--train-convolutions")
    assert "without --class-pictures" in refused(*TUNE, "--class-prompt", "a square")
    assert "missing --validate-every" in refused(*TUNE, "--validate", "a circle")
    assert "missing --validate:" in refused(*TUNE, "--validate-every", 2)
    assert "class_pictures" in refused(*TUNE, "--class-pictures", "nowhere")
    assert "no effect on temporal layers from a file" in refused(*TUNE, "--temporal", tuned, "--layers", "fatezero")
    assert "steps is 0; it must be between 1 and 100000" in refused(*TUNE, "--steps", 0)
    assert "keep_every is 0" in refused(*TUNE, "--keep-every", 0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "state.safetensors").write_text("no tensors")
    assert "not the state of a tuning" in refused(*TUNE, "--resume", "-o", "bad")
    assert "needs bitsandbytes" in refused(*TUNE, "--steps", 1, "--optimizer", "adamw8bit", "-o", "new")


@pytest.mark.slow
def test_two_processes_tune_and_one_of_them_writes(tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fatezero")
    part = (*map(str, TUNE), "--steps", "2", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, *launch, *part, "-o", "two"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("temporal layers written to") == 1
    assert "2 processes with different samples" in done.stdout
    assert load_file(tmp_path / "two" / "state.safetensors")["losses"].shape == (2,)
