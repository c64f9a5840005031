"""The summary of a batch: a CSV, and a page that plays source and result side by side with their metrics."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...files.whole import whole_file
from ...video.fitted import FittedVideo
from ...video.read import open_video
from ...video.write import write_video
from ..config.record import record_path
from ..config.settings import EditConfig
from ..frames import find_frames
from ..progress import printable
from .jobs import AXES, Job
from .work import Ended

Digest = Callable[[str], str]
"""`digest_of`, possibly cached."""
SOURCES = "sources"
"""The folder of the edited clips' sources."""


@dataclass(frozen=True)
class Row:
    """A job and its result. status: done, failed or open. where, attempts, seconds: of its last attempt."""

    job: Job
    result: Path
    status: str
    error: str = ""
    seconds: float | None = None
    attempts: int = 0
    where: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, result: Path, last: Ended | None) -> Row:
        """last: its last result in the log."""
        there = result.is_file() and record_path(result).is_file()
        status = "failed" if last and last.error else "done" if there else "open"
        if last is None:
            return cls(job, result, status)
        return cls(
            job, result, status, last.error or "", last.seconds or None, last.attempts, last.where, last.figures
        )  # fmt: skip


def write_summary(output: Path, rows: Sequence[Row], clips: Mapping[str, Path]) -> None:
    """clips: the sources to show, by the names of jobs."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    _write(output / "summary.csv", _csv(rows, names))
    _write(output / "index.html", _page(output, rows, names, clips))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def _csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(
        [
            "job",
            "status",
            *(axis.removesuffix("s") for axis in AXES),
            "result",
            "seconds",
            "tries",
            "where",
            *names,
            "error",
        ]
    )
    for row in rows:
        labels = [row.job.labels.get(axis, "") for axis in AXES]
        figures = [row.figures.get(name, "") for name in names]
        result = row.result.name if row.status == "done" else ""
        cells = [row.job.name, row.status, *labels, result, row.seconds, row.attempts or "", row.where, *figures]
        table.writerow([_cell(value) for value in (*cells, row.error)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a text that begins like one has an apostrophe before it, which
    spreadsheets do not show. Numbers stay what they are.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip("'").startswith(_OF_FORMULAS) and not _is_number(text) else text


_OF_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# --- the page ---------------------------------------------------------------------------------


def sources_of(output: Path, rows: Sequence[Row], configs: Mapping[str, EditConfig], digest: Digest) -> dict[str, Path]:
    """The source frames of each finished job, written once into the folder `sources`."""
    found = dict[str, Path]()
    for row in rows:
        if row.status == "done":
            path = _source_of(output, row, configs[row.job.name], digest)
            if path is not None:
                found[row.job.name] = path
    return found


def _source_of(output: Path, row: Row, config: EditConfig, digest: Digest) -> Path | None:
    try:
        found = find_frames(config)
        size = open_video(row.result).size
        about = (digest(config.video), found.indices, config.crop, size)
        path = output / SOURCES / f"{Path(config.video).stem[:40]}_{sha256(repr(about).encode()).hexdigest()[:8]}.mp4"
        if not path.exists():
            clip = FittedVideo.of(found, config.crop, size)
            write_video(path, clip.frames(), clip.fps, times=clip.times)
        return path
    except (OSError, ValueError):  # a missing clip is not shown
        return None


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
input { font: inherit; padding: .35rem .6rem; width: min(30rem, 100%); }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
article { border: 1px solid #8886; border-radius: .5rem; padding: .8rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
figure { margin: 0; } figcaption { font-size: .8rem; opacity: .75; }
video { width: 100%; image-rendering: auto; background: #0003; display: block; }
p { margin: .5rem 0; } small { opacity: .75; }
table { border-collapse: collapse; font-size: .85rem; } td { padding: 0 .8rem 0 0; } td + td { text-align: right; }
.failed { border-color: #c33; } .failed p { color: #c33; }
[hidden] { display: none; }
"""
_SCRIPT = """
for (const pair of document.querySelectorAll('.pair')) {
  const [source, result] = pair.querySelectorAll('video');
  if (!result) continue;
  // Restart both together, so that they stay in sync.
  result.loop = false;
  result.addEventListener('ended', () => [source, result].forEach(video => { video.currentTime = 0; video.play(); }));
  result.addEventListener('pause', () => { if (!result.ended) source.pause(); });
  result.addEventListener('play', () => source.play());
  result.addEventListener('seeked', () => { source.currentTime = result.currentTime; });
}
// Play only visible clips: a hundred at once are too many for a browser.
const visible = new IntersectionObserver(entries => entries.forEach(({ target, isIntersecting }) =>
  isIntersecting ? target.play().catch(() => {}) : target.pause()));
document.querySelectorAll('video').forEach(video => visible.observe(video));
document.querySelector('input').addEventListener('input', ({ target }) => {
  const words = target.value.toLowerCase().split(/\\s+/);
  for (const card of document.querySelectorAll('article'))
    card.hidden = !words.every(word => card.textContent.toLowerCase().includes(word));
});
"""


def _page(output: Path, rows: Sequence[Row], names: Sequence[str], clips: Mapping[str, Path]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "failed", "open")}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    name = _text(output.resolve().name)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{name}: {text}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p>{len(rows)} jobs: {text}. <a href='summary.csv'>summary.csv</a></p>",
        "<label>Show only jobs with these words <input type='search'></label>",
    ]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        parts += ["<h2>Failed</h2><section>", *(_failure(row) for row in failed), "</section>"]
    done = [row for row in rows if row.status == "done"]
    for clip in dict.fromkeys(row.job.labels.get("clips", "") for row in done):
        parts.append(f"<h2>{_text(clip)}</h2><section>")
        parts += [_card(output, row, names, clips) for row in done if row.job.labels.get("clips", "") == clip]
        parts.append("</section>")
    return "\n".join([*parts, f"<script>{_SCRIPT}</script></html>", ""])


def _text(text: str) -> str:
    return escape(printable(text))


def _failure(row: Row) -> str:
    text = f"<p>{_text(row.error)}</p><small>{_text(row.job.name)}</small>"
    return f"<article class='failed'>{_title(row)}{text}</article>"


def _title(row: Row) -> str:
    labels = row.job.labels
    how = " &middot; ".join(_text(labels[axis]) for axis in ("methods", "settings") if labels.get(axis))
    return f"<p><b>{_text(labels.get('targets', ''))}</b>{'<br>' if how else ''}{how}</p>"


def _card(output: Path, row: Row, names: Sequence[str], clips: Mapping[str, Path]) -> str:
    shown = [(clips.get(row.job.name), "source"), (row.result, "result")]
    figures = "".join(_figure(path.relative_to(output), what) for path, what in shown if path is not None)
    table = "".join(f"<tr><td>{_text(name)}<td>{_shown(row.figures[name])}" for name in names if name in row.figures)
    time = f"{row.seconds:g} s" if row.seconds is not None else ""
    return (
        f"<article>{_title(row)}<div class='pair'>{figures}</div><table>{table}</table>"
        f"<small>{_text(row.result.name)} {time}</small></article>"
    )


def _figure(path: Path, what: str) -> str:
    address = quote(os.fsencode(path.as_posix()))
    return (
        f"<figure><video src='{address}' loop muted playsinline preload='metadata' controls></video>"
        f"<figcaption>{what}</figcaption></figure>"
    )


def _shown(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4g}"
