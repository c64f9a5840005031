"""`make gpu`: every row on tiny models, failures of rows, the report, and the checkout for another machine."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "scripts"
MOST = 62 * 2**20
"""Limit of the tracked files in bytes: an upload of 64 MiB, less 2 for the packages of `make gpu-wheels`."""


def start(folder, *arguments, blocked=(), rows=None):
    """`gpu.py` in a new process, without some packages, or with other rows."""
    if rows is not None:
        (folder / "gpu_rows.py").write_text(rows, encoding="utf-8")
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({tuple(blocked)!r}))
sys.path[:0] = {[str(folder), str(SCRIPTS)]!r}
sys.argv = ["gpu.py", *{[*arguments, "--out", str(folder / "out")]!r}]
runpy.run_path({str(SCRIPTS / "gpu.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


# --- every row ------------------------------------------------------------------------------

NEED_A_GPU = {
    "the hooks in a CUDA graph", "the hooks on a side stream", "a store in RAM is pinned", "style with xformers",
    *(f"{layer}: {name}" for layer in ("SD 1.5", "Wan 1.3B") for name in ("memory-efficient", "cuDNN", "xformers")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_every_row_is_measured_on_tiny_models_or_has_a_reason(tmp_path):
    blocked = ("av", "cyclopts", "cv2", "matplotlib", "xformers")  # not installed on a fresh machine
    run = start(tmp_path, "--tiny", "--device", "cpu", "--seconds", "1e6", blocked=blocked)
    run.communicate()
    assert run.returncode == 0
    rows = rows_in(tmp_path)
    assert len({(row["group"], row["name"]) for row in rows}) == len(rows) > 50
    assert {row["group"] for row in rows} == set("abcde")
    assert {row["name"] for row in rows if not row["numbers"]} == NEED_A_GPU
    for row in rows:
        if row["numbers"]:
            assert row["numbers"].keys() == row["units"].keys() and row["device"] and row["shape"], row["name"]
            assert all(math.isfinite(value) for value in row["numbers"].values()), row["name"]
        else:
            assert row["why"] and "Error" not in row["why"], row
    by_name = {row["name"]: row["numbers"] for row in rows if row["group"] in "de"}
    assert by_name["reference case reconstruct"]["float64"] < 1e-9
    assert by_name["memories agree, float32"]["maps"] < 1e-3
    assert by_name["weights that wait in RAM"]["difference"] < 1e-5


# --- processes ------------------------------------------------------------------------------

FAKE = """
import os, signal, threading
from types import SimpleNamespace

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def refuse():
    raise MemoryError("takes 12 GB of 8 GB free")

def wait():
    print("waits", flush=True)
    threading.Event().wait()

WORKS = {"first": lambda: None, "crashes": crash, "does not fit": refuse, "never ends": wait, "last": lambda: None}
ROWS = [SimpleNamespace(group="a", name=name, units={"time": "s"}, seconds=600) for name in WORKS]
ROWS[3].seconds = 0.1

def about(device):
    return {"device": "a card", "versions": "torch 1"}

def measure(number, device, tiny):
    list(WORKS.values())[number]()
    return {"numbers": {"time": float(number)}, "shape": "", "dtype": "", "scaled": ""}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_crash_and_running_out_of_memory_lose_one_row_each(tmp_path):
    run = start(tmp_path, rows=FAKE)
    assert "[" in run.communicate()[0] and run.returncode == 0
    found = {row["name"]: row.get("why") or row["numbers"] for row in rows_in(tmp_path)}
    assert found == {
        "first": {"time": 0.0},
        "crashes": "its process was killed by SIGSEGV",
        "does not fit": "MemoryError: takes 12 GB of 8 GB free",
        "never ends": "took longer than 0 s",
        "last": {"time": 4.0},
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_rows_without_time_left_stay_open(tmp_path):
    start(tmp_path, "--seconds", "0", rows=FAKE).communicate()
    assert {row["why"] for row in rows_in(tmp_path)} == {"not measured yet"} and len(rows_in(tmp_path)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_row_ends_with_the_command(tmp_path):
    rows = FAKE.replace("ROWS[3].seconds = 0.1", "del ROWS[:3], ROWS[1:]").replace(
        "list(WORKS.values())[number]", "wait"
    )
    run = start(tmp_path, rows=rows)
    while "waits" not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    run.communicate()  # ends when no process holds its output
    assert run.returncode == 143


# --- the report ------------------------------------------------------------------------------


def row(name, numbers=None, group="a", units=None, **more):
    own = {"shape": "8 frames", "dtype": "float16", "scaled": ""} if numbers else {"why": "not measured yet"}
    about = {"device": "NVIDIA H100", "versions": "torch 2.11"}
    return {"name": name, "group": group, "units": units or {"time": "s", "of plain": "x"}, "numbers": numbers or {},
            **about, **own, **more}  # fmt: skip


def test_the_report_replaces_open_rows(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nHow.\n\n## Cost\n\nkept\n\n## Last\n\nkept too\n", encoding="utf-8")

    def report(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        command = [sys.executable, SCRIPTS / "gpu_report.py", tmp_path, "--page", page]
        subprocess.run(command, check=True, capture_output=True)
        return page.read_text(encoding="utf-8")

    memory = {"with its inversion, 50 steps": "x", "memory of plain": "x"}
    wan = row("whole", group="b", units=memory)
    text = report(row("style"), row("shape"), wan)
    assert "| style | open |  | not measured yet |" in text and "All rows are open" in text and "H100" not in text
    measured = row("style", {"time": 1.23456, "of plain": 1.4})
    ours = row("whole", {"with its inversion, 50 steps": 1.9, "memory of plain": 1.032}, "b", memory)
    text = report(measured, row("shape"), ours, row("style", why="took longer than 25 s"))
    assert "NVIDIA H100; torch 2.11" in text and "All rows are open" not in text
    assert "| style | 1.23 | 1.4 | 8 frames; float16 |" in text and text.count("| style |") == 1
    assert "| shape | open |" in text
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| whole | 1.9 | 1.03 |"))
    assert "| 3.40 | 2.32 |" in lines[at + 1] and "| 1.20 | 0.95 |" in lines[at + 2]
    assert text.count("## On a GPU") == 1 and "kept\n" in text and "kept too" in text


def test_results_name_every_row():
    """Each row of `gpu_rows.py` is in RESULTS.md, with its numbers or marked open."""
    sections = (REPO / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").split("\n## ")
    page = next(section for section in sections if section.startswith("On a GPU\n"))
    for name in ("plain DDIM", "style on the whole model", "DFVEdit's table: DFVEdit", "Wan 14B: style", "tuning"):
        assert f"\n| {name} | " in page


# --- the checkout -----------------------------------------------------------------------------


def test_a_checkout_is_the_package_under_any_folder_name(tmp_path):
    folder = tmp_path / "a copy-1.0"
    (folder / "scripts").mkdir(parents=True)
    for name in ("__init__.py", "settings.py", "scripts/checkout.py"):
        (folder / name).write_bytes((REPO / name).read_bytes())
    code = """
import checkout; checkout.use_checkout()
import fatezero.settings
print(fatezero.settings.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(folder / "scripts")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == (folder / "settings.py").resolve()


def test_the_checkout_is_small_enough_to_upload():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    sizes = {
        path: (REPO / path).lstat().st_size
        for name in listed.stdout.split("\0")
        if name and (path := REPO / name).exists()
    }
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) < MOST, f"largest: {', '.join(str(path.relative_to(REPO)) for path in largest)}"
