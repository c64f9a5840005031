"""Shared fixtures."""

from __future__ import annotations

import faulthandler
from functools import partial

import pytest
from commands import here
from diffusers import DDIMScheduler, UNet2DConditionModel

from fatezero.demo.model import build_scheduler, build_tokenizer
from fatezero.hosts.diffusers import DiffusersDenoiser
from small import small_unet

WATCHDOG = 6 * 3600
"""Seconds after which a test run is ended. No test has a time limit of its own."""


def pytest_configure(config):
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)


def pytest_xdist_make_scheduler(config, log):
    """Run the ComfyUI tests in one process, for one server and one page; distribute all others."""
    from xdist.scheduler import LoadScopeScheduling

    class OneServer(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "comfyui" if "tests/comfyui/" in nodeid else nodeid

    return OneServer(config, log)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A CLIP tokenizer in which "red", "circle", ... are one token and other letters a token each."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def scheduler() -> DDIMScheduler:
    return build_scheduler()


@pytest.fixture
def denoiser(unet, scheduler) -> DiffusersDenoiser:
    return DiffusersDenoiser(unet, scheduler)


@pytest.fixture
def command(tmp_path):
    """Run the command line with `here`, in the test's folder."""
    return partial(here, cwd=tmp_path)


@pytest.fixture
def refused(command):
    """The error of a command that exits with status 1, run with `command`."""
    return lambda *arguments: command(*arguments, code=1).replace("\n", " ")
