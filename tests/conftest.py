"""Fixtures that the tests share."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, UNet2DConditionModel

from fatezero.demo.model import build_scheduler, build_tokenizer
from fatezero.hosts.diffusers import DiffusersDenoiser
from small import small_unet


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
