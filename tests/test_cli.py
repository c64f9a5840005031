"""The command line as a user runs it: its own process, real files, the bundled model."""

import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fatezero.attention.store import AttentionStore
from fatezero.cli import main
from fatezero.demo.show import CLIP
from fatezero.video.read import Sound, read_video
from fatezero.video.write import write_video

SOURCE, TARGET = "a red square on water", "a green square on water"
WORDS = ("--source", SOURCE, "--target", TARGET)
COMMAND = (sys.executable, "-m", "fatezero")


def fatezero(*arguments, cwd, code=0, **options):
    """Run the command line in a folder; its output. The exit status must be `code`."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Run the command line in this process and in the test's folder: what it says as it ends with status 1."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fatezero", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        said = "".join(capfd.readouterr())
        assert "Traceback" not in said
        return said.replace("\n", " ")

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of two steps of the bundled clip."""
    folder = tmp_path_factory.mktemp("store")
    fatezero(
        "invert", CLIP, "--source", SOURCE, "--steps", 2, "--memory", "queries_keys", "-o", "s.safetensors", cwd=folder
    )
    return folder / "s.safetensors"


def test_edit_keeps_frames_rate_and_sound(tmp_path):
    wave = 0.3 * np.sin(np.arange(48000) / 20)[None].repeat(2, 0).astype(np.float32)
    write_video(tmp_path / "in.mp4", read_video(CLIP).frames, Fraction(8), Sound(wave, 48000))
    fatezero("edit", "in.mp4", *WORDS, "--steps", 2, "-o", "out.mp4", cwd=tmp_path)
    edited = read_video(tmp_path / "out.mp4")
    assert edited.frames.shape == (8, 64, 64, 3)
    assert edited.fps == 8
    assert edited.sound is not None
    assert edited.sound.samples.shape == (2, 48000)


def test_a_picture_and_odd_sizes(tmp_path):
    Image.fromarray(read_video(CLIP).frames[0].numpy()).resize((65, 131)).save(tmp_path / "in.png")
    fatezero("edit", "in.png", *WORDS, "--steps", 1, "-o", "out.png", cwd=tmp_path)
    assert Image.open(tmp_path / "out.png").size == (64, 128)
    said = fatezero("edit", "in.png", *WORDS, "--size", "65x64", "-o", "o.png", cwd=tmp_path, code=1)
    assert "size 65x64: both sides must be multiples of 4" in said


def test_a_store_serves_many_edits(store, tmp_path):
    for preset, target in (("attribute", TARGET), ("shape", "a red circle on water")):
        fatezero("edit", "--store", store, "--target", target, "--preset", preset, "-o", f"{preset}.mp4", cwd=tmp_path)
        assert read_video(tmp_path / f"{preset}.mp4").frames.shape == (8, 64, 64, 3)
    loaded = AttentionStore.load(store)
    assert (loaded.steps, loaded.prompt, loaded.memory) == (2, SOURCE, "queries_keys")


def test_a_config_of_several_prompts_shares_one_inversion(tmp_path):
    config = {
        "pretrained_model_path": "demo",
        "dataset_config": {"path": str(CLIP), "prompt": SOURCE, "n_sample_frame": 2},
        "editing_config": {
            "editing_prompts": [SOURCE, TARGET],
            "p2p_config": {0: {"is_replace_controller": False}, 1: {"is_replace_controller": True}},
            "num_inference_steps": 2,
        },
        "model_config": {"SparseCausalAttention_index": ["mid"]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    said = fatezero("edit", "--config", "c.yaml", "--size", "64x64", "-o", "out.mp4", cwd=tmp_path)
    assert said.count("invert 2/2") == 1
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["out_0.mp4", "out_1.mp4"]


def test_several_targets_are_edited_in_one_pass_over_a_store_on_disk(tmp_path):
    budget = (
        "--memory",
        "auto",
        "--budget-gb",
        "1",
        "--place",
        "disk",
        "--keep-steps",
        "0.8",
        "--precision",
        "float16",
    )
    said = fatezero(
        "edit", CLIP, *WORDS, "--target", "a blue square on water", *budget, "--steps", "5", "--count", "3",
        "--chunk-frames", "2", "-o", "out.mp4", cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r"store: queries_keys on disk in \S+, 6\.", said)
    assert "UNet calls: 5 to invert, 20 for 2 edit(s)" in said
    assert "2 edits in one pass" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out_0.mp4", "out_1.mp4"]


def test_an_inversion_is_written_as_it_runs_in_any_memory(tmp_path):
    said = fatezero(
        "invert", CLIP, "--source", SOURCE, "--memory", "auto", "--steps", "3", "--count", "2", "-o", "s.safetensors",
        cwd=tmp_path,
    )  # fmt: skip
    assert "store: queries_keys on disk in " in said
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert AttentionStore.load(tmp_path / "s.safetensors").kept_steps == 3


def test_a_missing_video_ends_the_process_with_one_line(tmp_path):
    said = fatezero("edit", "missing.mp4", *WORDS, cwd=tmp_path, code=1)
    assert said.strip() == "error: no video at missing.mp4"


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path):
    chunks = ("--clip-norm", "--chunk-frames", "4")
    said = fatezero("edit", CLIP, *WORDS, "--preset", "shape", *chunks, "--dry-run", cwd=tmp_path)
    assert "chunks approximate the whole clip" in said
    assert "8 frames of 64x64, 50 steps" in said
    assert "-> store with memory recompute: 1." in said
    assert "   store: recompute in RAM, 1." in said
    assert "UNet calls: 50 to invert, 100 for 1 edit(s), 25 for the source beside" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4", *WORDS], "no video at missing.mp4"),
        (["empty.mp4", *WORDS], "empty.mp4 is empty"),
        (["text.mp4", *WORDS], "text.mp4 is not a readable video"),
        ([CLIP, "--source", SOURCE], "missing --target"),
        ([CLIP, *WORDS, "--place", "cloud"], "place is 'cloud'; it must be one of auto, device, ram, disk"),
        (
            [CLIP, *WORDS, "--memory", "maps", "--budget-gb", "0.1"],
            "maps takes 6.46 GB of budget_gb 0.1. Needed by each: recompute",
        ),
        (["--source", SOURCE, "--target", TARGET], "missing VIDEO"),
        ([CLIP, *WORDS, "--count", 9], "gives 8 frames from 0 in steps of 1, but 9 are needed"),
        ([CLIP, *WORDS, "--crop", "200,0,200,0"], "does not fit 256x256"),
        ([CLIP, *WORDS, "--crop", "1,2"], "crop is '1,2'"),
        ([CLIP, *WORDS, "--size", "64"], "size is '64'"),
        ([CLIP, *WORDS, "--reweight", "jeep=2"], "reweight: 'jeep' is not in the prompt"),
        ([CLIP, *WORDS, "--reweight", "green"], "reweight is 'green'"),
        ([CLIP, "--source", SOURCE, "--target", "a square", "--mode", "replace"], "5 words and the target 2"),
        ([CLIP, *WORDS, "--preset", "cubism"], "preset 'cubism' is unknown"),
        ([CLIP, *WORDS, "--memory", "disk"], "memory is 'disk'"),
        ([CLIP, *WORDS, "--key-frames", "centre"], "'centre'"),
        ([CLIP, *WORDS, "--model", "nowhere/"], "nowhere"),
        ([CLIP, *WORDS, "--model", "text.safetensors"], "text.safetensors"),
        ([CLIP, *WORDS, "--model", "model.ckpt"], "pickled checkpoints are not read"),
        ([CLIP, *WORDS, "--device", "cuda:99"], "cuda:99"),
        ([CLIP, *WORDS, "-o", "out.wmv"], "cannot write 8 frames to 'out.wmv'"),
        ([CLIP, *WORDS, "-o", "out.png"], "cannot write 8 frames to the one picture out.png: take a folder (out/)"),
        ([CLIP, *WORDS, "--config", "none.yaml"], "no configuration at none.yaml"),
        ([CLIP, *WORDS, "--steps", 0], "steps is 0"),
        ([CLIP, *WORDS, "--self-replace-steps", 1.5], "self_replace_steps is 1.5"),
        (["--store", "none.safetensors", "--target", TARGET], "no store at none.safetensors"),
        (["--store", "text.safetensors", "--target", TARGET], "not a whole store"),
    ],
)
def test_bad_input_is_told_in_one_line(refused, tmp_path, arguments, message):
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "text.safetensors", "model.ckpt"):
        (tmp_path / name).write_text("hello " * 50)
    before = sorted(tmp_path.iterdir())
    assert message in refused("edit", *arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 5], "made with steps 2, not 5"),
        (["--source", "a blue square on water"], "made with source 'a red square on water'"),
        (["--memory", "maps"], "made with memory 'queries_keys'"),
    ],
)
def test_a_store_that_says_otherwise_is_refused(refused, store, arguments, message):
    assert message in refused("edit", "--store", store, "--target", TARGET, *arguments)


def test_a_video_of_other_length_beside_a_store_is_refused(refused, store, tmp_path):
    write_video(tmp_path / "short.mp4", read_video(CLIP).frames[:3], Fraction(8))
    assert "gives 3 frames" in refused("edit", "short.mp4", "--store", store, "--target", TARGET)


def test_a_truncated_store_is_refused(refused, store, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(store.read_bytes()[:-1000])
    assert "not a whole store" in refused("edit", "--store", "cut.safetensors", "--target", TARGET)


def _hear_interrupts():
    """Tests that a shell runs in the background are deaf to them, and so are their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file size limits")
@pytest.mark.parametrize("command", ["edit", "invert"])
def test_ctrl_c_exits_130_and_leaves_no_file(tmp_path, command):
    arguments = ["edit", CLIP, *WORDS] if command == "edit" else ["invert", CLIP, "--source", SOURCE]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--steps", "900"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1"},  # so that bars are drawn as they move
        preexec_fn=_hear_interrupts,
    )
    seen = ""
    assert process.stdout is not None
    while "invert" not in seen.split("UNet calls")[-1].split("to invert")[-1]:
        piece = process.stdout.read(1)
        assert piece, "ended before it could be interrupted: " + seen
        seen += piece
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def _limit_file_size():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file size limits")
def test_a_full_disk_is_told_and_leaves_no_half_written_file(tmp_path):
    edit = ["edit", CLIP, *WORDS, "--steps", 1, "-o", "out.mp4"]
    invert = ["invert", CLIP, "--source", SOURCE, "--steps", 1, "-o", "s.safetensors"]
    for arguments in (edit, invert):
        said = fatezero(*arguments, cwd=tmp_path, code=1, preexec_fn=_limit_file_size)
        assert "could not" in said.replace("\n", " ")
        assert list(tmp_path.iterdir()) == []


def test_the_package_imports_without_torch_as_a_folder_with_dashes(tmp_path):
    """What ComfyUI does: load the folder by path, under a name that is no identifier."""
    root = Path(__file__).resolve().parent.parent
    (tmp_path / "fate-zero.nodes").symlink_to(root)
    code = f"""
import importlib.util, sys
folder = {str(tmp_path / "fate-zero.nodes")!r}
spec = importlib.util.spec_from_file_location(folder, folder + "/__init__.py", submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules[folder] = module
spec.loader.exec_module(module)
assert "torch" not in sys.modules
assert module.FusionSettings().cross_replace_steps == 0.8
assert "fatezero" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    assert torch.__version__
