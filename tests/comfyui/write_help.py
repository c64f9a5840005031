"""Write the titles and tables of the help pages and the texts of `locales/` from the nodes of a real host.

    python tests/comfyui/write_help.py

Run it after changing a description or tooltip; `test_help.py` compares. "Good to know" is hand-written and kept.
A missing page is created.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from comfyui.host import REPO, find_hosts, started

DOCS, TEXTS = REPO / "web" / "docs", REPO / "locales" / "en" / "nodeDefs.json"


def table(rows: dict[str, str]) -> str:
    lines = [f"| `{socket}` | {tooltip} |" for socket, tooltip in rows.items()]
    return "\n".join(["| socket | what it is for |", "|---|---|", *lines])


def with_tables(page: str, intro: str, tables: dict[str, dict[str, str]]) -> str:
    """A page with its introduction and the tables under some headings replaced; no table without rows."""
    page = intro + page[found.start() :] if (found := re.search(r"^## ", page, re.MULTILINE)) else intro
    for heading, rows in tables.items():
        section = f"## {heading}\n\n{table(rows)}\n\n" if rows else ""
        found = re.search(rf"## {heading}\n\n(\|.*\n)+\n?", page)
        page = page.replace(found.group(0), section) if found else page + section
    return page.rstrip() + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, started(find_hosts()[0], Path(folder)) as host:
        nodes: dict[str, Any] = {n: a for n, a in host.get("/object_info").items() if n.startswith("FateZero")}
    texts = {}
    for name, about in nodes.items():
        sockets = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
        inputs = {socket: options[1]["tooltip"] for socket, options in sockets.items()}
        outputs = dict(zip(about["output_name"], about["output_tooltips"], strict=True))
        path = DOCS / f"{name}.md"
        page, intro = (
            path.read_text() if path.exists() else "",
            f"# {about['display_name']}\n\n{about['description']}\n\n",
        )
        path.write_text(with_tables(page, intro, {"Inputs": inputs, "Outputs": outputs}))
        texts[name] = {
            "display_name": about["display_name"],
            "description": about["description"],
            "inputs": {socket: {"name": socket, "tooltip": tip} for socket, tip in inputs.items()},
            "outputs": {str(i): {"name": n, "tooltip": tip} for i, (n, tip) in enumerate(outputs.items())},
        }
    TEXTS.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
