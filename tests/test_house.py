"""Import rules of the rooms in `docs/dev/house.md`, and size limits."""

import ast
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

BASE = {"settings", "files", "imports"}
LIBRARY = {"attention", "store", "diffusion"}
MAY_IMPORT = {
    "attention": BASE,
    "store": BASE | {"attention"},
    "diffusion": BASE | {"attention", "store"},
    "models": BASE | {"attention", "diffusion"},
    "video": BASE,
    "metrics": BASE | {"video"},
    "methods": BASE | LIBRARY | {"video"},
    "recipes": BASE | LIBRARY | {"methods"},
    "hosts": BASE | LIBRARY | {"models"},
    "demo": BASE | LIBRARY | {"models", "hosts", "methods", "recipes", "video", "metrics"},
    "benchmark": BASE | LIBRARY | {"models", "hosts", "methods", "recipes", "video", "metrics", "demo"},
    "cli": BASE | LIBRARY | {"models", "hosts", "methods", "recipes", "video", "metrics", "demo", "benchmark"},
    "nodes": BASE | LIBRARY | {"models", "hosts", "methods", "recipes", "video", "metrics"},
    "files": {"imports", "settings"},
    "imports": set(),
    "settings": set(),
}
"""The rooms that each room may import from, in addition to itself. Unlisted rooms may import everything."""


def modules() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True, check=True)
    return [REPO / name for name in listed.stdout.split() if (REPO / name).exists()]


def room_of(path: Path) -> str:
    return path.relative_to(REPO).parts[0].removesuffix(".py")


def imported(path: Path) -> dict[str, int]:
    """The rooms that a module imports relatively, with the line of each import."""
    package = path.relative_to(REPO).parent.parts
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [name.name for name in node.names]
            for name in names:
                found.setdefault(".".join((*above, name)).split(".")[0], node.lineno)
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_only_go_down(room):
    wrong = [
        f"{path.relative_to(REPO)}:{line} imports {other}"
        for path in modules()
        if room_of(path) == room
        for other, line in imported(path).items()
        if other not in MAY_IMPORT[room] | {room} and (REPO / other).exists() | (REPO / f"{other}.py").exists()
    ]
    assert wrong == []


def test_hosts_are_separate():
    """No host imports the other, and no file outside of a host's folder imports a model family's file of it."""
    for path in modules():
        parts = path.relative_to(REPO).parts
        if parts[:2] in (("hosts", "comfyui"), ("hosts", "diffusers")):
            other = {"comfyui": "diffusers", "diffusers": "comfyui"}[parts[1]]
            assert f"from ..{other}" not in path.read_text(encoding="utf-8"), path


LIBRARY_ROOMS = [room for room in MAY_IMPORT if (REPO / room).is_dir()]


def test_files_and_functions_are_short():
    long = []
    for path in modules():
        if room_of(path) not in MAY_IMPORT:
            continue
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 450:
            long.append(f"{path.relative_to(REPO)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > 60 and not _is_signature(node):
                    long.append(f"{path.relative_to(REPO)}:{node.lineno} {node.name}: {size} lines")
    assert long == []


def _is_signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is mostly parameters and docstring, such as a command's options or a node's schema."""
    body = (node.end_lineno or 0) - node.body[0].lineno + 1
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    first = node.body[1].lineno if documented and len(node.body) > 1 else node.body[0].lineno
    return node.name in ("define_schema", "command") or ((node.end_lineno or 0) - first + 1 <= 60 and body > 0)
