"""The results page: tables, and sections that replace older ones."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(title: str, text: str, page_path: Path = RESULTS) -> None:
    """Write a section to a page, replacing the one with the same title."""
    print(f"## {title}\n\n{text}\n")
    page = page_path.read_text(encoding="utf-8") if page_path.exists() else "# Results\n"
    sections = re.split(r"(?m)^## ", page)
    others = [s for s in sections[1:] if s.partition("\n")[0] != title]
    at = next((i for i, s in enumerate(sections[1:]) if s.partition("\n")[0] == title), len(others))
    others.insert(at, f"{title}\n\n{text}\n\n")
    whole = "\n\n".join([sections[0].strip(), *(f"## {section.strip()}" for section in others)])
    page_path.write_text(whole + "\n", encoding="utf-8")
