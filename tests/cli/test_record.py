"""Results reproduced from their record or metadata."""

import json
import shutil

import pytest
import torch
from commands import frames_written

from fatezero import __version__
from fatezero.cli.config.files import load_configs
from fatezero.cli.config.record import Provenance, differences, files_read, made_by, record_of, settings_of
from fatezero.cli.config.settings import ConfigError, EditConfig
from fatezero.files.bundled import CLIP, DEMO
from fatezero.video.read import read_metadata, read_video
from fatezero.video.write import FrameDigest

SOURCE, TARGET = "a red square on water", "a red circle on water"
WORDS = ("--source", SOURCE, "--target", TARGET, "--steps", 2, "--count", 3)


@pytest.fixture
def clip(tmp_path):
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "shape", "--memory", "auto", "--reweight", "circle=2"),
        pytest.param(("--preset", "tokenflow", "--tokenflow.seed", 3), marks=pytest.mark.slow),
        pytest.param(("--preset", "flow_edit", "--flow-edit.seed", 5), marks=pytest.mark.slow),
    ],
    ids=["shape", "tokenflow", "flow_edit"],
)
def test_a_result_is_reproduced_bit_for_bit(command, clip, tmp_path, options):
    output = command("edit", "clip.mp4", *WORDS, *options, "-o", "first.mp4")
    assert "of the record" not in output
    other = tmp_path / "other"
    other.mkdir()
    output = command("edit", "--config", "../first.mp4.json", "-o", "again.mp4", cwd=other)
    assert "its frames equal those of the record, bit for bit" in output
    output = command("edit", "../clip.mp4", "--config", "../first.mp4", "-o", "of_itself.mp4", cwd=other)
    assert "its frames equal those of the record, bit for bit" in output
    first = frames_written(tmp_path / "first.mp4")
    assert frames_written(other / "again.mp4") == frames_written(other / "of_itself.mp4") == first
    assert (other / "again.mp4.json").read_text() == (tmp_path / "first.mp4.json").read_text()


def test_results_of_several_edits_and_of_a_store(command, clip, tmp_path):
    command("edit", "clip.mp4", *WORDS, "--target", "a blue square on water", "-o", "two.mp4")
    command("edit", "--config", "two_1.mp4.json", "-o", "single.mp4")
    assert frames_written(tmp_path / "single.mp4") == frames_written(tmp_path / "two_1.mp4")
    assert frames_written(tmp_path / "two_0.mp4") != frames_written(tmp_path / "two_1.mp4")
    command("invert", "clip.mp4", "--source", SOURCE, "--steps", 2, "--count", 3, "-o", "s.safetensors")
    command("edit", "--store", "s.safetensors", "--target", TARGET, "-o", "stored.mp4")
    clip.unlink()  # the store is sufficient
    command("edit", "--config", "stored.mp4.json", "-o", "again.mp4")
    assert frames_written(tmp_path / "again.mp4") == frames_written(tmp_path / "stored.mp4")


def test_a_record_has_its_provenance_and_metadata_has_no_folders(command, clip, tmp_path):
    command("edit", clip, *WORDS, "--clip-norm", "-o", "out.mp4")
    record = json.loads((tmp_path / "out.mp4.json").read_text())
    assert record["video"] == str(clip)
    assert (record["steps"], record["clip_norm"], record["source"], record["target"]) == (2, True, SOURCE, TARGET)
    assert "guidance_scale" not in record, "a default"
    made = record["made"]
    assert made["versions"]["fatezero"] == __version__
    assert made["device"] == "cpu" and made["dtype"] == "float32" and made["threads"] >= 1
    assert len(made["model"]) == len(made["vae"]) == len(made["files"]["video"]) == 64
    within = json.loads(read_metadata(tmp_path / "out.mp4")["fatezero"])
    assert within["video"] == "clip.mp4"
    assert str(tmp_path) not in json.dumps(within)
    digest = made.pop("frames")
    assert {**within, "video": record["video"]} == record
    record["made"]["frames"] = "0" * 64
    (tmp_path / "r.json").write_text(json.dumps(record))
    output = command("edit", "--config", "r.json", "-o", "again.mp4").replace("\n", " ")
    assert "its frames differ from those of the record" in output
    assert frames_written(tmp_path / "again.mp4") == digest
    output = command("edit", "--config", "r.json", "--guidance-scale", 2, "-o", "other.mp4")
    assert "of the record" not in output, "another edit was given"


@pytest.mark.slow
def test_pictures_have_a_record_too(command, clip, tmp_path):
    command("edit", "clip.mp4", *WORDS, "-o", "frames/")
    record = json.loads((tmp_path / "frames" / "edit.json").read_text())
    digest = FrameDigest()
    assert len(list(digest.passing(read_video(tmp_path / "frames").frames))) == 3
    assert record["made"]["frames"] == str(digest), "the pictures are the frames, and the record's digest is theirs"
    command("edit", "clip.mp4", *WORDS, "-o", "f_%03d.png")
    command("edit", "--config", "f_%03d.png.json", "-o", "g_%03d.png")
    assert torch.equal(*(read_video(tmp_path / f"{name}_002.png").frames for name in "fg"))
    output = command("edit", "clip.mp4", *WORDS, "-o", "new.mp4", "--dry-run")
    assert "error" not in output
    (tmp_path / "new.mp4.json").write_text("mine")
    assert "new.mp4.json exists" in command("edit", "clip.mp4", *WORDS, "-o", "new.mp4", code=1)


def test_another_clip_or_model_is_refused(command, clip, tmp_path):
    command("edit", "clip.mp4", *WORDS, "-o", "out.mp4")
    whole = clip.read_bytes()
    clip.write_bytes((tmp_path / "out.mp4").read_bytes())
    output = command("edit", "--config", "out.mp4.json", "-o", "again.mp4", code=1)
    assert "the video is not the file that the result was made from" in output
    command("edit", "clip.mp4", "--config", "out.mp4.json", "-o", "again.mp4")  # as given
    clip.write_bytes(whole)
    record = json.loads((tmp_path / "out.mp4.json").read_text())
    record["made"]["model"] = "0" * 64
    (tmp_path / "r.json").write_text(json.dumps(record))
    output = command("edit", "--config", "r.json", "-o", "b.mp4", code=1)
    assert "the model's weights are not those of the result" in output
    command("edit", "--config", "r.json", "--model", DEMO, "-o", "b.mp4")


def test_differences_that_may_change_the_result_are_reported(command, clip, tmp_path):
    command("edit", "clip.mp4", *WORDS, "-o", "out.mp4")
    record = json.loads((tmp_path / "out.mp4.json").read_text())
    record["made"]["versions"]["torch"] = "1.0"
    (tmp_path / "r.json").write_text(json.dumps(record))
    output = command("edit", "--config", "r.json", "-o", "b.mp4").replace("\n", " ")
    assert "made with torch 1.0 (here" in output and "last digits may differ" in output


def test_threads_are_those_of_the_record(command, clip, tmp_path):
    command("edit", "clip.mp4", *WORDS, "-o", "one.mp4", threads=1)
    assert json.loads((tmp_path / "one.mp4.json").read_text())["made"]["threads"] == 1
    command("edit", "--config", "one.mp4.json", "-o", "two.mp4", threads=2)
    assert json.loads((tmp_path / "two.mp4.json").read_text())["made"]["threads"] == 1
    assert frames_written(tmp_path / "one.mp4") == frames_written(tmp_path / "two.mp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "contains no settings"),
        ('{"stebs": 2}', "unknown setting 'stebs' (did you mean 'steps'?)"),
        ('{"made": 3}', "made must be a section"),
        ('{"made": {"threads": 0}}', "made.threads is 0"),
        ('{"made": {"threads": "many"}}', "made.threads is 'many'"),
        ('{"made": {"files": {"video": 3}}}', "made.files is"),
        ('{"made": {"wheels": 4}}', "made.wheels is 4"),
        ('{"made": {"threads": true}}', "made.threads is True"),
        ('{"made": {"device": "meta"}}', "device 'meta' cannot be used"),
        ('{"steps": 2, "steps": 3}', "'steps' is given twice"),
        ('{"model": "somebody/some-repo", "made": {}}', "r.json: model is 'somebody/some-repo', which is not on"),
        ('{"made": {"model_config": "somebody/some-repo"}}', "give it with --model-config"),
    ],
)
def test_invalid_records(refused, tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    assert message in refused("edit", CLIP, *WORDS[:4], "--config", "r.json", "-o", "o.mp4")


def test_a_video_without_a_record(refused):
    assert "it is not a result of `fatezero edit`" in refused("edit", "--config", CLIP, "-o", "o.mp4")


def test_settings_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # not the bundled model
    config = EditConfig(
        video="a.mp4", source="x", target="y", key_frames=("self", -1), size=(64, 32), reweight={"y": 1e-7},
        start="1.5s", temporal="demo", box=("y: 0:0.1,0.5,0.3",), mask=("x: nothing here.mp4",),
    )  # fmt: skip
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record_of(config, Provenance(files={"video": "1"}))))
    assert load_configs(path) == ([config], [])
    assert made_by(path) == Provenance(files={"video": "1"})
    assert settings_of(EditConfig()) == {}
    with pytest.raises(ConfigError):
        Provenance.of({"dtype": 3})
    assert differences(Provenance(threads=2), Provenance(threads=1)) == ["threads 1 (here 2)"]


def test_a_lora_may_be_a_folder(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"one")
    config = EditConfig(lora=(str(tmp_path / "lora"),))
    (first,) = files_read([config], None)
    assert first.keys() == {"lora"} and files_read([config], None) == [first]
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"two")
    assert files_read([config], None) != [first]
