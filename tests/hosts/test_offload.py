"""Networks whose weights accelerate offloads until a layer is called."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler

from fatezero import invert
from fatezero.demo.model import build_scheduler
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from tests.small import random_latents, random_text, small_unet
from tests.wan import small_wan

OF_FAMILIES = {
    "UNet": lambda: DiffusersDenoiser(small_unet(), build_scheduler()),
    "transformer": lambda: VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler()),
}


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_an_inversion_is_the_same_with_offloaded_weights(family):
    plain, offloaded = (OF_FAMILIES[family]() for _ in range(2))
    cpu_offload(offloaded.networks[0], torch.device("cpu"))
    assert offloaded.networks[0].device.type == "meta"
    kept, found = (invert(one, random_latents(), random_text(2), 2).store for one in (plain, offloaded))
    assert found.model == kept.model and torch.equal(found.levels, kept.levels)
    assert offloaded.networks[0].device.type == "meta", "the weights are offloaded again"
