"""Running the command line in tests."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from fatezero.files.bundled import CLIP

COMMAND = (sys.executable, "-m", "fatezero")


def fatezero(*arguments, cwd, code=0, **options):
    """The output of the command line, run in a folder. The exit status must be `code`."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def here(*arguments, cwd, code=0, threads=None):
    """The output of the command line, run in this process and a folder. The exit status must be `code`."""
    from fatezero.cli.app import main

    output, before = StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["fatezero", *map(str, arguments)])
        torch.set_num_threads(threads or before)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            torch.set_num_threads(before)  # a record may have changed them
    assert ended.value.code == code, output.getvalue()
    assert "Traceback" not in output.getvalue()
    return output.getvalue()


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether clips agree up to the UNet's last digits, which depend on memory alignment, and the codec."""
    difference = (a.int() - b.int()).abs().float()
    return a.shape == b.shape and bool(difference.mean() < 0.5 and difference.max() <= 16)


def frames_written(output: Path) -> str:
    """The digest of the frames that an edit passed to its encoder, from its record."""
    digest: str = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))["made"]["frames"]
    assert len(digest) == 64
    return digest


def two_clips(folder: Path) -> Path:
    """The folder, with the bundled clip in it twice."""
    (folder / "clips").mkdir()
    for name in ("a", "b"):
        shutil.copy(CLIP, folder / "clips" / f"{name}.mp4")
    return folder


def summary_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a batch's summary."""
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        return [{name: re.sub("^'(?='*[=+@\t\r\n\uff1d-])", "", cell) for name, cell in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip
