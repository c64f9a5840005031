"""Help in a page: what most runs of a command need, in the order one thinks. `--help-all` lists every option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

from cyclopts import App
from cyclopts.argument import Argument
from rich.console import Console

HELP, ALL = ("--help", "-h"), "--help-all"


@dataclass(frozen=True)
class Page:
    """The options of a command that its page of help shows, under headings; arguments by their names in capitals.

    example: its arguments, by lines.
    """

    usage: str
    example: tuple[str, ...]
    sections: dict[str, str]


_SD = "--model stable-diffusion-v1-5/stable-diffusion-v1-5"
_SOURCE = '--source "a silver jeep on a road"'
PAGES = {
    "edit": Page(
        'VIDEO --source "..." --target "..." [OPTIONS]',
        (f"clip.mp4 {_SD}", _SOURCE, '--target "a red jeep on a road" --preset attribute+ -o red.mp4'),
        {
            "Video and prompts": "VIDEO source target negative",
            "The edit": "preset guidance-scale strength reweight",
            "Frames": "start end count size",
            "Model": "model lora controlnet control",
            "Output": "output overwrite config",
            "Speed": "steps memory window-frames device dtype dry-run quiet",
        },
    ),
    "invert": Page(
        'VIDEO --source "..." [OPTIONS]',
        (f"clip.mp4 {_SD}", f"{_SOURCE} -o jeep.safetensors"),
        {
            "Video and prompt": "VIDEO source",
            "Frames": "start end count size",
            "Model": "model lora",
            "Output": "output overwrite config",
            "Speed": "steps memory precision window-frames device dtype dry-run quiet",
        },
    ),
    "tune": Page(
        'VIDEO --prompt "..." [OPTIONS]',
        (f"clip.mp4 {_SD}", '--prompt "a silver jeep on a road" -o jeep'),
        {
            "Video and prompt": "VIDEO prompt",
            "Training": "steps learning-rate seed class-pictures validate validate-every",
            "Frames": "start end count size",
            "Model": "model temporal",
            "Output": "output folder resume overwrite config",
            "Speed": "optimizer device dtype dry-run quiet",
        },
    ),
    "generate": Page(
        '--prompt "..." [OPTIONS]',
        (
            "--model damo-vilab/text-to-video-ms-1.7b",
            '--prompt "a burger on a table"',
            '--box "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3" -o burger.mp4',
        ),
        {
            "Prompt": "prompt negative guidance-scale seed",
            "Objects and where they are": "box ellipse mask",
            "The clip": "frames size fps",
            "Model": "model temporal lora",
            "Output": "output overwrite",
            "Speed": "steps device dtype dry-run quiet",
        },
    ),
    "batch": Page(
        "JOBS [OPTIONS]",
        ("jobs.yaml -o results",),
        {
            "Jobs and output": "JOBS output redo measure clip",
            "Failures": "retries timeout",
            "Where they run": "workers device dtype ray comfyui",
            "Checks": "dry-run quiet",
        },
    ),
}
"""The page of each command that has more options than fit one."""
_KINDS = {int: "INT", float: "NUMBER", Path: "PATH"}


def show_help(app: App, tokens: Sequence[str], console: Console) -> bool:
    """Show the help that a command line asks for; False where it asks for none."""
    before = tokens[: tokens.index("--")] if "--" in tokens else tokens
    if ALL in before:
        app.help_print([token for token in before if token != ALL], console=console)
        return True
    command = before[0] if before else ""
    if command not in PAGES or not any(flag in before for flag in HELP):
        return False
    console.print("\n".join(page_of(app, command, console.width)), markup=False, highlight=False, soft_wrap=True)
    return True


def page_of(app: App, command: str, width: int) -> list[str]:
    """The lines of a command's page, each of at most so many columns."""
    page, width = PAGES[command], max(40, width)
    known = {argument.name: argument for argument in app[command].assemble_argument_collection()}
    lines = [f"Usage: fatezero {command} {page.usage}", "", *wrap(str(app[command].help), width), ""]
    lines.append(" \\\n      ".join([f"  fatezero {command} {page.example[0]}", *page.example[1:]]))
    for title, names in page.sections.items():
        lines += ["", title]
        for name in names.split():
            lines += _entry(known[name if name.isupper() else f"--{name}"], width)
    return [*lines, "", f"All options, by section: fatezero {command} {ALL}"]


def _entry(argument: Argument, width: int) -> list[str]:
    """An option, and the first sentence of its help, in columns."""
    label = " ".join(["  " + ", ".join(sorted(_names(argument), key=len)), *_value(argument)])
    indent = " " * min(27, width // 3)
    help = wrap(_first_sentence(argument.parameter.help or "") + _default(argument), width - len(indent))
    if len(label) < len(indent):
        return [f"{label:<{len(indent)}}{help[0]}", *(indent + line for line in help[1:])]
    return [label, *(indent + line for line in help)]


def _names(argument: Argument) -> list[str]:
    return [name for name in argument.names if not name.startswith("--no-")]


def _value(argument: Argument) -> list[str]:
    """The kind of value that an option takes; none of a switch or an argument."""
    kinds = {kind for kind in (get_args(argument.hint) or (argument.hint,)) if kind is not type(None)}
    if argument.name.isupper() or bool in kinds:
        return []
    return [next((_KINDS[kind] for kind in kinds if kind in _KINDS), "TEXT")]


def _first_sentence(help: str) -> str:
    """The first sentence, and the choices at the end."""
    text, _, choices = help.rpartition(" (") if help.endswith(")") else (help, "", "")
    return text.split(". ")[0].rstrip(".") + ("." if not choices else f" ({choices}.")


def _default(argument: Argument) -> str:
    shown: Any = argument.parameter.show_default
    given = argument.field_info.default
    text = shown(given) if callable(shown) else str(given)
    plain = isinstance(given, (str, int, float, Path)) and not isinstance(given, bool) and text
    return f" [default: {text}]" if (callable(shown) or plain) and text not in ("no", "none") else ""
