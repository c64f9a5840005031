"""What the package requires of its users."""

import subprocess
import sys

import pytest
from comfyui.host import REPO

HOSTS_OWN = {"av", "einops", "numpy", "pillow", "pyyaml", "safetensors"}
"""ComfyUI's own requirements."""


def names(lines) -> set[str]:
    kept = (line.partition("#")[0] for line in lines)
    return {line.split(">")[0].split("[")[0].strip().lower() for line in kept if line.strip()}


def test_nodes_require_only_packages_of_the_host():
    assert names((REPO / "requirements.txt").read_text().splitlines()) <= HOSTS_OWN


def test_packages_that_conflict_or_are_rarely_needed_are_optional():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not names(project["dependencies"]) & {"matplotlib", "opencv-python", "opencv-python-headless"}
    assert names(project["optional-dependencies"]["metrics"]) == {"matplotlib", "opencv-python-headless"}


def test_every_room_is_installed():
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {
        ".".join(("fatezero", *path.parent.relative_to(REPO).parts)) for path in REPO.glob("[a-z]*/**/__init__.py")
    }
    assert rooms | {"fatezero"} == set(setuptools["packages"])


def test_metrics_load_without_them():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["cv2"] = None
import fatezero.metrics.evaluate, fatezero.video.flow, fatezero.metrics.plot
from fatezero.metrics.evaluate import Figure, Report
try:
    fatezero.metrics.plot.plot_report(Report({"PSNR": Figure(1.0, by_frame=(1.0, 2.0))}))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the plot needs matplotlib: pip install matplotlib"
