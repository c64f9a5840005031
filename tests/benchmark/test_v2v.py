"""V2VBench: its folder, its edits and its tables, on a small folder of demo scenes."""

import csv
import json

import pytest
import torch
import yaml
from frame_models import viclip_weights, write_aesthetic, write_clip, write_dinov2
from safetensors.torch import save_file
from transformers import CLIPTokenizer
from v2v import FRAMES, write_v2v

from fatezero.benchmark.public import FolderError
from fatezero.benchmark.v2v import COLUMNS, PUBLISHED, V2V, load_v2v
from fatezero.cli.progress import console, no_bars
from fatezero.cli.public import PublicRun, check_public, run_public
from fatezero.cli.session import Session
from fatezero.files.bundled import DEMO


@pytest.fixture
def data(tmp_path):
    return write_v2v(tmp_path / "my data")


def changed(data, **values):
    """Change the first clip's entry; None removes a key."""
    file = data / "config.yaml"
    entries = yaml.safe_load(file.read_text())["data"]
    entries[0] = {key: value for key, value in (entries[0] | values).items() if value is not None}
    file.write_text(yaml.safe_dump({"data": entries}))


def test_a_folder_has_a_case_for_each_edit(data):
    cases = load_v2v(data)
    assert [case.name for case in cases] == ["red square-0", "red square-1", "star-2-0", "star-2-1"]
    assert [case.kind for case in cases] == ["foreground", "style", "background", "edit"]
    assert (cases[0].source, cases[0].target) == ("a red square on water", "a red circle on water")
    assert cases[0].frames == FRAMES and load_v2v(data, frames=2)[0].frames == 2
    assert [case.name for case in load_v2v(data, ["style", "edit"])] == ["red square-1", "star-2-1"]
    assert cases[0].video.is_dir() and cases[2].video.suffix == ".gif" and cases[0].mask is None


def test_at_most_so_many_edits_of_each_type(data):
    changed(data, edit=[{"prompt": f"a circle {n}", "type": "style"} for n in range(3)])
    assert [case.name for case in load_v2v(data, each=2)] == ["red square-0", "red square-1", "star-2-0", "star-2-1"]


@pytest.mark.parametrize(
    ("break_it", "message", "left"),
    [
        (lambda data: changed(data, video_id="blue"), "blue: no clip", "star-2"),
        (lambda data: (data / "videos/star-2.gif").write_bytes(b"GIF89a"), "star-2: ", "red square"),
    ],
)
def test_a_clip_that_cannot_be_read_is_left_out(data, break_it, message, left):
    break_it(data)
    skipped = []
    assert [case.name for case in load_v2v(data, skip=skipped.append)] == [f"{left}-0", f"{left}-1"]
    assert len(skipped) == 1 and f"config.yaml, {message}" in skipped[0]
    with pytest.raises(FolderError, match=message):
        load_v2v(data)


def test_a_folder_shadows_no_video(data):
    (data / "frames" / "star-2").mkdir()
    (data / "frames" / "star-2" / ".DS_Store").touch()
    assert load_v2v(data)[2].video.suffix == ".gif"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: (data / "config.yaml").unlink(), "it has no config.yaml"),
        (lambda data: (data / "config.yaml").write_text("data: [a, : b"), "cannot be read as YAML"),
        (lambda data: (data / "config.yaml").write_text("clips: []"), "data is None"),
        (lambda data: changed(data, prompt=None), "config.yaml, red square: prompt is None"),
        (lambda data: changed(data, edit=[{"type": "style"}]), "red square, edit 0: prompt is None"),
        (lambda data: changed(data, edit=[]), "red square: edit is []"),
        (lambda data: changed(data, video_id="../my data"), "a name without folders"),
    ],
)
def test_a_broken_folder_is_refused_by_the_command(refused, data, break_it, message):
    break_it(data)
    text = refused("benchmark", "--v2v", data, "--model", "no/such-model", "-o", data.parent / "out")
    assert message in text.replace("\n", " ")
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--kind", "colour"), "kind is 'colour'; it must be one of foreground, style"),
        (("--method", "kv_edit"), "method kv_edit needs masks, which V2VBench does not have"),
        (("--five", "."), "either --five or --v2v"),
        (("--lpips", "x.safetensors"), "lpips has no effect without --five"),
        (("--seed", "3"), "seed has no effect with --v2v"),
        (("--viclip", "x.safetensors"), "viclip needs --clip too"),
        (("--gmflow", "x.safetensors"), "gmflow: no file at x.safetensors"),
        (("--aesthetic", "nothing"), "aesthetic: no model at nothing"),
    ],
)
def test_options_that_would_fail_later_are_refused(refused, data, line, message):
    assert message in refused("benchmark", "--v2v", data, *line, "-o", data.parent / "out").replace("\n", " ")


def test_models_of_figures_need_a_folder(refused):
    assert "pickscore has no effect without --v2v" in refused("benchmark", "--pickscore", "x")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small random models of all figures but GMFlow."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    words = len(CLIPTokenizer.from_pretrained(DEMO / "tokenizer"))
    save_file(viclip_weights(words), folder / "viclip.safetensors")
    made = {"clip": write_clip, "pickscore": write_clip, "dino": write_dinov2, "aesthetic": write_aesthetic}
    given = {name: str(write(folder / name)) for name, write in made.items()}
    return given | {"viclip": str(folder / "viclip.safetensors"), "gmflow": ""}


def test_a_run_edits_measures_and_writes_tables(data, tmp_path, models):
    out, session = tmp_path / "out", Session(console, no_bars, "cpu")
    run = PublicRun("v2v", out, ("attribute+",), {"steps": 1}, dict.fromkeys(V2V.models, ""), "cpu", 1)
    cases = check_public(run, str(data), ("foreground", "edit"), None, 3)
    text = run_public(session, run, cases)
    assert "published*" not in text and "frames quality left out: give --aesthetic" in text
    edits = {path: path.stat().st_mtime_ns for path in out.glob("*.mkv")}

    full = PublicRun("v2v", out, run.methods, run.shared, models, "cpu", 1)
    assert check_public(full, str(data), ("foreground", "edit"), None, 3) == cases
    text = run_public(session, full, cases)
    rows = [json.loads(line) for line in (out / "v2v.jsonl").read_text().splitlines()[-2:]]
    figures = {"quality", "semantic", "object", "text", "pick", "video_text"}
    assert [row["kind"] for row in rows] == ["foreground", "edit"]
    assert all(row[name] is not None for row in rows for name in figures)
    assert "| *Fate-Zero, published* | all | 150 | 5.036 | 0.951 | 0.952 | 25.065 | 20.707 | 0.225 |" in text
    table = {(row[0], row[1], row[3]): row for row in csv.reader((out / "table.csv").open(encoding="utf-8"))}
    mean = (rows[0]["text"] + rows[1]["text"]) / 2
    assert float(table["attribute+", "all", "frames text alignment"][4]) == pytest.approx(mean, rel=1e-4)
    assert table["RAVE (published)", "all", "motion alignment"][4] == "-2.398"
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.mkv")} == edits, "nothing is edited again"


def test_the_published_rows_are_in_the_order_of_the_columns():
    found = dict(zip((column.key for column in COLUMNS), PUBLISHED["Fate-Zero"], strict=False))
    assert found["quality"] == 5.036 and found["video_quality"] == 0.704 and found["motion"] == -1.439
    assert {len(row) for row in PUBLISHED.values()} == {8} and len(PUBLISHED) == 16
