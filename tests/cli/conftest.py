"""The command line in this process."""

import sys

import pytest
import torch

from fatezero.cli.app import main


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command line in this process and in the test's folder; what it says. Its status must be `code`."""

    def run(*arguments, code=0, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["fatezero", *map(str, arguments)])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as ended:
            main()
        torch.set_num_threads(threads)  # a record may have asked for others
        said = "".join(capfd.readouterr())
        assert ended.value.code == code, said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def refused(command):
    """Run the command line as `command` does: what it says as it ends with status 1."""
    return lambda *arguments: command(*arguments, code=1).replace("\n", " ")
