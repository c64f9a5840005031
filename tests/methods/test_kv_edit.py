"""KV-Edit: the background is preserved by the source's keys and values; 0 steps equal no method."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fatezero import StoreSettings, edit, invert
from fatezero.attention.control import AttentionSite
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.hosts.diffusers import VideoTransformerDenoiser
from fatezero.methods.kv_edit import Background, KVEditSettings
from fatezero.store.records import Recorder
from small import random_latents, random_text, relative
from tests.wan import small_wan

STEPS = 4


def mask_of(width: int) -> GivenMask:
    """A mask of the left columns of eight."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :width] = 1
    return GivenMask(mask)


@pytest.fixture
def edited(denoiser):
    inversion = invert(denoiser, random_latents(3), random_text(0), STEPS, memory=StoreSettings("queries_keys"))

    def run(settings, width=4, **more):
        return edit(
            denoiser, inversion, random_text(1), random_text(2), fusion=settings, mask=mask_of(width), **more
        )  # fmt: skip

    run.clip = inversion.latents[0]
    return run


def test_the_background_is_preserved_and_the_rest_is_edited(edited):
    plain, ours = edited(None), edited(KVEditSettings())
    half = ours.shape[-1] // 2
    assert torch.equal(ours[..., half:], edited.clip[..., half:])
    assert relative(ours[..., :half], plain[..., :half]) > 1e-3
    assert torch.equal(edited(KVEditSettings(0.0)), plain), "0 steps equal no method"
    everything = edited(KVEditSettings(), width=8)
    assert relative(everything, edited(None, width=8)) < 1e-5, "a full mask uses nothing of the source"


def test_chunks_give_the_whole_clips_result(edited):
    assert relative(edited(KVEditSettings(), chunk_frames=1), edited(KVEditSettings())) < 1e-5


def test_keys_and_values_outside_the_mask_are_the_sources():
    site = AttentionSite("down", 0, "self", 2, 4, 8, 8)
    keys, chunk = KeyFrames(("self",)), Chunk.whole(2)
    (q, k, v), (sq, sk, sv) = (torch.randn(2, 3, 2, 2, 64, 4, generator=torch.Generator().manual_seed(0))).unbind()
    recorder = Recorder(keys, chunk, {site.name})
    recorder.captured.values = {}
    recorder.self_attention(sq, sk, sv, site)
    ours = Background(recorder.step, mask_of(4), 2).self_attention(q, k, v, site)
    inside = (torch.arange(64) % 8 < 4)[:, None]
    k, v = torch.where(inside, k, sk), torch.where(inside, v, sv)
    assert relative(ours, torch.softmax(q @ k.mT / 2, -1) @ v) < 1e-6


def test_it_needs_a_mask_before_anything_runs(denoiser):
    inversion = invert(denoiser, random_latents(1), random_text(0), STEPS)
    with pytest.raises(ValueError, match="KV-Edit needs an edit mask"):
        edit(denoiser, inversion, random_text(1), random_text(2), fusion=KVEditSettings())


def test_on_a_video_transformer():
    """The source branch runs only in the call of the target branch."""
    denoiser = VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    latents, half, tokens = random_latents(3, 8, 6), torch.zeros(1, 8, 6), 512
    half[..., :3] = 1
    inversion = invert(denoiser, latents, random_text(0, tokens), 2)

    def run(settings):
        texts = random_text(1, tokens), random_text(2, tokens)
        return edit(denoiser, inversion, *texts, fusion=settings, mask=GivenMask(half))

    ours = run(KVEditSettings())
    assert torch.equal(ours[..., 3:], latents[..., 3:])
    assert relative(ours, run(None)) > 1e-4
