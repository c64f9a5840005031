"""A run that was interrupted continues with the same result, to the last bit."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTokenizer
from wan import small_wan

from fatezero import EditMaps, FlowEditSettings, FusionSettings, PromptEdit, draw, invert
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.edit import edit_many
from fatezero.diffusion.parts import Edit
from fatezero.hosts.diffusers import DiffusersDenoiser, VideoTransformerDenoiser
from fatezero.store.states import SavedStates
from small import FIXTURES, random_latents, random_text, small_unet

STEPS = 6


class InterruptedRunError(Exception):
    pass


def stop_after(step):
    def progress(done, total):
        if done == step:
            raise InterruptedRunError

    return progress


@pytest.fixture(scope="module")
def denoiser():
    return DiffusersDenoiser(small_unet(), build_scheduler())


def states(folder, resume=False, **run):
    return SavedStates(folder / "out.state", run, resume)


@pytest.mark.parametrize("stop", [1, 3, 4, STEPS])
@pytest.mark.parametrize(
    "more",
    [{}, {"order": 2}, {"order": 2, "reuse_midpoint": True}, {"inversion_steps": 2 * STEPS}],
    ids=["order 1", "order 2", "reused", "finer"],
)
def test_an_inversion_continues_from_its_last_step(denoiser, tmp_path, more, stop):
    clip, text, calls = random_latents(3), random_text(2), []
    given = (denoiser, clip, text, STEPS, "self")
    whole = invert(*given, **more).latents
    with pytest.raises(InterruptedRunError):
        invert(*given, **more, states=states(tmp_path), progress=stop_after(stop))
    resumed = invert(*given, **more, states=states(tmp_path, resume=True), progress=lambda done, _: calls.append(done))
    assert torch.equal(resumed.latents, whole)
    assert calls[:1] in ([stop + 1], [])


def fused(**more):
    tokenizer = CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer")
    pair = PromptEdit("a silver jeep", "a red jeep", tokenizer, blend_words=(["jeep"], ["jeep"]))
    fusion = FusionSettings(blend_self_attention=True, blend_threshold=0.98, **more)
    return Edit(random_text(3), random_text(4), 3.0, prompt=pair, fusion=fusion)


def plain(**more):
    return Edit(random_text(5), random_text(4), 2.0, **more)


@pytest.mark.parametrize("stop", [2, 3, STEPS])
@pytest.mark.parametrize(
    ("edits", "more"),
    [
        ([fused(blend_latents="authors"), plain(strength=0.5)], {}),
        ([plain(), plain(strength=0.7)], {"order": 2}),
        ([plain(), plain(strength=0.7)], {"order": 2, "reuse_midpoint": True}),
        ([fused(blend_latents=True)], {"memory": "queries_keys"}),
    ],
    ids=["the authors' masks", "order 2", "reused", "stored attention"],
)
def test_edits_continue_from_their_last_step(denoiser, tmp_path, edits, more, stop):
    inversion = invert(denoiser, random_latents(3), random_text(2), STEPS, "self", **more)
    assert_resumes(denoiser, inversion, edits, tmp_path, stop)


def assert_resumes(denoiser, inversion, edits, folder, stop):
    whole, steps = edit_many(denoiser, inversion, edits), []
    with pytest.raises(InterruptedRunError):
        edit_many(denoiser, inversion, edits, states=states(folder), progress=stop_after(stop))
    found = edit_many(
        denoiser, inversion, edits, states=states(folder, resume=True), progress=lambda done, _: steps.append(done)
    )
    assert steps == list(range(stop + 1, STEPS + 1))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("variant", ["paper", "wan_edit"])
def test_flow_edit_continues_with_its_noise_and_its_solver(tmp_path, variant):
    denoiser = VideoTransformerDenoiser(small_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    settings, text = FlowEditSettings(2.0, draws=2, variant=variant), [random_text(i, 512) for i in range(3)]
    clip = draw(denoiser, random_latents(3, 8, 8), text[0], STEPS, settings)
    assert_resumes(denoiser, clip, [Edit(text[1], text[2], 3.0)], tmp_path, 3)


def test_recorded_maps_continue(denoiser, tmp_path):
    inversion = invert(denoiser, random_latents(2), random_text(2), STEPS, "self")
    one = fused(blend_latents=True)
    assert one.prompt is not None
    whole, resumed = (replace(one, maps=EditMaps.of(one.prompt)) for _ in range(2))
    edit_many(denoiser, inversion, [whole])
    with pytest.raises(InterruptedRunError):
        edit_many(denoiser, inversion, [replace(one, maps=EditMaps.of(one.prompt))], states=states(tmp_path),
                  progress=stop_after(3))  # fmt: skip
    edit_many(denoiser, inversion, [resumed], states=states(tmp_path, resume=True))
    for kind in ("heats", "masks"):
        now, then = (getattr(edit.maps, kind)() for edit in (resumed, whole))
        assert now.keys() == then.keys() and now
        for name in now:
            leaves = zip(_tensors(now[name]), _tensors(then[name]), strict=True)
            assert all(torch.equal(a, b) for a, b in leaves)


def _tensors(found):
    return [found] if isinstance(found, torch.Tensor) else list(found.values())


def test_another_run_is_refused_by_name(tmp_path):
    states(tmp_path, target="a red jeep", steps=5).save("edit", (1, [torch.ones(2)], None))
    with pytest.raises(ValueError, match="another run: its target is 'a red jeep', not 'a blue jeep'"):
        states(tmp_path, resume=True, target="a blue jeep", steps=5)
    same = states(tmp_path, resume=True, target="a red jeep", steps=5)
    done, (ones,), rest = same.load("edit")
    assert (done, ones.tolist(), rest) == (1, [1, 1], None)
    fresh = states(tmp_path, target="a blue jeep", steps=5)
    assert fresh.load("edit") is None
    fresh.save("other", 1)
    assert states(tmp_path, resume=True, target="a blue jeep", steps=5).load("edit") is None, "it was replaced"


def test_a_damaged_state_is_refused_and_states_are_removed(tmp_path):
    one = states(tmp_path, target="a")
    one.save("edit", (1, torch.randn(20)))
    path = one.folder / "edit.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        states(tmp_path, resume=True, target="a").load("edit")
    one.remove()
    assert not one.folder.exists()
