"""The command line in its own process, with real files and the bundled model."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import COMMAND, alike, fatezero, here
from PIL import Image

from clips import beep_times, flashes
from fatezero.files.bundled import CLIP, DEMO
from fatezero.hosts.diffusers import with_temporal_layers
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.temporal import save_temporal_layers, temporal_layers
from fatezero.store.store import AttentionStore
from fatezero.video.read import Sound, read_video
from fatezero.video.write import write_video

SOURCE, TARGET = "a red square on water", "a green square on water"
WORDS = ("--source", SOURCE, "--target", TARGET)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of two steps of the bundled clip."""
    folder = tmp_path_factory.mktemp("store")
    here(
        "invert", CLIP, "--source", SOURCE, "--steps", 2, "--memory", "queries_keys", "-o", "s.safetensors", cwd=folder
    )
    return folder / "s.safetensors"


def test_edit_keeps_frames_rate_and_sound(command, tmp_path):
    wave = 0.3 * np.sin(np.arange(48000) / 20)[None].repeat(2, 0).astype(np.float32)
    write_video(tmp_path / "in.mp4", read_video(CLIP).frames, Fraction(8), Sound(wave, 48000))
    command("edit", "in.mp4", *WORDS, "--steps", 2, "-o", "out.mp4")
    edited = read_video(tmp_path / "out.mp4")
    assert edited.frames.shape == (8, 64, 64, 3)
    assert edited.fps == 8
    assert edited.sound is not None
    assert edited.sound.samples.shape == (2, 48000)


def test_a_picture_and_odd_sizes(command, tmp_path):
    Image.fromarray(read_video(CLIP).frames[0].numpy()).resize((65, 131)).save(tmp_path / "in.png")
    command("edit", "in.png", *WORDS, "--steps", 1, "-o", "out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 128)
    output = command("edit", "in.png", *WORDS, "--size", "65x64", "-o", "o.png", code=1)
    assert "size 65x64: both sides must be multiples of 4" in output


def test_a_store_is_used_by_several_edits(command, store, tmp_path):
    for preset, target in (("attribute", TARGET), ("shape", "a red circle on water")):
        command("edit", "--store", store, "--target", target, "--preset", preset, "-o", f"{preset}.mp4")
        assert read_video(tmp_path / f"{preset}.mp4").frames.shape == (8, 64, 64, 3)
    loaded = AttentionStore.load(store)
    assert (loaded.steps, loaded.prompt, loaded.memory) == (2, SOURCE, "queries_keys")


def test_a_config_of_several_prompts_shares_one_inversion(command, tmp_path):
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
    output = command("edit", "--config", "c.yaml", "--size", "64x64", "-o", "out.mp4")
    assert output.count("invert 2/2") == 1
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["out_0.mp4", "out_1.mp4"]


def test_a_video_that_is_not_the_stores_is_noted(command, store, tmp_path):
    (tmp_path / "other.mp4").write_bytes(Path(CLIP).read_bytes() + bytes(8))
    run = ("--store", store, "--target", TARGET, "--preset", "style", "-o", "a.mp4", "--dry-run")
    assert "is not the file" not in command("edit", CLIP, *run)
    assert f"is not the file {Path(CLIP).name} that was inverted" in " ".join(
        command("edit", "other.mp4", *run).split()
    )


def test_pictures_of_an_earlier_edit_do_not_become_part_of_a_shorter_one(refused, tmp_path):
    (tmp_path / "seq").mkdir()
    for i in range(4):
        (tmp_path / "seq" / f"{i:05d}.png").touch()
    error = refused("edit", CLIP, *WORDS, "--count", 2, "-o", "seq/", "--overwrite", "--model", "missing/model")
    assert "00002.png is there already and would follow the 2 pictures" in error


def test_several_targets_are_edited_in_one_pass_over_a_store_on_disk(command, tmp_path):
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
    output = command(
        "edit", CLIP, *WORDS, "--target", "a blue square on water", *budget, "--steps", "5", "--count", "3",
        "--chunk-frames", "2", "-o", "out.mp4",
    )  # fmt: skip
    assert re.search(r"store: queries_keys on disk in \S+, 6\.", output)
    assert "UNet calls: 5 for the inversion, 20 for the 2 edits" in output
    assert "2 edits in one pass" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out_{i}.mp4{end}" for i in (0, 1) for end in ("", ".json")]


def test_an_inversion_is_written_as_it_runs_in_any_memory(command, tmp_path):
    output = command(
        "invert", CLIP, "--source", SOURCE, "--memory", "auto", "--steps", "3", "--count", "2", "-o", "s.safetensors",

    )  # fmt: skip
    assert "store: queries_keys on disk in " in output
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert AttentionStore.load(tmp_path / "s.safetensors").kept_steps == 3


def test_a_missing_video_gives_one_line(command):
    assert command("edit", "missing.mp4", *WORDS, code=1).strip() == "error: no video at missing.mp4"


def test_a_dry_run_prints_the_plan_and_writes_nothing(command, tmp_path):
    chunks = ("--clip-norm", "--chunk-frames", "4")
    output = command("edit", CLIP, *WORDS, "--preset", "shape", *chunks, "--dry-run")
    assert "approximate the whole clip" in output
    assert "8 frames of 64x64, 50 steps" in output
    assert "-> store with memory recompute: 1." in output
    assert "   store: recompute in RAM, 1." in output
    assert "UNet calls: 50 for the inversion, 100 for the edit, 25 for the source" in output
    assert "1.75 times plain sampling (100 calls): inversion 0.50, edit 1.00, source 0.25" in output
    assert "latents of all levels, in every store, and on disk until the output is written" in output
    assert "latents of the clip: " in command("edit", CLIP, *WORDS, "--preset", "flow_edit", "--dry-run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4", *WORDS], "no video at missing.mp4"),
        (["empty.mp4", *WORDS], "empty.mp4 is empty"),
        (["text.mp4", *WORDS], "text.mp4 is not a readable video"),
        ([CLIP, "--source", SOURCE], "missing --target"),
        ([CLIP, *WORDS, "--place", "cloud"], "place is 'cloud'"),
        (
            [CLIP, *WORDS, "--memory", "maps", "--budget-gb", "0.1"],
            "maps takes 6.46 GB of budget_gb 0.1. Sizes: recompute",
        ),
        (["--source", SOURCE, "--target", TARGET], "missing VIDEO"),
        ([CLIP, *WORDS, "--count", 9], "has 8 frames"),
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
        ([CLIP, *WORDS, "--model", "model.ckpt"], "pickled checkpoints are not supported"),
        ([CLIP, *WORDS, "--device", "cuda:99"], "cuda:99"),
        ([CLIP, *WORDS, "-o", "out.wmv"], "cannot write 8 frames to 'out.wmv'"),
        ([CLIP, *WORDS, "-o", "out.png"], "to a single picture out.png"),
        ([CLIP, *WORDS, "--config", "none.yaml"], "no configuration at none.yaml"),
        ([CLIP, *WORDS, "--steps", 0], "steps is 0"),
        ([CLIP, *WORDS, "--steps", 1000, "--dry-run"], "steps is 1000"),
        ([CLIP, *WORDS, "--self-replace-steps", 1.5], "self_replace_steps is 1.5"),
        ([CLIP, *WORDS, "--guidance-scale", "nan"], "guidance_scale is nan; it must be a finite number"),
        ([CLIP, *WORDS, "--guidance-scale", "inf"], "guidance_scale is inf; it must be a finite number"),
        ([CLIP, *WORDS, "--guidance-scale", "1e30"], "guidance_scale is 1e+30; it must be between 1 and 100"),
        ([CLIP, *WORDS, "--smoothing", "2"], "smoothing is 2.0; it must be between 0 and 1"),
        ([CLIP, *WORDS, "--strength", "0", "--model", "nowhere/"], "strength is 0.0"),
        ([CLIP, *WORDS, "--steps", "2.5"], "--steps is '2.5'; it must be a whole number"),
        ([CLIP, *WORDS, "--reweight", "jeep=2", "--model", "nowhere/"], "reweight: 'jeep' is not in the prompt"),
        ([CLIP, *WORDS, "--box", "green", "--model", "nowhere/"], "box 'green': layout 'green' must start with"),
        ([CLIP, *WORDS, "--shift", "jeep: 0:0.1,0", "--model", "nowhere/"], "'jeep' is not in the prompt"),
        ([CLIP, *WORDS, "--mask", "green: none.mp4", "--model", "nowhere/"], "no video at none.mp4"),
        ([CLIP, *WORDS, "--size", f"{2**64}x64"], "a list of 2"),
        ([CLIP, *WORDS, "--device", "meta"], "device 'meta' cannot be used"),
        (
            [CLIP, *WORDS, "--preset", "flow_edit", "--flow-edit.seed", 2**70],
            "flow_edit.seed is 1180591620717411303424",
        ),
        (
            [CLIP, *WORDS, "--preset", "wan_edit", "--flow-edit.n-min", 8, "--steps", 10],
            "n_min is 8, but the edit runs only 7",
        ),
        ([CLIP, "--source", SOURCE, "--target", "half a \ud83d"], "target is 'half a \\ud83d'"),
        ([CLIP, *WORDS, "--reweight", "green=nan"], "reweight is {'green': nan}"),
        ([CLIP, *WORDS, "--reweight", "green=1e30", "--steps", 1, "-o", "x.mp4"], "are not finite"),
        ([CLIP, *WORDS, "--blend-threshold", "nan"], "blend_threshold is nan"),
        ([CLIP, *WORDS, "--budget-gb", "nan"], "budget_gb is nan"),
        ([CLIP, *WORDS, "--keep-steps", "0.5"], "keep_steps has no effect here: memory recompute"),
        ([CLIP, *WORDS, "--blend-threshold", "0.5"], "blend_threshold has no effect here: nothing is blended"),
        ([CLIP, *WORDS, "--blend-latents-until", "0.5"], "blend_latents_until has no effect here"),
        ([CLIP, *WORDS, "--pnp.feature-steps", "0.5"], "pnp has no effect here: injection is not pnp"),
        ([CLIP, *WORDS, "--tokenflow.seed", "1"], "tokenflow has no effect here"),
        ([CLIP, *WORDS, "--injection", "pnp", "--blend-latents"], "blend_latents has no effect here: injection is not"),
        ([CLIP, *WORDS, "--injection", "magic"], "injection is 'magic'; it must be one of fatezero"),
        ([CLIP, *WORDS, "--tokenflow.weights", "even"], "tokenflow.weights is 'even'; it must be one of authors"),
        ([CLIP, *WORDS, "--tokenflow.batch-frames", "0"], "tokenflow.batch_frames is 0; it must be a number of at"),
        ([CLIP, *WORDS, "--steps", "many"], "many"),
        ([CLIP, *WORDS, "--stepps", "4"], "stepps"),
        ([CLIP, "second.mp4", *WORDS], "second.mp4"),
        ([CLIP, *WORDS, "--negative", "blur", "--guidance-scale", 1], "negative has no effect here"),
        ([CLIP, *WORDS, "--model-config", "."], "model_config has no effect"),
        ([CLIP, "--source", " ", "--target", TARGET], "source is ' '; it must not be blank"),
        ([CLIP, *WORDS, "--lora", "nowhere"], "no LoRA at nowhere"),
        ([CLIP, *WORDS, "--start", "soon"], "start: invalid time 'soon'"),
        ([CLIP, *WORDS, "--start", "9s"], "no frame from 9s on"),
        ([CLIP, *WORDS, "--fps", 0], "fps is 0"),
        ([CLIP, *WORDS, "--size", "100000x100000"], "GB of memory, and"),
        ([CLIP, *WORDS, "-o", "there.mp4"], "there.mp4 exists; give --overwrite"),
        ([CLIP, *WORDS, "-o", "there.mp4/x.mp4"], "cannot write there.mp4/x.mp4"),
        ([CLIP, *WORDS, "-o", f"{'x' * 300}.mp4"], "is too long: give a shorter one"),
        (["there.mp4", *WORDS, "-o", "there.mp4", "--overwrite"], "there.mp4 is an input of this run"),
        ([CLIP, *WORDS, "--model", "no-tokenizer"], "no-tokenizer has no"),
        (["--store", "none.safetensors", "--target", TARGET], "no store at none.safetensors"),
        (["--store", "text.safetensors", "--target", TARGET], "is damaged"),
    ],
)
def test_bad_input_gives_one_line(refused, tmp_path, arguments, message):
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "text.safetensors", "model.ckpt"):
        (tmp_path / name).write_text("hello " * 50)
    shutil.copy(CLIP, tmp_path / "there.mp4")
    if "no-tokenizer" in arguments:
        shutil.copytree(DEMO, tmp_path / "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer"))
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
def test_options_that_contradict_the_store_are_refused(refused, store, arguments, message):
    assert message in refused("edit", "--store", store, "--target", TARGET, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32x32"], "made with size None, not (32, 32)"),
        (["--count", 3], "made with count None, not 3"),
        (["--start", 1], "made with start 0, not 1"),
        (["--fps", 30], "made with fps None, not 30"),
        (["--keep-steps", 0.5], "made with keep_steps 1.0, not 0.5"),
        (["--place", "disk"], "place has no effect on an existing store"),
        (["--budget-gb", 5], "budget_gb has no effect on an existing store"),
    ],
)
def test_options_without_effect_on_a_store_are_refused(refused, store, arguments, message):
    assert message in refused("edit", "--store", store, "--target", TARGET, *arguments)


def test_a_video_of_another_length_than_the_store_is_refused(refused, store, tmp_path):
    write_video(tmp_path / "short.mp4", read_video(CLIP).frames[:3], Fraction(8))
    assert "has 3 frames" in refused("edit", "short.mp4", "--store", store, "--target", TARGET)


def test_a_truncated_store_is_refused(refused, store, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(store.read_bytes()[:-1000])
    assert "is damaged" in refused("edit", "--store", "cut.safetensors", "--target", TARGET)


def _restore_signals():
    """Restore signal handlers, which background jobs of a shell ignore together with their children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


OFTEN = {("edit", signal.SIGTERM)}


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file size limits")
@pytest.mark.parametrize(
    ("command", "ended_by"),
    [
        pytest.param(command, number, marks=[] if (command, number) in OFTEN else pytest.mark.slow)
        for command in ("edit", "invert")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ],
)
def test_signals_end_with_their_status_and_leave_no_file(tmp_path, command, ended_by):
    arguments = ["edit", CLIP, *WORDS, "--place", "disk"] if command == "edit" else ["invert", CLIP, *WORDS[:2]]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--memory", "queries_keys", "--steps", "900"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=_restore_signals,
    )
    assert process.stdout is not None
    while "invert 1/" not in (line := process.stdout.readline()):
        assert line, "ended before it could be interrupted"
    assert list(tmp_path.rglob("*.partial")), "the store is being written"
    process.send_signal(ended_by)
    _, errors = process.communicate()
    assert process.returncode == 128 + ended_by
    assert "nothing half-written is left" in errors
    assert "Traceback" not in errors
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.name.startswith("fatezero")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_the_next_start_removes_the_temporary_stores_of_dead_processes(command, tmp_path, monkeypatch):
    for name in ("fatezero-dead", "fatezero-alive", "other-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.safetensors").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock = os.open(tmp_path / "fatezero-alive", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    command("edit", CLIP, *WORDS, "--dry-run")
    os.close(lock)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fatezero-alive", "other-dead"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file size limits")
@pytest.mark.parametrize(("by", "message"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_a_signal_during_loading_ends_it_with_one_line(tmp_path, by, message):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "fatezero", "edit", CLIP, *WORDS], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_restore_signals,
    )  # fmt: skip
    assert process.stderr is not None
    while "cyclopts" not in (line := process.stderr.readline()):  # the import log has a line when an import ends
        assert line, "ended before it could be interrupted"
    process.send_signal(by)
    errors = [line for line in process.communicate()[1].splitlines() if not line.startswith("import time:")]
    assert (process.returncode, errors) == (128 + by, [f"{message}; nothing half-written is left"])


def _limit_file_size(most=2000):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file size limits")
@pytest.mark.slow
def test_a_full_disk_gives_an_error_and_no_partial_file(tmp_path):
    edit = ["edit", CLIP, *WORDS, "--steps", 1, "-o", "out.mp4"]
    invert = ["invert", CLIP, "--source", SOURCE, "--steps", 1, "-o", "s.safetensors"]
    for arguments in (edit, invert):
        output = fatezero(*arguments, cwd=tmp_path, code=1, preexec_fn=_limit_file_size)
        assert "could not" in output.replace("\n", " ")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_record_that_cannot_be_written_is_named_and_the_result_kept(tmp_path):
    long = ("--negative", "blur" + 20_000 * " ")  # for which a GIF has no metadata
    arguments = ["edit", CLIP, *WORDS, "--steps", 1, "--count", 1, *long, "-o", "out.gif"]
    output = fatezero(*arguments, cwd=tmp_path, code=1, preexec_fn=lambda: _limit_file_size(12_000)).replace("\n", " ")
    assert "out.gif is written, but not its record: could not write out.gif.json: File too large" in output
    assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]


def test_the_package_imports_without_torch_as_a_folder_with_dashes(tmp_path):
    """As ComfyUI does: load the folder by path, under a name that is not an identifier."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "fate-zero.nodes").symlink_to(root)
    code = f"""
import importlib.util, sys
folder = {str(tmp_path / "fate-zero.nodes")!r}
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert "torch" not in sys.modules
assert module.FusionSettings().cross_replace_steps == 0.8
assert "fatezero" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    assert torch.__version__


# --- stores and their origin --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sounding(tmp_path_factory) -> Path:
    """A clip of flashes and beeps, two seconds long, in a file with a late start."""
    return flashes(
        tmp_path_factory.mktemp("sounding") / "beep.mkv", times=[Fraction(i, 8) for i in range(20)], late=1.0
    )


def test_an_edit_from_a_store_has_the_clips_sound_and_times(command, sounding, tmp_path):
    part = ("--start", "0.5s", "--count", 10, "--size", "32x32")
    command("invert", sounding, *WORDS[:2], "--steps", 1, *part, "-o", "s.safetensors")
    (tmp_path / "elsewhere").mkdir()
    command("edit", "--store", "../s.safetensors", "--target", TARGET, "-o", "o.mp4", cwd=tmp_path / "elsewhere")
    command("edit", sounding, *WORDS, "--steps", 1, *part, "-o", "direct.mp4")
    stored, direct = read_video(tmp_path / "elsewhere" / "o.mp4"), read_video(tmp_path / "direct.mp4")
    assert alike(stored.frames, direct.frames)
    assert beep_times(stored.sound) == pytest.approx([0.5], abs=0.01)
    assert np.abs(stored.sound.samples - direct.sound.samples).max() < 0.01
    command(
        "edit", sounding, "--store", "s.safetensors", "--target", TARGET, "-o", "again.mp4", "--start", "0.5s",

    )  # fmt: skip
    again = read_video(tmp_path / "again.mp4")
    assert alike(again.frames, direct.frames)
    assert np.abs(again.sound.samples - direct.sound.samples).max() < 1e-4


def _changed(path: Path, out: Path, **extra) -> Path:
    """A store with changed metadata of its clip."""
    store = AttentionStore.load(path)
    store.extra.update(extra)
    return store.save(out)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "somebody/some-repo"}, "made with the model 'somebody/some-repo', which is not on"),
        ({"fps": [25, 0]}, "damaged"),
        ({"fps": "fast"}, "damaged"),
        ({"times": [[0, 1]]}, "damaged"),
        ({"times": []}, "damaged"),
        ({"frames": True}, "damaged"),
        ({"vae": {}}, "damaged"),
        ({"vae": {"layout": "x", "digest": 3, "dtype": "torch.float32", "traces": []}}, "damaged"),
        ({"video": 3}, "damaged"),
        ({"settings": {"start": [1]}}, "start is [1]"),
        ({"vae": {"layout": "x", "digest": "", "dtype": "torch.float32", "traces": []}}, "another autoencoder"),
        ({"sound_rate": -1}, None),
        ({"settings": 3}, "damaged"),
    ],
)
def test_a_stores_metadata_of_its_clip_is_checked(command, refused, store, tmp_path, monkeypatch, extra, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    changed = _changed(store, tmp_path / "s.safetensors", **extra)
    arguments = ("edit", "--store", changed, "--target", TARGET, "--preset", "style", "-o", "o.mp4")
    if message is None:  # it has no sound, so no sample rate either
        command(*arguments)
    else:
        assert message in refused(*arguments)


def test_a_prompt_with_other_embeddings_than_the_stores_is_refused(refused, store, tmp_path):
    loaded = AttentionStore.load(store)
    loaded.prompt = "a blue circle on sand"
    loaded.save(tmp_path / "s.safetensors")
    error = refused("edit", "--store", "s.safetensors", "--target", TARGET, "-o", "o.mp4")
    assert "has other embeddings by this model's text encoder" in error


# --- outputs -------------------------------------------------------------------------------------


def test_one_failed_output_does_not_affect_the_others(refused, tmp_path, monkeypatch):
    import fatezero.cli.commands.edit as run

    plain = run.write_video

    def failing(path, *given, **more):
        if path.endswith("_1.mp4"):
            raise OSError(f"could not write {path}: the disk is full")
        return plain(path, *given, **more)

    monkeypatch.setattr(run, "write_video", failing)
    targets = [w for colour in ("green", "blue", "yellow") for w in ("--target", f"a {colour} square on water")]
    error = refused("edit", CLIP, *WORDS[:2], *targets, "--steps", 1, "--count", 2, "-o", "o.mp4")
    assert "1 of 3 edits could not be written: could not write o_1.mp4" in error
    written = [f"o_{i}.mp4{end}" for i in (0, 2) for end in ("", ".json")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mp4.state", *written], "to write the others again"


def test_outputs_are_overwritten_only_with_the_option(command, tmp_path):
    (tmp_path / "o.mp4").write_text("mine")
    edit = ("edit", CLIP, *WORDS, "--steps", 1, "--count", 2, "-o", "o.mp4")
    command(*edit, code=1)
    assert (tmp_path / "o.mp4").read_text() == "mine"
    command(*edit, "--overwrite")
    assert len(read_video(tmp_path / "o.mp4").frames) == 2
    output = command("invert", CLIP, *WORDS[:2], "-o", "o.mp4", code=1)
    assert "o.mp4 exists" in output


@pytest.mark.parametrize("output", ["o.webm", "o.gif", "o/", "o/f_%02d.jpg", "o.mkv"])
def test_other_kinds_of_output(command, tmp_path, output):
    command("edit", CLIP, *WORDS, "--steps", 1, "--count", 3, "-o", output)
    found = tmp_path / output.replace("/f_%02d.jpg", "")
    assert read_video(found).frames.shape == (3, 64, 64, 3)


def test_other_methods_and_their_settings(command, tmp_path):
    part = ("edit", CLIP, *WORDS, "--steps", 2, "--count", 5, "--preset", "tokenflow")
    output = command(*part, "--tokenflow.batch-frames", 2, "-o", "flow.mp4")
    assert "UNet calls: 2 for the inversion, 6.4 for the edit, 3.2 for the source" in output
    command(*part, "--propagation", "none", "-o", "pnp.mp4")
    flow, pnp = (read_video(tmp_path / f"{name}.mp4").frames for name in ("flow", "pnp"))
    assert flow.shape == pnp.shape == (5, 64, 64, 3) and not alike(flow, pnp)


def test_temporal_layers_of_a_file(command, refused, tmp_path):
    unet = Checkpoint.load("demo").unet
    for layer in temporal_layers(with_temporal_layers(unet)).attentions.values():
        torch.nn.init.constant_(layer.to_out.bias, 0.2)
    save_temporal_layers(unet, tmp_path / "layers.safetensors")
    part = ("edit", CLIP, *WORDS, "--steps", 2, "--count", 2)
    command(*part, "-o", "plain.mp4")
    command(*part, "--temporal", "layers.safetensors", "-o", "temporal.mp4")
    plain, temporal = (read_video(tmp_path / f"{name}.mp4").frames for name in ("plain", "temporal"))
    assert not alike(plain, temporal)
    assert "no temporal layers at none.safetensors" in refused(*part, "--temporal", "none.safetensors")


# --- help and progress ------------------------------------------------------------------------------


def test_the_full_help_shows_every_default_and_no_name_is_cut(command, monkeypatch):
    from fatezero.cli.config.settings import SECTIONS, EditConfig
    from fatezero.settings import settings_of

    monkeypatch.setattr("fatezero.cli.progress.console.width", 80)
    output = command("edit", "--help-all")
    words = " ".join(output.replace("\u2502", " ").split())
    names = [one.name for one in settings_of(EditConfig)]
    names += [f"{section}.{one.name}" for section, settings in SECTIONS.items() for one in settings_of(settings)]
    for name in names:
        assert f"--{name.replace('_', '-')}" in words
    for default in ("recompute", "self,middle", "7.5", "50", "auto", "the bundled demo", "all"):
        assert f"[default: {default}]" in words
    assert "\u2026" not in output
    assert command("--version").startswith("fatezero 0.")


def test_progress_is_printed_in_lines_without_a_terminal_and_not_if_quiet(command):
    run = ("edit", CLIP, *WORDS, "--steps", 2, "--count", 2)
    output = command(*run, "-o", "a.mp4")
    assert re.search(r"^invert 1/2, 0:\d\d left$", output, re.M)
    assert re.search(r"^edit 2/2 in 0:\d\d$", output, re.M)
    assert command(*run, "-o", "b.mp4", "--quiet") == ""


def test_a_preset_means_the_same_in_a_file_and_on_the_command(command, tmp_path):
    (tmp_path / "c.yaml").write_text("preset: shape\n")
    target = ("--target", "a red circle on water")
    part = ("--source", SOURCE, *target, "--steps", 2, "--count", 2)
    command("edit", CLIP, *part, "--config", "c.yaml", "-o", "file.mp4")
    command("edit", CLIP, *part, "--preset", "shape", "-o", "flag.mp4")
    assert alike(*(read_video(tmp_path / f"{name}.mp4").frames for name in ("file", "flag")))


def test_an_object_of_a_clip_is_moved_and_the_rest_preserved(command, refused, tmp_path):
    """The same clip with its square further down: red is there, and only there."""
    move = ("--source", SOURCE, "--count", 3, "--steps", 6, "--guidance-scale", 5)
    output = command("edit", CLIP, *move, "--shift", "red square: 0:0.1,0.25", "-o", "down.mp4")
    assert "gradients of the layout" in " ".join(output.split())
    red = []
    for file in (CLIP, tmp_path / "down.mp4"):
        frames = read_video(file).frames[:3].float() / 255
        there = ((frames[..., 0] - frames[..., 1:].amax(-1)) > 0.3).float()
        down = torch.arange(there.shape[1]) / there.shape[1]
        red.append((there.sum(2) * down).sum(1) / there.sum((1, 2)))
    assert (red[1] - red[0] > 0.15).all()
    command("edit", "down.mp4", *move, "--box", "square: 0:0.5,0.5,0.5", "-o", "box.mp4", "--dry-run")
    assert "'circle' is not in the prompt" in refused("edit", CLIP, *move, "--shift", "circle: 0:0,0")
    Image.new("L", (64, 64)).save(tmp_path / "one.png")
    assert "object_mask: 'circle' has no position" in refused(
        "edit", CLIP, *move, "--shift", "square: 0:0.1,0", "--object-mask", "circle: one.png"
    )
    assert "layout has no effect here" in refused("edit", CLIP, *WORDS, "--layout.scale", 5)
