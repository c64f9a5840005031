"""Write the tables of the help pages and the texts of `locales/` as a real host tells the nodes.

    python tests/comfyui/write_help.py

Run it after a change of a setting's or socket's help; `test_help.py` compares. A page that is missing is begun.
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


def with_tables(page: str, tables: dict[str, dict[str, str]]) -> str:
    """A page with the tables under some headings written anew; a heading with no rows goes."""
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
        page = path.read_text() if path.exists() else f"# {about['display_name']}\n\n{about['description']}\n\n"
        path.write_text(with_tables(page, {"Inputs": inputs, "Outputs": outputs}))
        texts[name] = {
            "display_name": about["display_name"],
            "description": about["description"],
            "inputs": {socket: {"name": socket, "tooltip": told} for socket, told in inputs.items()},
            "outputs": {str(i): {"name": n, "tooltip": told} for i, (n, told) in enumerate(outputs.items())},
        }
    TEXTS.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
