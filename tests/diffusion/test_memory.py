"""What a run keeps in memory, where, and for how long."""

import gc
import os
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fatezero import (
    AttentionStore,
    Edit,
    FusionSettings,
    PromptEdit,
    StoreError,
    StoreSettings,
    edit,
    edit_many,
    invert,
)
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.recipes.recipe import Recipe
from fatezero.store import store as stores
from fatezero.store.budget import PRECISIONS
from small import forked, random_latents, random_text, relative, small_unet

SOURCE, TARGET = "a red circle on sand", "a blue square on sand"
FUSION = FusionSettings(0.8, 0.8, blend_self_attention=True, blend_latents=True, blend_threshold=0.9)
STEPS = 5


@pytest.fixture
def prompt(tokenizer):
    return PromptEdit(SOURCE, TARGET, tokenizer, mode="replace", blend_words=(["red", "circle"], ["blue", "square"]))


def inverted(denoiser, **settings):
    return invert(denoiser, random_latents(), random_text(0), STEPS, memory=StoreSettings(**settings))


def edited(denoiser, inversion, prompt, chunk=None):
    return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, FUSION, chunk)


# --- backends -----------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "chunk"), [("queries_keys", 2), ("maps", None)])
def test_edits_do_not_depend_on_where_the_store_is(denoiser, prompt, tmp_path, memory, chunk):
    expected = edited(denoiser, inverted(denoiser), prompt)
    for place in ("ram", "disk"):
        inversion = inverted(denoiser, memory=memory, place=place, folder=tmp_path)
        assert relative(edited(denoiser, inversion, prompt, chunk), expected) < 1e-9


def test_a_temporary_store_is_deleted_with_its_owner(denoiser, prompt, tmp_path):
    inversion = inverted(denoiser, memory="queries_keys", place="disk", folder=tmp_path)
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["store.safetensors"]
    edited(denoiser, inversion, prompt)
    copy = inversion.store.to("cpu")
    del inversion
    gc.collect()
    assert list(tmp_path.rglob("*.safetensors")), "the copy shares the file"
    del copy
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_store_with_a_path_is_kept_and_complete(denoiser, prompt, tmp_path):
    path = tmp_path / "clip.safetensors"
    inversion = inverted(denoiser, memory="queries_keys", path=path)
    before = edited(denoiser, inversion, prompt)
    del inversion
    gc.collect()
    assert torch.equal(edited(denoiser, type(inverted(denoiser))(AttentionStore.load(path)), prompt), before)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.safetensors"]


@pytest.mark.parametrize("keep", [True, False])
def test_an_interrupted_inversion_writes_no_file(denoiser, tmp_path, keep):
    def interrupt(done, of):
        if done == 3:
            raise KeyboardInterrupt

    place = {"path": tmp_path / "s.safetensors"} if keep else {"place": "disk", "folder": tmp_path}
    settings = StoreSettings("queries_keys", **place)
    with pytest.raises(KeyboardInterrupt):
        invert(denoiser, random_latents(), random_text(0), STEPS, memory=settings, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_does_not_produce_a_valid_store(denoiser, tmp_path):
    """The process is killed in the middle of the inversion."""

    def crash():
        settings = StoreSettings("queries_keys", path=tmp_path / "s.safetensors")
        progress = lambda done, of: done == 2 and os._exit(9)  # noqa: E731
        invert(denoiser, random_latents(), random_text(0), 3, memory=settings, progress=progress)

    assert forked(crash) == 9
    left = list(tmp_path.iterdir())
    assert [p.suffix for p in left] == [".partial"]
    with pytest.raises(FileNotFoundError):
        AttentionStore.load(tmp_path / "s.safetensors")
    with pytest.raises(StoreError, match="is damaged"):
        AttentionStore.load(left[0])


def test_files_of_a_crashed_run_are_removed_by_the_next(denoiser, tmp_path):
    (tmp_path / ".s.safetensors.1.partial").touch()
    inverted(denoiser, memory="queries_keys", path=tmp_path / "s.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"s.safetensors"}


def test_a_disk_too_small_is_reported_before_the_first_unet_call(unet, denoiser, tmp_path, monkeypatch):
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(MemoryError, match=r"queries_keys takes [\d.]+ MB of 100.00 kB free on disk"):
        inverted(denoiser, memory="queries_keys", path=tmp_path / "s.safetensors")
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_reported_and_no_file_remains(denoiser, tmp_path, monkeypatch):
    """Errors of the writing thread are raised in the caller."""

    def fail(self, name, tensor):
        raise OSError("no space left on device")

    monkeypatch.setattr(stores.SafetensorsWriter, "put", fail)
    with pytest.raises(OSError, match="no space left"):
        inverted(denoiser, memory="queries_keys", path=tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_next_step_is_read_while_the_current_one_runs(denoiser, prompt, tmp_path, monkeypatch):
    threads, fetch = [], stores.fetch
    monkeypatch.setattr(stores, "fetch", lambda *given: threads.append(threading.current_thread()) or fetch(*given))
    inversion = inverted(denoiser, memory="queries_keys", place="disk", folder=tmp_path)
    counts = []
    edit(
        denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, FUSION,
        progress=lambda done, of: counts.append(len(threads)),
    )  # fmt: skip
    assert threading.current_thread() not in threads
    assert len(threads) == FUSION.self_steps(STEPS)
    assert not any(t.is_alive() for t in threads), "the thread ends with the edit"


# --- shares, precisions, many edits -----------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_steps_that_are_not_stored_are_recomputed(denoiser, unet, prompt, share):
    expected = edited(denoiser, inverted(denoiser), prompt)
    inversion = inverted(denoiser, memory="queries_keys", keep_steps=share)
    calls = []
    counted = unet.register_forward_hook(lambda *_: calls.append(1))
    assert relative(edited(denoiser, inversion, prompt), expected) < 1e-9
    counted.remove()
    assert len(calls) == sum(Recipe(injection=FUSION).calls(STEPS, inversion.store.kept_steps)) - STEPS
    assert inversion.store.kept_steps == {0.0: 0, 0.4: 2, 0.8: 4}[share]


def test_errors_of_lower_precisions_match_their_digits(denoiser, prompt):
    def edited(**settings):
        inversion = inverted(denoiser, **settings)
        return edit(denoiser, inversion, random_text(1), random_text(2), 7.5, prompt, FusionSettings(0.8, 0.8))

    expected = edited()
    errors = {p: relative(edited(memory="queries_keys", precision=p), expected) for p in PRECISIONS}
    assert 0 < errors["float16"] < errors["bfloat16"] < errors["float8"] < 0.1
    assert errors["float16"] < 1e-3


@pytest.mark.parametrize("settings", [{}, {"memory": "queries_keys", "place": "disk"}])
def test_edits_in_one_pass_equal_single_edits_and_read_the_store_once(
    denoiser, unet, tokenizer, prompt, settings, monkeypatch
):
    other = PromptEdit(SOURCE, "a green star on sand", tokenizer, reweight={"green": 3.0})
    edits = [
        Edit(random_text(1), random_text(2), 7.5, prompt, FUSION),
        Edit(random_text(3), None, 1.0, other, FusionSettings(0.4, 0.2)),
        Edit(random_text(4), random_text(2), 3.0),
    ]
    inversion = inverted(denoiser, **settings)
    single = [
        edit(denoiser, inversion, e.target_embeddings, e.negative_embeddings, e.guidance_scale, e.prompt, e.fusion)
        for e in edits
    ]
    reads, fetch, calls = [], stores.fetch, []
    monkeypatch.setattr(stores, "fetch", lambda *given: reads.append(1) or fetch(*given))
    counted = unet.register_forward_hook(lambda *_: calls.append(1))
    together = edit_many(denoiser, inversion, edits)
    counted.remove()
    assert all(relative(a, b) < 1e-9 for a, b in zip(together, single, strict=True))
    reading = FUSION.cross_steps(STEPS)
    assert len(reads) == (reading if settings else 0)
    assert len(calls) == 5 * STEPS + (0 if settings else reading)
    assert edit_many(denoiser, inversion, []) == []


# --- memory and calls -------------------------------------------------------------------------


class Watcher(TorchDispatchMode):
    """Records the largest tensor that any operation creates."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = made if isinstance(made, (tuple, list)) else [made]
        self.largest = max([self.largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return made


@pytest.mark.parametrize(("memory", "words"), [
    pytest.param("recompute", True, marks=pytest.mark.slow), ("recompute", False),
    pytest.param("queries_keys", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_no_self_attention_map_is_ever_built(scheduler, prompt, memory, words):
    """48x48 tokens fused, one head: a map of one frame has 5.3 million numbers."""
    unet = small_unet(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=1,
    ).float()  # fmt: skip
    denoiser = DiffusersDenoiser(unet, scheduler)
    side, frames = 48, 2
    tokens = side**2
    fusion = replace(FUSION, mask_tokens=1024) if words else FusionSettings(0.8, 0.8)

    def run(kept):
        with Watcher() as watcher:
            source, *texts = (random_text(seed).float() for seed in range(3))
            inversion = invert(denoiser, random_latents(frames, side, side).float(), source, 2, memory=kept)
            edit(denoiser, inversion, *texts, 7.5, prompt, fusion)
        return watcher.largest

    assert run(memory) < tokens**2 / 8
    assert run("maps") >= frames * tokens**2, "the watcher detects a map that is built"


def test_keys_and_values_of_a_text_are_computed_once_per_run(unet, denoiser, prompt):
    rows = []
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    for projection in (layer.to_k, layer.to_v):
        projection.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    inversion = inverted(denoiser)
    assert rows == [1, 1]
    rows.clear()
    edited(denoiser, inversion, prompt)
    assert rows == [1, 1] * 3, "source, target and negative"
