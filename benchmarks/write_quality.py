"""Write a run of `fatezero benchmark` to QUALITY.md: table, rows, and the best, median and worst case."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import write_section

from fatezero.benchmark.rows import BEST, METHODS, PAPER
from fatezero.benchmark.run import load_rows
from fatezero.benchmark.table import Results, case_sheet, markdown, ranked

HERE = Path(__file__).parent
PAGE = HERE / "QUALITY.md"
SHOWN = ("DDIM inversion + prompt", "SDEdit 0.6", PAPER, BEST)

ABOUT = {
    "full": "All methods and ablations on all kinds of edits ([past the paper](#past-the-paper)).",
    "settings": "FateZero and FateZero+, with one setting changed at a time ([past the paper](#past-the-paper)).",
    "two": "FateZero, and FateZero+ with and without separated words, on pictures with two objects "
    "([past the paper](#past-the-paper)).",
    "quick": "The main methods on the cases that `fatezero benchmark --quick` runs.",
    "again": "FateZero and FateZero+ on another seed ([past the paper](#past-the-paper)).",
    "long": "TokenFlow, extended attention and Plug-and-Play (PnP), on longer clips "
    "([how frames agree](#how-frames-agree)).",
    "long unseen": "Flow smoothing, 0.8 unless noted, and Steady Video, on the cases on which 0.9 was chosen "
    "([how frames agree](#how-frames-agree)).",
    "long fresh": "Flow smoothing and Steady Video on a seed that was not used to choose 0.9 "
    "([how frames agree](#how-frames-agree)).",
    "tuned": "No training, training on the clip, and a video model trained on many clips "
    "([temporal layers](#temporal-layers-tuned-on-the-clip-or-trained-on-many)).",
    "wan": "Methods on the demo's Wan and on the UNet ([video transformer](#on-a-video-transformer)).",
    "outlines": "The main methods, judged with whole outlines ([which judge](#which-judge)).",
    "world 2": "Three edits of each kind in world 2, with its UNet and its Wan ([card](../demo/world2/README.md)).",
    "removal": "One of two objects removed ([objects removed](#objects-removed)).",
    "flow_mask": "FlowEdit on Wan with and without the flow mask ([video transformer](#on-a-video-transformer)).",
    "few_steps": "FlowEdit with and without the LoRA for few steps ([few steps](#flowedit-in-few-steps)).",
    "tokenflow": "TokenFlow's settings on Plug-and-Play (PnP), and TokenFlow on SDEdit "
    "([how frames agree](#how-frames-agree)).",
    "guided": "Guidance in all steps and in the first 0.6 of them ([past the paper](#past-the-paper)).",
    "kv_edit": "Edits on Wan in the true mask, by KV-Edit with all tokens or those inside, and without KV-Edit "
    "([video transformer](#on-a-video-transformer)).",
}
"""What each table compares, by its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--each", type=int, default=10, help="cases of each kind to include")
    parser.add_argument("--kinds", nargs="*", default=[], help="kinds to include (all)")
    parser.add_argument("--methods", nargs="*", default=[m.name for m in METHODS], help="rows to include")
    parser.add_argument(
        "--name", default="full", help="name of the section and its rows; full also writes the pictures"
    )
    given = parser.parse_args()
    found = load_rows(given.folder)
    rows = [  # rounded as in the file, so that page and rows agree to the last digit
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in found
        if int(str(row["case"])[-2:]) < given.each
        and (not given.kinds or row["kind"] in given.kinds)
        and row["method"] in given.methods
    ]
    settings = json.loads((given.folder / "settings.json").read_text(encoding="utf-8"))
    results = Results(rows)
    caption = ABOUT.get(given.name, "") + (
        f" {len(results.cases)} cases of seed {settings['seed']}, {settings['frames']} frames, {settings['steps']} "
        f"steps, guidance {settings['guidance_scale']}. In brackets: 95 % of bootstrap resamples of the cases."
    )
    write_section(f"Table: {given.name}", f"{caption.strip()}\n\n{markdown(results)}", PAGE)
    file = HERE / "results" / f"{given.name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")
    methods = [name for name in SHOWN if name in results.methods]
    if given.name != "full":
        return
    order = ranked(results, BEST)
    for name, case in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        sheet = case_sheet(given.folder, results, case, methods, f"the {name} edit by {BEST}")
        sheet.save(file.parent / f"{name}.webp", lossless=True, quality=100, method=6)
        print(f"{name}: {case}")


if __name__ == "__main__":
    main()
