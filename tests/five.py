"""A small folder in FiVE-Bench's layout, of demo scenes."""

import json
from pathlib import Path
from random import Random

from PIL import Image

from fatezero.demo.scenes import Scene, random_motion, render
from fatezero.video.size import to_bytes

FRAMES = 4
PAIRS = {
    "1": ("a [red square] on water", "a [red circle] on water"),
    "3": ("a [blue star] on sand", "a [green star] on sand"),
    "4": ("a [blue] star on sand", "a [striped blue] star on sand"),
}
QUESTIONS = {
    "source_yes_no_question": "Is there a {0} in the video?",
    "target_yes_no_question": "Is there a {1} in the video?",
    "multiple_choice_question": "What is in the video? \na) {0} \nb) {1}",
}


def write_five(folder: Path) -> Path:
    """Write it, a case of each type of `PAIRS`, and return the folder."""
    (folder / "edit_prompt").mkdir(parents=True)
    for kind, pair in PAIRS.items():
        source, target = (text.replace("[", "").replace("]", "") for text in pair)
        name = f"{int(kind):04d}_{source.split()[2]}"
        clip = render(Scene.parse(source), random_motion(Random(kind), 1), FRAMES)
        masks = (clip.mask[..., None].expand(-1, -1, -1, 3) * 255).byte()
        for part, frames in (("images", to_bytes(clip.frames)), ("bmasks", masks)):
            (folder / part / name).mkdir(parents=True)
            for n, frame in enumerate(frames, 1):
                Image.fromarray(frame.numpy()).save(folder / part / name / f"{n:05d}.jpg", quality=95)
        case = {"video_name": name, "editing_type_id": kind, "source_prompt": pair[0], "target_prompt": pair[1]}
        case |= {"save_dir": "edit"} | {key: text.format(source, target) for key, text in QUESTIONS.items()}
        (folder / "edit_prompt" / f"edit{kind}_FiVE.json").write_text(json.dumps([case]))
    return folder
