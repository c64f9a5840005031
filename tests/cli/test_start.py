"""Without torch: help, version, and every refusal of options and files."""

import json
import shlex
import subprocess
import sys

import pytest

from fatezero.cli.app import app
from fatezero.cli.help import PAGES, page_of

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "av", "numpy", "PIL")
COMMANDS = ("edit", "invert", "tune", "generate", "evaluate", "demo", "batch", "benchmark", "train-demo")
WORDS = ("clip.mp4", "--source", "a red square", "--target", "a green square")
FILES = {
    "unknown.yaml": "stebs: 3\n",
    "no.yaml": "[1, 2",
    "wrong.yaml": "guidance_scale: much\n",
    "preset.yaml": "preset: nonsense\n",
    "jobs.yaml": "clips: []\n",
    "job.yaml": "jobs: [{video: a.mp4, source: x, target: y, stebs: 3}]\n",
    "record.json": '{"made": 3}',
}
REFUSED = {
    ("edit", "--nonsense"): "unknown option --nonsense",
    ("edit",): "missing VIDEO",
    ("edit", "clip.mp4", "--target", "x"): "missing --source",
    ("edit", *WORDS, "--steps", "0"): "steps is 0",
    ("edit", *WORDS, "--steps", "many"): "many",
    ("edit", *WORDS, "--guidance-scale", "nan"): "guidance_scale is",
    ("edit", *WORDS, "--preset", "nonsense"): "preset 'nonsense' is unknown",
    ("edit", *WORDS, "--pnp.feature-steps", "2"): "feature_steps is 2",
    ("edit", *WORDS, "--tokenflow.seed", "3"): "tokenflow has no effect here",
    ("edit", *WORDS, "--config", "none.yaml"): "no configuration at none.yaml",
    ("edit", *WORDS, "--config", "unknown.yaml"): "did you mean 'steps'?",
    ("edit", *WORDS, "--config", "no.yaml"): "is not YAML",
    ("edit", *WORDS, "--config", "wrong.yaml"): "guidance_scale is 'much'",
    ("edit", *WORDS, "--config", "preset.yaml"): "preset 'nonsense' is unknown",
    ("edit", "--config", "record.json"): "made",
    ("invert", "clip.mp4"): "missing --source",
    ("tune", "clip.mp4"): "missing --prompt",
    ("tune", "clip.mp4", "--prompt", "x", "--keep-every", "0"): "keep_every is 0",
    ("tune", "clip.mp4", "--prompt", "x", "--keep-every", "1.5"): "'1.5'; it must be a whole number",
    ("batch", "job.yaml", "--workers", "1.5"): "'1.5'; it must be a whole number",
    ("benchmark", "--steps", "2.5"): "'2.5'; it must be a whole number",
    ("generate",): "missing --prompt",
    ("evaluate", "a.mp4", "b.mp4", "--crop", "1"): "crop is '1'",
    ("batch", "jobs.yaml"): "clips is empty",
    ("batch", "job.yaml", "--comfyui", "http://x", "--ray", "auto"): "only one of --ray and --comfyui",
    ("benchmark", "--pairs", "unknown.yaml"): "must be a list of",
    ("edit", "clip.mp4", "stray"): "unexpected argument 'stray'",
    ("edit", "--target"): "--target needs a value",
    ("edit", *WORDS, "--steps", "3", "--steps", "4"): "--steps is given twice",
    ("edti",): "did you mean edit?",
    ("evaluate", "a.mp4"): "missing EDITED",
    ("demo", "--steps", "0"): "steps is 0",
    ("demo", "--steps", str(10**30)): "steps is 1000000",
    ("demo", "-o", "no.yaml"): "no.yaml is not a folder",
    ("demo", "-o", "no.yaml/out"): "no.yaml is not a folder",
    ("demo", "-o", "\udcff"): "UTF-8",
    ("tune", "clip.mp4", "--prompt", "x", "-o", "no.yaml"): "no.yaml is not a folder",
    ("tune", "clip.mp4", "--prompt", "x", "--learning-rate", "inf"): "learning_rate is inf",
    ("benchmark", "-o", "no.yaml"): "no.yaml is not a folder",
    ("benchmark", "--frames", "-1"): "frames is -1",
    ("benchmark", "--steps", "0"): "steps is 0",
    ("benchmark", "--each", "0"): "each is 0",
    ("benchmark", "--seed", "-1"): "seed is -1",
    ("benchmark", "--workers", "0"): "workers is 0",
    ("benchmark", "--guidance-scale", "nan"): "guidance_scale is nan",
    ("benchmark", "--pairs", "none.yaml"): "none.yaml",
    ("benchmark", "--pairs", "."): "pairs: no file at .",
    ("train-demo", "--steps", "0"): "steps is 0",
    ("train-demo", "--part", "all"): "it must be one of image, video, transformer",
    ("train-demo", "--state", "no.yaml"): "no.yaml is not a folder",
    ("generate", "--prompt", "x", "--frames", "0"): "frames is 0",
    ("generate", "--prompt", "x", "--fps", "nan"): "fps is nan",
    ("generate", "--prompt", "x", "--size", "0x64"): "size is 0x64",
    ("generate", "--prompt", " "): "prompt is ' '",
    ("evaluate", "a.mp4", "b.mp4", "--stride", "0"): "stride is 0",
    ("evaluate", "a.mp4", "b.mp4", "--start", "-1"): "start is -1",
    ("evaluate", "a.mp4", "b.mp4", "--how", "upside down"): "how is 'upside down'",
    ("evaluate", "a.mp4", "b.mp4", "--flow", "nope"): "flow is 'nope'",
    ("evaluate", "a.mp4", "b.mp4", "--plot", "p.txt"): "plot is 'p.txt'",
    ("evaluate", "a.mp4", "b.mp4", "--judge"): "judge needs --source and --target",
    ("evaluate", "a.mp4", "b.mp4", "--mask", " "): "mask is ' '",
    ("batch", "job.yaml", "--workers", "0"): "workers is 0",
    ("batch", "job.yaml", "--timeout", "nan"): "timeout is nan",
    ("batch", "job.yaml", "--timeout", "0"): "timeout is 0",
    ("batch", "job.yaml", "--retries", "-1"): "retries is -1",
    ("batch", "job.yaml", "--ray-cpus", "-1"): "ray_cpus is -1",
    ("batch", "job.yaml", "--comfyui", "localhost:8188"): "comfyui is 'localhost:8188'",
    ("batch", "."): "no jobs at .",
    ("batch", "job.yaml", "-o", "no.yaml"): "no.yaml is not a folder",
}
START = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from fatezero.cli.app import main

found = []
for line in json.load(sys.stdin):
    sys.argv, output = ["fatezero", *line], io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            main()
        except SystemExit as end:
            found.append((end.code, output.getvalue(), sorted(sys.modules)))
print(json.dumps(found))
"""


def started(lines, folder):
    """The status, output and imported modules of each command line, all run in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", START], input=json.dumps(lines), capture_output=True, text=True, check=True, cwd=folder
    )
    return json.loads(done.stdout)


def test_neither_help_nor_a_refusal_imports_heavy_modules(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    help = [
        ("--help",),
        ("--version",),
        (),
        *((name, flag) for name in COMMANDS for flag in ("--help", "-h", "--help-all")),
    ]
    lines = [*help, *REFUSED]
    for line, (code, output, modules) in zip(lines, started(lines, tmp_path), strict=True):
        assert [name for name in HEAVY if name in modules] == [], line
        if line in REFUSED:
            assert code == 1 and REFUSED[line] in " ".join(output.split()), (line, output)
            assert len(output.splitlines()) == 1, output
        else:
            assert not code and output, line
            assert "error" not in output.splitlines()[0], output


@pytest.mark.parametrize("command", PAGES)
def test_a_page_of_help_fits_a_terminal(command):
    for width in (50, 80, 120):
        lines = page_of(app, command, width)
        assert max(map(len, "\n".join(lines).split("\n"))) <= max(width, 80)
        assert len("\n".join(lines).split("\n")) <= 60 or width < 80
    assert f"fatezero {command} --help-all" in lines[-1]


@pytest.mark.parametrize("command", PAGES)
def test_the_command_takes_the_example_of_its_page(command):
    line = shlex.split(" ".join(PAGES[command].example))
    app.parse_args([command, *line], print_error=False, exit_on_error=False)
