"""A small folder in V2VBench's layout, of demo scenes."""

from pathlib import Path
from random import Random

import yaml
from PIL import Image

from fatezero.demo.scenes import Scene, random_motion, render
from fatezero.video.size import to_bytes

FRAMES = 4
CLIPS = {
    "red square": (
        "a red square on water",
        {"foreground": "a red circle on water", "style": "a red square, pixel art"},
    ),
    "star-2": ("a blue star on sand", {"background": "a blue star on grass", "": "a green star on sand"}),
}
"""By `video_id`: the prompt, and the edits by type; one has none."""


def write_v2v(folder: Path) -> Path:
    """Write it, with a clip as pictures and one as a GIF, and return the folder."""
    data = []
    for name, (source, edits) in CLIPS.items():
        frames = [Image.fromarray(one.numpy()) for one in to_bytes(_clip(name, source))]
        if " " in name:
            (folder / "frames" / name).mkdir(parents=True)
            for n, frame in enumerate(frames):
                frame.save(folder / "frames" / name / f"{n:02d}.png")
        else:
            (folder / "videos").mkdir()
            frames[0].save(folder / "videos" / f"{name}.gif", save_all=True, append_images=frames[1:], duration=125)
        edit = [{"prompt": target} | ({"type": kind} if kind else {}) for kind, target in edits.items()]
        data.append({"video_id": name, "prompt": source, "edit": edit})
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}, sort_keys=False))
    return folder


def _clip(name: str, caption: str):
    return render(Scene.parse(caption), random_motion(Random(name), 1), FRAMES).frames
