"""The pages: links work, command lines parse, examples run, tables match the code."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler

from fatezero.cli.app import app
from fatezero.cli.batch.jobs import load_batch
from fatezero.cli.config.files import load_configs
from fatezero.demo.model import build_scheduler
from fatezero.demo.video_model import build_tokenizer
from small import TEXT, random_latents, small_unet
from tests.joint import random_streams, small_h3
from tests.wan import small_wan

REPO = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "web/docs/*.md", "workflows/*.md", "demo/*/*.md", "benchmarks/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in REPO.glob(pattern))


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for own, text in found if own == language]


def prose(page: Path) -> str:
    """A page without code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_point_to_files_and_headings(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong


def command_lines(page: Path) -> list[str]:
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if re.search(r"(^|-m )fatezero ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_command_lines_parse(page):
    for line in command_lines(page):
        words = shlex.split(re.sub(r"^.*?-m (?=fatezero)", "", line))[1:]
        if words[-1] != "...":
            app.parse_args(words, exit_on_error=False, print_error=False)


def test_options_in_the_text_exist():
    known = {name for command in app if command != "--help" for name in options_of(command)}
    known |= {"--help-all", "--nproc-per-node", "--only", "--tiny", "--device"}
    for page in (REPO / "README.md", *REPO.glob("docs/**/*.md")):
        named = set(re.findall(r"`(--[a-z][a-z.-]*)", prose(page)))
        assert named <= known, page


def options_of(command: str) -> set[str]:
    if command.startswith("-"):
        return {command}
    return {name for argument in app[command].assemble_argument_collection() for name in argument.names}


def test_example_files_of_settings_and_jobs_are_valid(tmp_path, monkeypatch):
    (tmp_path / "jeeps").mkdir()
    for name in ("jeeps/a.mp4", "swan.mp4", "clip.mp4"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    read = 0
    for page in REPO.glob("docs/**/*.md"):
        for text in blocks(page, "yaml"):
            file = tmp_path / "file.yaml"
            file.write_text(text, encoding="utf-8")
            read += len(load_batch(file).jobs if "clips:" in text else load_configs(file)[0])
    assert read > 5


def test_reference_pages_match_the_code():
    for page, text in runpy.run_path(str(REPO / "scripts" / "write_docs.py"))["written"]().items():
        assert page.read_text(encoding="utf-8") == text, "python scripts/write_docs.py writes it"


def test_readme_is_short_and_begins_with_two_commands():
    readme = REPO / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 100
    assert blocks(readme, "")[0] == "make demo\nmake test\n"


def test_examples_run(tmp_path, monkeypatch, tokenizer):
    """The first loads the demo model; the others run on smaller models with fewer steps."""
    first, *others = blocks(REPO / "docs" / "python.md", "python")
    names: dict[str, object] = {}
    monkeypatch.chdir(REPO)
    exec(first, names)
    assert len(names["images"]) == len(names["latents"]) == 8
    monkeypatch.chdir(tmp_path)
    names |= small()
    names["tokenizer"] = tokenizer
    for example in others:
        exec(re.sub(r"\bsteps=\d+", "steps=4", example), names)
    assert torch.isfinite(names["edited"]).all()


def small() -> dict[str, object]:
    """Models and inputs under the names used by the examples."""

    def text(prompt: str, tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, TEXT, dtype=torch.float64, generator=torch.Generator().manual_seed(len(prompt)))

    return {
        "unet": small_unet(),
        "scheduler": build_scheduler(),
        "encode": lambda prompt: text(prompt, 77),
        "decode": list,
        "latents": random_latents(3),
        "pixels": torch.rand(3, 3, 64, 64),
        "transformer": small_wan(),
        "flow_scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "wan_latents": random_latents(3, 8, 6),
        "wan_encode": lambda prompt: text(prompt, 512),
        "wan_tokenizer": build_tokenizer(),
        "h3_transformer": small_h3(),
        "h3_scheduler": MiniMaxH3Scheduler(),
        "video": random_streams()[0],
        "sound": random_streams()[1],
        "h3_encode": lambda prompt: text(prompt, 12),
    }


def test_excerpts_match_the_method():
    """Except for white space, because the formatter removes the indentation of methods."""
    source = "".join((REPO / "methods" / "kv_edit.py").read_text(encoding="utf-8").split())
    excerpts = blocks(REPO / "docs" / "dev" / "add-a-method.md", "python")
    assert excerpts
    assert all("".join(excerpt.split()) in source for excerpt in excerpts)
