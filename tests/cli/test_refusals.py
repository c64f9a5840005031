"""Unreadable files and contradictory settings are refused in one line that names the setting."""

import pytest

from fatezero.files.bundled import CLIP

EDIT = ("edit", CLIP, "--source", "a red square", "--target", "a green square", "--steps", 2, "--count", 2)
EVALUATE = ("evaluate", CLIP, CLIP, "--source", "x", "--target", "y")
TUNE = ("tune", CLIP, "--prompt", "a red square", "--count", 2, "--steps", 1)
UNREACHABLE = "is neither a folder nor in the cache"


@pytest.fixture
def error(refused, tmp_path, monkeypatch):
    """The error of a command with status 1: one line without library messages; no file is written."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def run(*line):
        text = refused(*line)
        lines = [one for one in text.split("error: ", 1) if one.strip()]
        assert "Warning" not in text and "Retry" not in text and "[Errno" not in text and len(lines[-1]) < 340, text
        assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before
        return text

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((*EDIT, "--model", "a/b"), UNREACHABLE),
        ((*EDIT, "--controlnet", "a/b", "--control", CLIP), f"controlnet: 'a/b' {UNREACHABLE}"),
        ((*EDIT, "--controlnet", "nothing", "--control", CLIP), "controlnet: no model at nothing"),
        ((*EDIT, "--controlnet", "folder", "--control", CLIP), "controlnet: folder is not a ControlNet of diffusers"),
        ((*EDIT, "--controlnet", "a/b", "--control", "none.mp4"), "control: no video at none.mp4"),
        ((*EDIT, "--temporal", "nothing"), "temporal: no temporal layers at nothing"),
        ((*EDIT, "--temporal", "text.mp4"), "temporal: "),
        ((*EDIT, "--dtype", "float8"), "dtype is 'float8'"),
        ((*EDIT, "--lossless", "-o", "out.gif"), "lossless: .gif loses detail"),
        ((*EDIT, "--lossless", "-o", "f_%04d.jpg", "--dry-run"), "lossless: .jpg loses detail"),
        ((*EDIT, "--window-overlap", 1, "--dry-run"), "window_overlap is 1"),
        ((*EDIT, "--device", "abacus"), "device 'abacus' cannot be used"),
        (("edit", "text.mp4", *EDIT[2:]), "text.mp4 is not a readable video"),
        (("edit", "folder", *EDIT[2:]), "folder is a folder without pictures"),
        ((*EVALUATE, "--clip", "a/b"), f"clip: 'a/b' {UNREACHABLE}"),
        ((*EVALUATE, "--clip", "nothing"), "clip: no model at nothing"),
        ((*EVALUATE, "--clip", "folder"), "clip: "),
        ((*EVALUATE, "--judge"), "judge: "),
        ((*EVALUATE[:3], "--truth", "text.mp4"), "truth: text.mp4 is not a readable video"),
        ((*EVALUATE[:3], "--mask", "none.png"), "mask: "),
        ((*EVALUATE[:3], "--lpips", "text.mp4"), "lpips: "),
        ((*EVALUATE[:3], "--crop", "600,0,60,0"), "crop 600,0,60,0"),
        (("evaluate", CLIP, "text.mp4"), "text.mp4 is not a readable video"),
        ((*TUNE, "--model", "demo-wan"), "demo-wan is a Wan model; give one with a UNet"),
        ((*TUNE, "--model", "demo-wan", "--dry-run"), "demo-wan is a Wan model; give one with a UNet"),
        (("generate", "--prompt", "x", "--temporal", "nothing"), "temporal: no temporal layers at nothing"),
        (("benchmark", "--clip", "nothing"), "clip: no model at nothing"),
        (("benchmark", "--kind", "nonsense"), "kind is 'nonsense'"),
        (("benchmark", "--method", "nonsense"), "'nonsense'"),
        (("train-demo", "--device", "abacus"), "device 'abacus'"),
        (("demo", "--device", "abacus"), "device 'abacus'"),
        ((*EVALUATE[:3], "--background", "nocolour"), "background: "),
    ],
)
def test_unreadable_files_are_refused_in_one_line(error, line, message):
    assert message in error(*line)


def test_a_missing_optimizer_is_refused_before_the_plan(error):
    pytest.importorskip("torch")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        assert "bitsandbytes" in error(*TUNE, "--optimizer", "adamw8bit", "--dry-run")
