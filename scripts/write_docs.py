"""Write the reference from the code: docs/settings.md from the settings, docs/nodes.md from the nodes' texts,
docs/authors-files.md from the keys of the authors' files, and the README's table of methods.

    python scripts/write_docs.py

Run it after a change of a setting or a node; `tests/test_docs.py` compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from fatezero.cli.config.authors.keys import REFUSED, Command, Key
from fatezero.cli.config.authors.read import REPOSITORIES
from fatezero.cli.config.settings import SECTIONS, EditConfig, GenerateConfig, TuneConfig
from fatezero.cli.options import GROUPS
from fatezero.methods import METHODS
from fatezero.methods.method import Method
from fatezero.settings import NamedSetting, settings_of

REPO = Path(__file__).resolve().parents[1]
SETTINGS = """# Settings

Written by `scripts/write_docs.py` from the code.

A setting is an option of the command (`blend_threshold` is `--blend-threshold`), a key in a YAML file, a widget of a
node, and a field of a Python dataclass, with one name, range and default. A name with a dot is in a section:
`--tokenflow.batch-frames 4`, or `tokenflow: {batch_frames: 4}`. Presets set some of them. *Tuning* and *New clip* list
what differs from *Edit*. `fatezero COMMAND --help-all` also lists the options of a run, like `--output`.
"""
NODES = """# Nodes

Written by `scripts/write_docs.py` from the nodes. Each name leads to the help page that ComfyUI
shows (select a node and press **?**).

| node | what it does | inputs | outputs |
|---|---|---|---|
"""
AUTHORS = """# The authors' configuration files

Written by `scripts/write_docs.py` from the code.

`fatezero edit --config their.yaml` makes an edit for each prompt of a file of FateZero, Tune-A-Video or TokenFlow, and
`fatezero tune --config their.yaml` tunes with its settings. Options and `--preset` override the file, `--model`
its model too. References such as `${dataset_config.prompt}` are followed.

Unsupported values and unknown keys are refused by name. Keys without effect are listed in a note. *missing*: the
default of a missing key in the authors' code, if any.
"""
BEGIN, END = "<!-- methods, written by scripts/write_docs.py -->\n", "<!-- end of methods -->\n"


def settings_page() -> str:
    edit = named(EditConfig) + [pair for name, kind in SECTIONS.items() for pair in named(kind, f"{name}.")]
    clip = named(GenerateConfig) + named(type(GenerateConfig.layout), "layout.")
    parts = {
        "Edit": edit,
        "Tuning": [pair for pair in named(TuneConfig) if pair not in edit],
        "New clip": [pair for pair in clip if pair not in edit],
    }
    return SETTINGS + "".join(f"\n## {title}\n{''.join(tables(pairs))}" for title, pairs in parts.items())


Named = tuple[str, NamedSetting]


def named(settings: type, section: str = "") -> list[Named]:
    return [(section + one.name, one) for one in settings_of(settings)]


def tables(pairs: Sequence[Named]) -> Iterator[str]:
    """A table for each heading of the command's help."""
    by_group: dict[str, list[Named]] = {group: [] for group in GROUPS}
    for pair in pairs:
        by_group[pair[1].meta.group].append(pair)
    for group, own in by_group.items():
        if own:
            rows = "".join(row(name, one) for name, one in own)
            yield f"\n**{group}**\n\n| setting | default | values | what it does |\n|---|---|---|---|\n{rows}"


def row(name: str, one: NamedSetting) -> str:
    return f"| `{name}` | {default_of(one)} | {values_of(one)} | {one.meta.text} |\n"


def default_of(one: NamedSetting) -> str:
    if one.meta.shown:
        return one.meta.shown
    if isinstance(one.default, bool):
        return "yes" if one.default else "no"
    value = ",".join(map(str, one.default)) if isinstance(one.default, (tuple, dict)) else one.default
    return "" if value in ("", None) else f"`{value}`"


def values_of(one: NamedSetting) -> str:
    least, most = one.meta.least, one.meta.most
    if one.choices:
        return ", ".join([*(("yes", "no") if one.switch else ()), *(f"`{choice}`" for choice in one.choices)])
    if isfinite(least) and isfinite(most) and most < 2**62:
        return f"{least:g} to {most:g}"
    return f"from {least:g}" if isfinite(least) else ""


def nodes_page() -> str:
    texts: dict[str, Any] = json.loads((REPO / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    return NODES + "".join(node_row(name, about) for name, about in texts.items())


def node_row(name: str, about: dict[str, Any]) -> str:
    title = about["display_name"].removesuffix(" (FateZero)")
    inputs = ", ".join(f"`{socket}`" for socket in about["inputs"])
    outputs = ", ".join(one["name"] for one in about["outputs"].values())
    return f"| [{title}](../web/docs/{name}.md) | {about['description']} | {inputs} | {outputs} |\n"


def authors_page() -> str:
    return AUTHORS + "".join(f"\n## {one.title}\n{keys_tables(one.module.SECTIONS)}" for one in REPOSITORIES)


def keys_tables(sections: dict[str, Sequence[Key]]) -> str:
    """A table for each section, with a column for each command to which keys of the repository apply."""
    tunes = any(key.tune for keys in sections.values() for key in keys)
    commands: tuple[Command, ...] = ("edit", "tune") if tunes else ("edit",)
    head = "".join(f"| {cell} " for cell in ("key", "missing", *(f"`{one}`" for one in commands), "how")) + "|"
    line = "|" + "---|" * (len(commands) + 3)
    return "".join(
        f"\n**{where or 'The file'}**\n\n{head}\n{line}\n{''.join(key_row(key, commands) for key in keys)}"
        for where, keys in sections.items()
    )


def key_row(key: Key, commands: Sequence[Command]) -> str:
    cells = (f"`{key.name}`", usual_of(key), *(becomes(key, command) for command in commands), key.about)
    return "".join(f"| {cell} " for cell in cells) + "|\n"


def usual_of(key: Key) -> str:
    return "" if key.default is None else f"`{json.dumps(key.default)}`"


def becomes(key: Key, command: Command) -> str:
    """The settings that a key becomes, or the values that it may have."""
    if key.only and not key.settings(command):
        return "refused" if key.only == REFUSED else "only " + ", ".join(f"`{json.dumps(one)}`" for one in key.only)
    names = key.settings(command).split(", ")
    return ", ".join(name if " " in name else f"`{name}`" for name in names if name) or "no effect"


def methods_table() -> str:
    rows = "".join(
        f"| {method.title} ({linked(method.paper)}) | {method.sentence} | {uses_of(method)} |\n" for method in METHODS
    )
    return f"| method | what it does | `--preset` |\n|---|---|---|\n{rows}"


def linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def uses_of(method: Method) -> str:
    return ", ".join(f"`{preset}`" for preset in method.presets)


def with_methods(page: str) -> str:
    """A page with the table of methods between its marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + methods_table() + END + rest.partition(END)[2]


def written() -> dict[Path, str]:
    """The text of each page that is generated."""
    readme = REPO / "README.md"
    return {
        REPO / "docs" / "settings.md": settings_page(),
        REPO / "docs" / "nodes.md": nodes_page(),
        REPO / "docs" / "authors-files.md": authors_page(),
        readme: with_methods(readme.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for page, text in written().items():
        page.write_text(text, encoding="utf-8")
