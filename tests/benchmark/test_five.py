"""FiVE-Bench: its folder, its edits and its tables, on a small folder of demo scenes."""

import csv
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from five import FRAMES, PAIRS, write_five
from frame_models import TOWER, write_clip
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from fatezero.benchmark.five import COLUMNS, FIVE, KINDS, PUBLISHED, load_five
from fatezero.benchmark.public import FolderError, masks_of
from fatezero.cli.commands.batch import BatchError
from fatezero.cli.progress import console, no_bars
from fatezero.cli.public import PublicRun, _job, _models, _notes, _shown, check_public, run_public
from fatezero.cli.session import Session
from fatezero.metrics.lpips import Lpips

NO_MODELS = dict.fromkeys(FIVE.models, "")


@pytest.fixture
def data(tmp_path):
    return write_five(tmp_path / "data")


def changed(data, **values):
    """Change the first type's case in its file."""
    file = data / "edit_prompt" / "edit1_FiVE.json"
    entry = json.loads(file.read_text())[0] | values
    file.write_text(json.dumps([{key: value for key, value in entry.items() if value is not None}]))


# --- the folder -------------------------------------------------------------------------------


def test_a_folder_has_a_case_for_each_pair(data):
    cases = load_five(data)
    assert [case.name for case in cases] == ["edit1-000", "edit3-000", "edit4-000"]
    assert [case.kind for case in cases] == [KINDS[number] for number in PAIRS]
    assert (cases[0].source, cases[0].target) == ("a red square on water", "a red circle on water"), "without brackets"
    assert cases[0].frames == FRAMES and load_five(data, frames=2)[0].frames == 2
    assert cases[0].questions.target == "Is there a a red circle on water in the video?"
    assert [case.kind for case in load_five(data, ["3", "material"])] == ["colour", "material"]


def test_clips_and_files_with_similar_names_are_different_cases(data, tmp_path):
    """A part after a dot or an underscore is a part of the name."""
    file = data / "edit_prompt" / "edit1_FiVE.json"
    entry = json.loads(file.read_text())[0]
    for name in ("a.one", "a.two"):
        for part in ("images", "bmasks"):
            shutil.copytree(data / part / "0001_square", data / part / name)
        (file.parent / f"more_{name}.json").write_text(json.dumps([entry | {"video_name": name}]))
    first, second = load_five(data, ["1"])[1:]
    assert first.name != second.name
    run = PublicRun("five", tmp_path / "out", ("kv_edit",), {"model": "demo-wan"}, NO_MODELS, "cpu", 1)
    jobs = [_job(run, case, "kv_edit") for case in (first, second)]
    assert jobs[0].name != jobs[1].name and jobs[0].values["edit_mask"] != jobs[1].values["edit_mask"]


def test_a_clip_may_be_a_video_and_questions_may_lack(data):
    changed(data, video_name="bus", source_yes_no_question=None, multiple_choice_question=None)
    shutil.move(data / "bmasks" / "0001_square", data / "bmasks" / "bus")
    (data / "videos").mkdir()
    from fatezero.files.bundled import CLIP
    from fatezero.video.read import open_video

    shutil.copyfile(CLIP, data / "videos" / "bus.mp4")
    with pytest.raises(FolderError, match=r"edit1_FiVE.json, case 0: .* has 4 masks for \d+ frames"):
        load_five(data)
    size = open_video(CLIP).size
    with pytest.raises(FolderError, match=f"masks of 64x64 .* frames of {size[0]}x{size[1]}"):
        load_five(data, frames=4)


MASK = "bmasks/0001_square/00002.jpg"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: shutil.rmtree(data / "bmasks/0001_square"), "no masks at"),
        (lambda data: shutil.rmtree(data / "images/0001_square"), "no clip images/0001_square"),
        (
            lambda data: [file.unlink() for file in (data / "images/0001_square").iterdir()],
            "no clip images/0001_square",
        ),
        (lambda data: (data / MASK).unlink(), "no mask of 00002.jpg at"),
        (lambda data: (data / MASK).rename((data / MASK).with_name("00009.jpg")), "no mask of 00002.jpg at"),
        (lambda data: (data / MASK).write_bytes(b""), "00002.jpg is not a readable picture"),
    ],
)
def test_a_case_without_its_clip_or_masks_is_left_out_with_a_note(data, break_it, message):
    break_it(data)
    skipped = []
    assert [case.name for case in load_five(data, skip=skipped.append)] == ["edit3-000", "edit4-000"]
    (why,) = skipped
    assert why.startswith("edit_prompt/edit1_FiVE.json, case 0: ") and message in why
    with pytest.raises(FolderError, match="edit1_FiVE.json, case 0"):
        load_five(data)
    with pytest.raises(FolderError, match="has no case of rigid replacement whose clip and masks can be read"):
        load_five(data, ["1"], skip=skipped.append)


def test_the_command_says_which_cases_are_left_out(tmp_path, command):
    data, out = write_five(tmp_path / "data"), tmp_path / "out"
    shutil.rmtree(data / "bmasks/0001_square")
    text = command("benchmark", "--five", data, "--steps", "1", "--frames", "1", "-o", out)
    assert "note: left out: edit_prompt/edit1_FiVE.json, case 0: no masks at" in text.replace("\n", " ")
    table = (out / "table.md").read_text()
    assert "| attribute+ | all | 2 |" in table
    assert "- 1 cases left out: edit_prompt/edit1_FiVE.json, case 0: no masks at" in table
    assert "- attribute+: model demo, 1 steps, at most 1 frames" in table


def test_masks_are_found_by_name_among_others(data):
    """Also of frames that the clip does not have, and beside files that a Mac adds."""
    masks = data / "bmasks" / "0001_square"
    for name in ("00000.jpg", "00001a.jpg"):
        shutil.copyfile(masks / "00003.jpg", masks / name)
    (data / "edit_prompt" / "._edit1_FiVE.json").write_bytes(b"\x00\x05\x16\x07")
    changed(data, editing_type_id=1.0)
    file = data / "edit_prompt" / "edit1_FiVE.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    (case, *_) = load_five(data, frames=2)
    assert [mask.name for mask in masks_of(case.mask, case.video, 2)] == ["00001.jpg", "00002.jpg"]


def broken(data):
    (data / "edit_prompt" / "edit3_FiVE.json").write_text("[{")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (broken, "edit3_FiVE.json cannot be read as JSON"),
        (lambda data: changed(data, editing_type_id="9"), "editing_type_id is '9'; it must be one of 1 "),
        (lambda data: changed(data, target_prompt=None), "target_prompt is None"),
        (lambda data: changed(data, video_name="../images/0001_square"), "a name without folders"),
        (lambda data: shutil.rmtree(data / "edit_prompt"), "it has no edit_prompt"),
    ],
)
def test_a_broken_folder_is_refused_by_the_command(refused, data, break_it, message):
    break_it(data)
    text = refused("benchmark", "--five", data, "--model", "no/such-model", "-o", data.parent / "out")
    assert message in text.replace("\n", " ")
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--kind", "7"), "kind is '7'"),
        (("--kind", "6"), "has no case of removal"),
        (("--method", "nonsense"), "method is 'nonsense'"),
        (("--method", "none.yaml"), "no configuration at none.yaml"),
        (("--method", "style", "--method", "style"), "give each once"),
        (("--method", "later.yaml"), "method later: start is given, but the benchmark chooses the frames"),
        (("--method", "wrong.yaml"), "method wrong: guidance_scale is 'much'"),
        (("--pairs", "pairs.yaml"), "pairs has no effect with --five"),
        (("--lpips", "none.safetensors"), "lpips: no file at none.safetensors"),
        (("--dino", "nothing"), "dino: no model at nothing"),
        (("--vlm", "nothing"), "vlm: no model at nothing"),
    ],
)
def test_options_that_would_fail_later_are_refused(refused, data, line, message, monkeypatch):
    monkeypatch.chdir(data.parent)
    (data.parent / "wrong.yaml").write_text("guidance_scale: much\n")
    (data.parent / "later.yaml").write_text("preset: style\nstart: 3\n")
    assert message in refused("benchmark", "--five", data, *line, "-o", data.parent / "out").replace("\n", " ")


def test_models_of_figures_need_a_folder(refused):
    assert "dino has no effect without --five" in refused("benchmark", "--dino", "x")


# --- a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small random models of the figures: CLIP, DINO and LPIPS."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_clip(folder / "clip")
    ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    for net in ("squeeze", "alex"):
        saved = Lpips(net).state_dict()
        of_package = {name: value for name, value in saved.items() if not name.startswith("weights.")}
        lins = {f"lin{n}.model.1.weight": torch.rand(1, len(value), 1, 1) for n, value in enumerate(
            value for name, value in saved.items() if name.startswith("weights."))}  # fmt: skip
        save_file(of_package | lins, folder / f"{net}.safetensors")
    return folder


def test_a_run_edits_measures_resumes_and_writes_tables(tmp_path, models):
    data, out = write_five(tmp_path / "data"), tmp_path / "out"
    run = PublicRun("five", out, ("attribute+",), {"steps": 2}, NO_MODELS, "cpu", 1)
    session = Session(console, no_bars, "cpu")
    cases = check_public(run, str(data), ("1", "3"), None, 3)
    text = run_public(session, run, cases)
    rows = [json.loads(line) for line in (out / "five.jsonl").read_text().splitlines()]
    assert [(row["case"], row["kind"]) for row in rows] == [("edit1-000", KINDS["1"]), ("edit3-000", KINDS["3"])]
    assert all(20 < row["psnr"] < 60 and 0 < row["inside"] <= 1 and row["mse"] > 0 for row in rows)
    assert "structure" not in rows[0] and "structure left out: give --dino" in text
    assert "| attribute+ | all | 2 |" in text and "| *Wan-Edit, published* | all | 420 | 25.57 |" in text
    table = {(row[0], row[1], row[3]): row for row in csv.reader((out / "table.csv").open(encoding="utf-8"))}
    mean = (rows[0]["psnr"] + rows[1]["psnr"]) / 2
    assert float(table["attribute+", "all", "PSNR dB"][4]) == pytest.approx(mean, rel=1e-4)
    assert float(table["attribute+", KINDS["3"], "MSE x10000"][4]) == pytest.approx(1e4 * rows[1]["mse"], rel=1e-4)

    # A line that was cut short is measured again; with models, all are. Nothing is edited again.
    edits = {path: path.stat().st_mtime_ns for path in out.glob("*.mkv")}
    lines = (out / "five.jsonl").read_text().splitlines()
    (out / "five.jsonl").write_text("\n".join([lines[0], lines[1][:30]]))
    assert run_public(session, run, cases) == text
    assert len((out / "five.jsonl").read_text().splitlines()) == 3
    given = {"clip": str(models / "clip"), "dino": str(models / "dino"), "lpips": str(models / "squeeze.safetensors")}
    more = PublicRun("five", out, run.methods, run.shared, NO_MODELS | given, "cpu", 1)
    assert check_public(more, str(data), ("1", "3"), None, 3) == cases
    assert "| *TokenFlow, published* | all | 420 | 35.62 | 19.06 | 263.6 |" in run_public(session, more, cases)
    again = [json.loads(line) for line in (out / "five.jsonl").read_text().splitlines()[-2:]]
    assert all(row["structure"] > 0 and row["lpips"] > 0 and 0 <= row["clip_edit"] <= 100 for row in again)
    assert [row["psnr"] for row in again] == [row["psnr"] for row in rows]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.mkv")} == edits


@pytest.mark.skipif(find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_a_figure_without_its_library_is_left_out_with_a_note(data, tmp_path):
    (tmp_path / "niqe.mat").write_bytes(b"parameters")
    run = PublicRun(
        "five", tmp_path / "out", ("style",), {}, NO_MODELS | {"niqe": str(tmp_path / "niqe.mat")}, "cpu", 1
    )
    check_public(run, str(data), (), None, None)
    assert "niqe" not in _models(run)
    assert "NIQE left out: pyiqa is not installed" in _notes(run, load_five(data))


def test_other_weights_under_the_same_name_are_measured_again(tmp_path):
    (tmp_path / "niqe.mat").write_bytes(b"some")
    found = []
    for weights in (b"some", b"others", b"some"):
        (tmp_path / "niqe.mat").write_bytes(weights)
        run = PublicRun("five", tmp_path, ("style",), {}, NO_MODELS | {"lpips": str(tmp_path / "niqe.mat")}, "cpu", 1)
        found.append(run.identities)
    assert found[0] == found[2] != found[1]


def test_a_folder_has_the_run_of_one_benchmark(data, refused):
    out = data.parent / "out"
    out.mkdir()
    for log, line in (("results.jsonl", ("--five", data)), ("five.jsonl", ()), ("five.jsonl", ("--v2v", data))):
        (out / log).touch()
        text = refused("benchmark", *line, "-o", out).replace("\n", " ")
        assert f"has the run of another benchmark ({log}): choose another folder" in text
        (out / log).unlink()


def test_a_library_that_is_installed_later_is_used(data, tmp_path, monkeypatch):
    run = PublicRun("five", tmp_path, ("style",), {}, NO_MODELS | {"tracker": "x.pth"}, "cpu", 1)
    monkeypatch.delitem(sys.modules, "cotracker", raising=False)
    before = run.usable
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert (before, run.usable) == ({}, {"tracker": "x.pth"}), "rows without it are measured again"


def test_a_case_that_cannot_be_measured_leaves_the_others(data, tmp_path):
    """A mask is cut short after its edit; the questions of another case change, so that it is measured again."""
    run = PublicRun("five", tmp_path / "out", ("style",), {"steps": 1}, NO_MODELS, "cpu", 1)
    session = Session(console, no_bars, "cpu")
    cases = check_public(run, str(data), ("1", "3"), None, 2)
    run_public(session, run, cases)
    changed(data, source_yes_no_question="Is it a square?")
    mask = cases[1].mask / "00002.jpg"
    mask.write_bytes(mask.read_bytes()[:-200])
    with pytest.raises(BatchError, match=r"edit3-000.* cannot be measured: .*00002\.jpg"):
        run_public(session, run, check_public(run, str(data), ("1", "3"), None, 2))
    rows = [json.loads(line)["case"] for line in (tmp_path / "out" / "five.jsonl").read_text().splitlines()]
    assert rows == ["edit1-000", "edit3-000", "edit1-000"]
    assert "| style | all | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_lpips_of_another_net_is_refused(data, models, refused):
    text = refused("benchmark", "--five", data, "--lpips", models / "alex.safetensors", "-o", data.parent / "out")
    assert 'FiVE-Bench uses "squeeze"' in text.replace("\n", " ")


def test_a_method_that_needs_a_mask_gets_the_case_s(data, tmp_path):
    run = PublicRun("five", tmp_path / "out", ("kv_edit",), {"model": "demo-wan"}, NO_MODELS, "cpu", 1)
    case = load_five(data, ["3"], frames=2)[0]
    mask = _job(run, case, "kv_edit").values["edit_mask"]
    assert [path.name for path in sorted((tmp_path / "out" / "masks" / case.video.name).iterdir())] == [
        "00001.jpg",
        "00002.jpg",
    ]
    assert mask == str(tmp_path / "out" / "masks" / case.video.name)
    fewer = load_five(data, ["3"], frames=1)[0]
    assert len(list(Path(_job(run, fewer, "kv_edit").values["edit_mask"]).iterdir())) == 1, "none of a longer run"
    assert "edit_mask" not in _job(run, case, "attribute").values


def test_a_file_of_settings_is_a_method(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: style\nsteps: 30\nmodel: demo\n")
    run = PublicRun("five", tmp_path / "out", (), {"steps": 5}, NO_MODELS, "cpu", 1)
    values = _job(run, load_five(data)[0], str(tmp_path / "mine.yaml")).values
    assert values["preset"] == "style" and values["steps"] == 5 and values["model"] == "demo"
    assert values["lossless"] and values["count"] == FRAMES


def test_the_source_is_cut_as_the_edit_shows_it():
    frames = torch.zeros(1, 480, 854, 3)
    assert _shown(frames, 480, 832).shape == (1, 480, 832, 3)
    assert _shown(frames, 240, 427).shape == (1, 480, 854, 3)
    assert _shown(frames, 64, 64).shape == (1, 480, 480, 3)


def test_the_published_rows_are_in_the_order_of_the_columns():
    """Wan-Edit's row in Tables 2 and 3 of arXiv 2503.13684."""
    found = dict(zip((column.key for column in COLUMNS), PUBLISHED["Wan-Edit"], strict=False))
    assert found["structure"] == 12.53 and found["ssim"] == 82.55 and found["motion"] == 89.43
    assert found["niqe"] == 6.54 and found["FiVE-Acc"] == 46.97
    assert (found["YN"], found["MC"]) == (41.41, 52.53)
    assert {len(row) for name, row in PUBLISHED.items() if name != "Wan-Edit"} == {10}
