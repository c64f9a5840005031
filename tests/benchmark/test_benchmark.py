"""The benchmark with few steps: its methods, resuming, and its tables."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from fatezero.benchmark.cases import KINDS, cases_of
from fatezero.benchmark.rows import (
    BEST,
    METHODS,
    PAPER,
    QUICK,
    Trial,
    edited,
    sdedit,
)
from fatezero.benchmark.run import (
    BenchmarkSettings,
    chosen_methods,
    load_rows,
    run_benchmark,
    strip_frames,
)
from fatezero.benchmark.table import Results, case_sheet, markdown, ranked, write_tables
from fatezero.hosts.diffusers.checkpoint import Checkpoint

SMALL = BenchmarkSettings(seed=5, each=1, kinds=KINDS[:3], frames=2, steps=2)
FEW = ("autoencoder only", "DDIM inversion + prompt", PAPER)


@pytest.fixture(scope="module")
def trial():
    return Trial(
        Checkpoint.load("demo"), cases_of([("a red square on water", "a red circle on water")], 1, 3)[0], steps=5
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("run")
    run_benchmark(made, SMALL, chosen_methods(FEW, False))
    return made


def test_every_method_of_the_comparison_has_a_row():
    names = [m.name for m in METHODS]
    assert len(set(names)) == len(names)
    for part in ("autoencoder only", "DDIM inversion + prompt", "SDEdit 0.4", "SDEdit 0.6", "SDEdit 0.8", "clip norm"):
        assert part in names
    assert {PAPER, BEST} <= set(QUICK) <= set(names)


ONE_OF_EACH = (*QUICK, "attention of the reconstruction", "blended self fusion", "PnP, TokenFlow")


@pytest.mark.slow
@pytest.mark.parametrize("methods", [chosen_methods(ONE_OF_EACH, False), pytest.param(METHODS, marks=pytest.mark.slow)])
def test_every_method_edits_and_all_results_differ(trial, methods):
    latents = edited(trial, methods)
    assert list(latents) != [] and set(latents) == {m.name for m in methods}
    assert all(z.shape == (3, 4, 16, 16) and z.isfinite().all() for z in latents.values())
    assert torch.equal(latents["autoencoder only"], trial.latents)
    # The case is one of shape, for which the paper's settings are the blend, and key frames self and middle; what is
    # made steady is so when it is decoded; of so few steps FlowEdit leaves none in which FateZero+ fuses.
    same = {PAPER, "blended self fusion", "key frames self, middle", "FateZero+, flow smoothing, steady",
            "Wan: FlowEdit with FateZero+"}  # fmt: skip
    others = [(name, z) for name, z in latents.items() if name not in same]
    assert [(n, m) for i, (n, a) in enumerate(others) for m, b in others[:i] if torch.allclose(a, b)] == []
    assert torch.allclose(latents[PAPER], latents["blended self fusion"])


@pytest.mark.slow
def test_methods_do_not_depend_on_each_other(trial):
    single = edited(trial, [m for m in METHODS if m.name == PAPER])[PAPER]
    together = edited(trial, chosen_methods(FEW, False))[PAPER]
    assert torch.allclose(single, together, atol=1e-5)


def test_sdedit_preserves_less_at_higher_strength(trial):
    """At guidance 7.5 a single step of five overshoots, so the prompt is the source's and plain."""
    plain = replace(trial, guidance_scale=1.0)
    plain.target = plain.source
    distances = [(sdedit(s)(plain) - plain.latents).abs().mean().item() for s in (0.2, 0.6, 1.0)]
    assert distances == sorted(distances) and distances[0] < 0.7 * distances[2]


def test_a_run_writes_a_row_and_a_strip_for_each_case_and_method(folder):
    rows = load_rows(folder)
    assert len(rows) == len(SMALL.kinds) * len(FEW)
    assert {row["kind"] for row in rows} == set(SMALL.kinds)
    case = rows[0]["case"]
    assert strip_frames(folder, case, "source").shape == (2, 64, 64, 3)
    assert not torch.equal(strip_frames(folder, case, "source"), strip_frames(folder, case, "truth"))


def test_a_stopped_run_resumes(folder, tmp_path):
    """Truncated and missing rows are computed; complete rows are kept."""
    whole = load_rows(folder)
    lines = (folder / "results.jsonl").read_text().splitlines()
    (tmp_path / "settings.json").write_text((folder / "settings.json").read_text())
    marked = json.loads(lines[0]) | {"truth_db": 99.0}
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps(marked), *lines[1:7], lines[7][:40]]) + "\n")
    steps = []
    again = run_benchmark(tmp_path, SMALL, chosen_methods(FEW, False), progress=lambda *at: steps.append(at))
    assert steps[0] == (2, 3) and steps[-1] == (3, 3)
    key = lambda row: (row["case"], row["method"])  # noqa: E731
    assert sorted(map(key, again)) == sorted(map(key, whole))
    assert again[0]["truth_db"] == 99.0, "finished rows were not computed again"
    by_key = {key(row): row for row in again[1:]}
    for row in whole[1:]:
        assert by_key[key(row)]["truth_db"] == pytest.approx(row["truth_db"], abs=1e-3)


@pytest.mark.slow
def test_several_processes_give_the_same_rows(folder, tmp_path):
    pairs = (("a red square on water", "a green square on water"), ("a red star on sand", "a red circle on sand"))
    settings = BenchmarkSettings(seed=5, frames=2, steps=2, pairs=pairs)
    rows = run_benchmark(tmp_path / "two", settings, chosen_methods(FEW[1:2], False), workers=2)
    single = run_benchmark(tmp_path / "one", settings, chosen_methods(FEW[1:2], False))
    assert [row["case"] for row in rows] == ["given-00", "given-01"]
    assert [row["truth_db"] for row in rows] == pytest.approx([row["truth_db"] for row in single], abs=1e-3)


def test_other_settings_need_another_folder(folder):
    with pytest.raises(ValueError, match="steps 2, not 3"):
        run_benchmark(folder, replace(SMALL, steps=3), chosen_methods(FEW, False))


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'Magic'"):
        chosen_methods(["Magic"], True)


# --- tables -------------------------------------------------------------------------------


def row(case, method, success, db, kind="shape"):
    return {
        "case": case, "kind": kind, "method": method, "success": success, "changed": success, "kept": 1.0,
        "preserved_db": db, "truth_db": db, "object_iou": 0.5, "warp_error": 1.0, "source": "s", "target": "t",
    }  # fmt: skip


def test_tables_list_errors_and_gains_next_to_the_papers():
    rows = [row(f"c{i}", PAPER, 0.5, 20.0) for i in range(4)] + [row(f"c{i}", BEST, 0.75, 22.0) for i in range(4)]
    relative = Results(rows).compared(BEST, PAPER)
    assert relative.wrong == (0.5, 0.5, 0.5)
    assert relative.squared == pytest.approx((10**-0.2,) * 3)
    assert relative.kept == (2, 2, 2)
    text = markdown(Results(rows))
    assert f"| {PAPER} | 4 | 50 |" in text and "| 0.50 | 0.63 | 2.0 |" in text


def test_missing_figures_are_empty():
    text = markdown(Results([row("c0", PAPER, 1.0, math.nan, "style"), row("c1", PAPER, 0.0, 20.0)]))
    assert "| 2 | 50 (0 to 100) |" in text
    assert "| 100 | 0 / 20.0 |" in text or "| 0 / 20.0 | 100 |" in text


def test_best_and_worst(folder, tmp_path):
    rows = [row("a", BEST, 0.5, 30.0), row("b", BEST, 1.0, 20.0), row("c", BEST, 1.0, 25.0)]
    assert ranked(Results(rows), BEST) == ["c", "b", "a"]
    loaded = load_rows(folder)
    picture = case_sheet(folder, Results(loaded), loaded[0]["case"], FEW, "title")
    assert picture.width > 200 and picture.height > 5 * 96


def test_tables_and_a_page_are_written(folder):
    rows = load_rows(folder)
    text = write_tables(folder, rows, PAPER)
    assert (folder / "table.md").read_text() == text
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    means = {(line["method"], line["kind"], line["figure"]): float(line["mean"]) for line in lines}
    kept = [r["kept"] for r in rows if r["method"] == PAPER]
    assert means[PAPER, "all", "kept"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    page = (folder / "page.html").read_text()
    for picture in {part.split("'")[0] for part in page.split("src='")[1:]}:
        assert (folder / picture).is_file()
    assert page.count("<h3>") == len(SMALL.kinds)
