"""`fatezero batch`: files of jobs, killed processes, interrupted runs, a cluster."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest
import yaml
from commands import COMMAND, frames_written, summary_rows, two_clips
from PIL import Image

from fatezero.cli.batch.jobs import Job, load_batch
from fatezero.cli.batch.processes import Devices, RetryPolicy, run_here
from fatezero.cli.batch.summary import Row, write_summary
from fatezero.cli.batch.work import WorkerOptions, config_for, groups_of
from fatezero.cli.config.settings import ConfigError

SOURCE = "a red square on water"
COLOURS = ("green", "blue", "yellow", "cyan", "purple")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def write(folder: Path, content, name="jobs.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two clips, as the current directory."""
    monkeypatch.chdir(tmp_path)
    return two_clips(tmp_path)


# --- files of jobs ------------------------------------------------------------------------------


def test_axes_are_combined_and_later_values_override_earlier(folder):
    batch = load_batch(write(folder, {
        "steps": 9,
        "source": SOURCE,
        "clips": ["clips/*.mp4", {"video": "clips/a.mp4", "name": "short", "count": 2}],
        "methods": {"soft": {"preset": "style", "guidance_scale": 3}, "hard": {"preset": "shape"}},
        "settings": [{"steps": 4}, {"steps": 5, "guidance_scale": 6}],
        "targets": ["a green square on water", {"target": "a red star on water", "steps": 7}],
        "jobs": [{"video": "clips/b.mp4", "target": "a blue square on water", "preset": "pnp"}],
    }))  # fmt: skip
    assert len(batch.jobs) == 3 * 2 * 2 * 2 + 1
    assert len({job.name for job in batch.jobs}) == len(batch.jobs)
    configs = [config_for(job) for job in batch.jobs]
    of_star = [config for config in configs if "star" in config.target]
    assert {config.steps for config in of_star} == {7}
    green = [(c.guidance_scale, c.steps, c.self_replace_steps) for c in configs[:8] if "green" in c.target]
    assert green == [(3, 4, 0.8), (6, 5, 0.8), (7.5, 4, 0.5), (6, 5, 0.5)]
    assert configs[-1].injection == "pnp" and configs[-1].steps == 9
    assert batch.jobs[0].labels == {
        "clips": "a", "methods": "soft", "settings": "steps 4", "targets": "a green square on water",
    }  # fmt: skip
    assert Counter(job.labels["clips"] for job in batch.jobs) == {"a": 8, "b": 9, "short": 8}


def test_a_jobs_name_does_not_depend_on_other_jobs(folder):
    content = {"source": SOURCE, "clips": "clips/a.mp4", "targets": ["x", "y"]}
    before = {job.name for job in load_batch(write(folder, content)).jobs}
    content |= {"clips": "clips/*.mp4", "targets": ["z", "y", "x"]}
    after = {job.name for job in load_batch(write(folder, content)).jobs}
    assert before < after
    content["steps"] = 3
    assert not before & {job.name for job in load_batch(write(folder, content)).jobs}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "contains no jobs"),
        ([1], "contains no jobs"),
        ({"clips": []}, "clips is empty"),
        ({"clips": [3]}, "clips: 3 must be a text"),
        ({"clips": "nowhere/*.mp4", "targets": "x"}, "no clips at nowhere/*.mp4"),
        ({"clips": "a.mp4", "suffix": ".txt"}, "suffix is '.txt'"),
        ({"clips": "a.mp4", "inputs": [1]}, "inputs is [1]"),
        ({"jobs": "a.mp4", "workflow": 3}, "workflow is 3"),
        ({"jobs": "a.mp4", 1: 2, "steps": 3}, "1 is not the name of a setting"),
        ({"clips": "a.mp4", "targets": ["x", {"reweight": {1: 2, "x": 3}}]}, "1 is not the name of a setting"),
        ("jobs: &a [{video: a.mp4}, *a]", "a part of it contains itself"),
        ("clips: a.mp4\nsettings: &a {pnp: *a}", "a part of it contains itself"),
        ("jobs: a.mp4\njobs: b.mp4", "line 2: 'jobs' is given twice"),
        ({"jobs": "a.mp4", "inputs": ["x" * 10**6]}, "inputs is ['xx"),
    ],
)
def test_invalid_job_files(folder, content, message):
    with pytest.raises(ConfigError, match=r"jobs\.yaml") as refused:
        load_batch(write(folder, content))
    assert message in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"target": "x"}, "missing --source"),
        ({"source": "x"}, "missing --target"),
        ({"source": "x", "target": "y", "stebs": 3}, "did you mean 'steps'?"),
        ({"source": "x", "target": "y", "preset": "nonsense"}, "preset 'nonsense' is unknown"),
    ],
)
def test_invalid_settings_are_refused_before_any_job_runs(refused, folder, job, message):
    write(folder, {"jobs": [{"video": "clips/a.mp4", **job}]})
    assert message in refused("batch", "jobs.yaml")
    assert not (folder / "jobs").exists()


def test_jobs_that_need_the_same_inversion_share_it(folder):
    settings = [{"guidance_scale": 3}, {}]
    content = {"source": SOURCE, "clips": "clips/*.mp4", "targets": list(COLOURS), "settings": settings}
    content["jobs"] = [
        {"video": "clips/a.mp4", "target": "x", "steps": 3},
        {"video": "clips/a.mp4", "target": "y", "preset": "flow_edit"},
        {"video": "clips/a.mp4", "target": "z", "preset": "flow_edit"},
    ]
    batch = load_batch(write(folder, content))
    groups = groups_of([(job, config_for(job)) for job in batch.jobs])
    assert [(bool(group.inversion), len(group.edits)) for group in groups] == [
        (True, 10), (True, 10), (False, 1), (False, 1), (False, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("own", [{"first_frame": "a.png"}, {"guide_frame": ["3: a.png"]}])
def test_an_edit_with_frames_of_its_own_shares_no_inversion(folder, own):
    jobs = [{"video": "clips/a.mp4", "target": target, **own} for target in ("x", "y")]
    batch = load_batch(write(folder, {"source": SOURCE, "jobs": jobs}))
    groups = groups_of([(job, config_for(job)) for job in batch.jobs])
    assert [(group.inversion, len(group.edits)) for group in groups] == [(None, 1), (None, 1)]


# --- runs ---------------------------------------------------------------------------------------


def test_a_batch_gives_the_results_of_single_edits(command, folder):
    content = {
        "source": SOURCE, "steps": 2, "count": 3, "clips": ["clips/a.mp4", "clips/none.mp4"],
        "targets": ["a green square on water", "a red circle on water"], "methods": ["shape"],
    }  # fmt: skip
    write(folder, content)
    output = command("batch", "jobs.yaml", code=1)
    assert "2 shared inversions save 2" in output
    assert "2 of 4 jobs failed" in output and "its inversion: no video at clips/none.mp4" in output
    found = summary_rows(folder / "jobs")
    assert Counter(row["status"] for row in found) == {"done": 2, "failed": 2}
    assert all(float(row["PSNR to source"]) > 5 for row in found if row["status"] == "done")
    names = [row["result"] for row in found if row["status"] == "done"]
    shown = (folder / "jobs" / "index.html").read_text()
    assert all(name in shown for name in names) and "no video at clips/none.mp4" in shown
    assert len(list((folder / "jobs" / "sources").iterdir())) == 1
    assert not (folder / "jobs" / "stores").exists()

    name = next(name for name in names if "circle" in name)
    command("edit", "--config", f"jobs/{name}.json", "-o", "again.mp4")
    assert frames_written(folder / "again.mp4") == frames_written(folder / "jobs" / name)

    shutil.copy(folder / "jobs" / name, folder / "clips" / "none.mp4")
    assert "4 jobs, 2 of them done" in command("batch", "jobs.yaml", "--dry-run")
    shutil.copy(folder / "jobs" / name, folder / "clips" / "a.mp4")  # another clip under the name of a finished one
    assert "4 jobs\n" in command("batch", "jobs.yaml", "--dry-run")


@pytest.mark.slow
def test_a_batch_resumes(command, folder):
    content = {
        "source": SOURCE, "steps": 2, "count": 3, "clips": ["clips/a.mp4", "clips/none.mp4"],
        "targets": ["a green square on water", "a red circle on water"], "methods": ["shape"],
    }  # fmt: skip
    write(folder, content)
    command("batch", "jobs.yaml", code=1)
    names = [row["result"] for row in summary_rows(folder / "jobs") if row["status"] == "done"]
    times = {name: (folder / "jobs" / name).stat().st_mtime_ns for name in names}
    shutil.copy(folder / "jobs" / names[0], folder / "clips" / "none.mp4")
    content["targets"] += ["a blue square on water"]
    write(folder, content)
    output = command("batch", "jobs.yaml", "--no-measure")
    assert "6 jobs, 2 of them done" in output
    assert {row["status"] for row in summary_rows(folder / "jobs")} == {"done"}
    assert times == {name: (folder / "jobs" / name).stat().st_mtime_ns for name in names}
    assert "6 jobs\n" in command("batch", "jobs.yaml", "--dry-run", "--redo")


def test_a_job_with_another_mask_than_before_is_not_done(command, folder):
    job = {"video": "clips/a.mp4", "source": SOURCE, "target": f"a {COLOURS[0]} square on water"}
    write(folder, {"jobs": [{**job, "steps": 1, "count": 2, "preset": "shape", "edit_mask": "mask.png"}]})
    Image.new("L", (64, 64), 255).save(folder / "mask.png")
    command("batch", "jobs.yaml", "--no-measure")
    assert "1 of them done" in command("batch", "jobs.yaml", "--dry-run")
    Image.new("L", (64, 64), 128).save(folder / "mask.png")
    assert "done" not in command("batch", "jobs.yaml", "--dry-run")


@pytest.mark.slow
def test_a_resumed_run_completes_metrics_and_bad_jobs_do_not_stop_it(command, folder):
    """Metrics missing after a kill, a truncated line, a result that could not be measured, and jobs
    that are invalid.
    """
    clip = {"video": "clips/a.mp4", "source": SOURCE, "steps": 1, "count": 2}
    good = [{**clip, "target": f"a {colour} square on water"} for colour in COLOURS[:3]]
    bad = [
        {**clip, "target": " "}, {**clip, "target": "=1+1", "steps": "many"}, None,
        {"video": "clips/*.avi", "source": SOURCE, "target": "x"},
    ]  # fmt: skip
    write(folder, {"jobs": [*good, *bad]})
    output = command("batch", "jobs.yaml", code=1)
    assert "4 of 7 jobs failed" in output and "target is ' '; it must not be blank" in output
    rows = summary_rows(folder / "jobs")
    assert [row["status"] for row in rows] == ["done"] * 3 + ["failed"] * 4
    messages = ["target is ' '", "steps is 'many'", "video is None", "no pictures at clips/*.avi"]
    assert all(what in row["error"] for what, row in zip(messages, rows[3:], strict=True))
    figures = [row["PSNR to source"] for row in rows[:3]]
    assert all(map(float, figures))

    log = folder / "jobs" / "jobs.jsonl"
    first, second, third = (line for line in log.read_text().splitlines() if '"error": null' in line)
    broken = json.dumps({**json.loads(second), "figures": {}, "error": "its figures: no room"})
    log.write_text(f"{first}\n{broken}\n{third[:40]}")
    written = {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.mp4")}
    output = command("batch", "jobs.yaml", code=1)
    assert "7 jobs, 3 of them done" in output and "2 finished jobs have no metrics yet" in output
    assert [row["PSNR to source"] for row in summary_rows(folder / "jobs")[:3]] == figures
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*.mp4")}
    assert "no metrics yet" not in command("batch", "jobs.yaml", "--dry-run", code=1)


def test_a_summary_is_safe_in_spreadsheets_and_browsers(tmp_path):
    texts = ["=1+1", "+x", "-x", "@x", "\t=x", "\uff1dx", "'=x", "-0.5", "+3e2", "it's", "<b>"]
    texts += ["a\x00b\x1b[1m", "\ud800"]
    rows = [
        Row(Job(f"job{i}", {}, {"targets": text}), tmp_path / f"{i}.mp4", "failed", text, figures={"loss": -0.5})
        for i, text in enumerate(texts)
    ]
    write_summary(tmp_path, rows, {})
    page, table = (tmp_path / "index.html").read_bytes(), (tmp_path / "summary.csv").read_text()
    assert not any(byte in page for byte in (b"\0", b"\x1b")) and b"a\\x00b\\x1b[1m" in page and b"<b></b>" not in page
    assert "\0" not in table and ",'=1+1," in table and ",-0.5," in table
    found = summary_rows(tmp_path)
    assert [row["target"] for row in found] == [*texts[:-2], "a\\x00b\\x1b[1m", "\\ud800"]
    assert {row["loss"] for row in found} == {"-0.5"}


def children(process: int) -> list[int]:
    """The worker processes of a run."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(what):
    while not (found := what()):
        time.sleep(0.02)
    return found


def kill_workers(count: int) -> None:
    """Kill the first worker processes of this run as they start."""

    def kill() -> None:
        killed: set[int] = set()
        for _ in range(count):
            worker = wait_for(lambda: [child for child in children(os.getpid()) if child not in killed])[0]
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)

    Thread(target=kill, daemon=True).start()


def lines(folder: Path) -> list[dict]:
    log = folder / "jobs.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_with_trouble(folder: Path, count: int, stops: tuple[signal.Signals, ...]) -> None:
    """A batch in which some jobs fail, processes are killed and the run is interrupted."""
    clip = {"video": "clips/a.mp4", "count": 1, "source": SOURCE}
    jobs = [
        {**clip, "target": f"a {COLOURS[i % 5]} square on water", "guidance_scale": 2 + i / 100} for i in range(count)
    ]
    for i in range(0, count, 10):
        jobs[i] |= {"video": f"clips/missing_{i}.mp4"}
    write(folder, {"steps": 1, "jobs": jobs})
    command = [*COMMAND, "batch", "jobs.yaml", "--workers", "2", "--no-measure"]
    for stop in (*stops, None):
        before = len(lines(folder / "jobs"))
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ONE_THREAD)
        if stop is not None:
            wait_for(lambda at=before: len(lines(folder / "jobs")) > at + 2)
            os.kill(wait_for(lambda r=run: children(r.pid))[0], signal.SIGKILL)
            wait_for(lambda at=before: len(lines(folder / "jobs")) > at + 4)
            workers = children(run.pid)
            run.send_signal(stop)
            wait_for(lambda ws=workers: not any(Path(f"/proc/{w}").exists() for w in ws))
        output = run.communicate()[0].decode()
        assert "Traceback" not in output
    found = summary_rows(folder / "jobs")
    failed = {row["job"]: row["error"] for row in found if row["status"] == "failed"}
    assert len(failed) == len(range(0, count, 10)), failed
    assert all("no video at" in error for error in failed.values())
    assert Counter(row["status"] for row in found) == {"done": count - len(failed), "failed": len(failed)}
    done = Counter(line["name"] for line in lines(folder / "jobs") if line["error"] is None)
    assert max(done.values()) == 1, "no job ran twice"
    assert not list((folder / "jobs").rglob("*partial*"))


@pytest.mark.slow
def test_failures_among_a_hundred_jobs(folder):
    run_with_trouble(folder, 100, (signal.SIGTERM, signal.SIGKILL, signal.SIGINT))


@pytest.mark.slow
def test_failures_of_some_jobs_do_not_affect_the_others(command, folder):
    """One job whose process dies is retried; another has no clip."""
    clip = {"video": "clips/a.mp4", "source": SOURCE, "count": 1, "steps": 1}
    dies, lost, good = (f"a {colour} square on water" for colour in COLOURS[:3])
    write(folder, {"jobs": [
        {**clip, "target": dies, "count": 2},
        {**clip, "target": lost, "video": "clips/lost.mp4"}, {**clip, "target": good},
    ]})  # fmt: skip
    kill_workers(1)
    assert "1 of 3 jobs failed" in command("batch", "jobs.yaml", "--retries", "1", "--no-measure", code=1)
    ended = {line["name"].split("-")[1]: line for line in lines(folder / "jobs")}
    results = {colour: (line["error"], line["attempts"]) for colour, line in ended.items()}
    assert results == {"green": (None, 2), "blue": ("no video at clips/lost.mp4", 1), "yellow": (None, 1)}
    assert not list((folder / "jobs").rglob("*partial*"))


@pytest.mark.slow
def test_a_job_whose_processes_die_is_reported(command, folder):
    jobs = {"jobs": [{"video": "clips/a.mp4", "source": SOURCE, "target": "a green square on water", "steps": 600}]}
    write(folder, jobs)
    kill_workers(2)
    output = command("batch", "jobs.yaml", "--retries", "1", code=1)
    assert "its process was ended by SIGKILL" in output
    assert [(line["attempts"], line["error"] is None) for line in lines(folder / "jobs")] == [(2, False)]


def test_two_runs_in_one_folder(refused, folder):
    import fcntl

    write(folder, {"jobs": [{"video": "clips/a.mp4", "source": SOURCE, "target": "x"}]})
    (folder / "jobs").mkdir()
    lock = os.open(folder / "jobs", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "jobs is in use by another run" in refused("batch", "jobs.yaml")
    os.close(lock)


@pytest.mark.slow
def test_a_failed_inversion_fails_only_its_edits(folder):
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    content = {"source": SOURCE, "steps": 1, "count": 1, "clips": "clips/*.mp4", "targets": ["x", "y"]}
    batch = load_batch(write(folder, content))
    groups = groups_of([(job, config_for(job)) for job in batch.jobs])
    places = Devices(("cpu",), WorkerOptions(measures=False), 1)
    (folder / "out").mkdir()
    ended = list(run_here(groups, folder / "out", folder / "out" / "stores", ".mp4", places, RetryPolicy()))
    assert len(ended) == 6
    assert all(("broken" in one.name) == (one.error is not None) for one in ended)
    assert all("its inversion: " in one.error and "not a readable video" in one.error for one in ended if one.error)


def test_a_job_beyond_its_timeout_is_stopped(folder):
    content = {"source": SOURCE, "jobs": {"video": "clips/a.mp4", "target": "a green square on water"}}
    (job,) = load_batch(write(folder, content)).jobs
    places, patience = Devices(("cpu",), WorkerOptions(measures=False), 1), RetryPolicy(timeout=0.01)
    (ended,) = run_here(groups_of([(job, config_for(job))]), folder, folder / "stores", ".mp4", places, patience)
    assert ended.error == "it took more than 0.01 seconds" and ended.attempts == 1
    assert not list(folder.glob("*.mp4*"))
