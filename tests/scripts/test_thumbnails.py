"""Thumbnails made by the demo models match their workflows' presets."""

import importlib.util
import sys
from pathlib import Path

from PIL import Image

REPO = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("write_thumbnails", REPO / "scripts" / "write_thumbnails.py")
thumbnails = importlib.util.module_from_spec(spec)
sys.modules["write_thumbnails"] = thumbnails  # where its dataclass looks up its module
spec.loader.exec_module(thumbnails)


def test_thumbnails_match_the_workflows_presets_and_name_the_demo_model():
    for name in thumbnails.THUMBNAILS:
        with Image.open(REPO / "workflows" / f"{name}.jpg") as picture:
            comment = picture.info.get("comment", b"").decode()
        assert comment == thumbnails.mark_of(name), f"run scripts/write_thumbnails.py {name}"
