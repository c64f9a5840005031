import resource
import signal
import sys

import pytest
import torch

from fatezero import AttentionStore, StoreError, StoreSettings, invert
from fatezero.attention.condition import Condition
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.store.budget import PRECISIONS
from fatezero.store.identity import ModelIdentity
from fatezero.store.records import MEMORIES
from small import forked, random_latents, random_text


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("key_frames", [("self", "middle"), ("middle",), ("previous", "first")])
def test_estimated_bytes_equal_the_stored_bytes(denoiser, memory, key_frames, place):
    latents, text = random_latents(height=12), random_text(0)
    store = invert(denoiser, latents, text, 3, key_frames, memory=StoreSettings(memory, place, keep_steps=0.7)).store
    assert store.nbytes == store.plan.nbytes
    assert store.kept_steps == (0 if memory == "recompute" else 2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_of_smaller_precisions(denoiser, precision):
    """The UNet's float64 takes 8 bytes; float8 adds a scale for each head."""

    def attention(settings):
        store = invert(denoiser, random_latents(), random_text(0), 2, memory=settings).store
        assert store.nbytes == store.plan.nbytes
        return store.backend.nbytes

    whole = attention(StoreSettings("queries_keys"))
    share = attention(StoreSettings("queries_keys", precision=precision)) / whole
    assert share == pytest.approx({"float8": 1 / 8}.get(precision, 1 / 4), rel=0.01)


def test_recompute_is_smaller_than_queries_and_keys_and_these_than_maps(denoiser):
    memories = ("recompute", "queries_keys", "maps")
    sizes = [invert(denoiser, random_latents(), random_text(0), steps=2, memory=m).store.nbytes for m in memories]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_store_loaded_from_disk_is_unchanged(denoiser, tmp_path, memory):
    store = invert(denoiser, random_latents(), random_text(0), steps=2, memory=memory, prompt="a red circle").store
    store.save(tmp_path / "s.safetensors")
    back = AttentionStore.load(tmp_path / "s.safetensors")
    assert torch.equal(back.latents, store.latents)
    assert (back.nbytes, back.prompt, back.key_frames, back.model) == (
        store.nbytes, store.prompt, store.key_frames, store.model,
    )  # fmt: skip
    if memory != "recompute":
        names = {s.name for s in denoiser.sites(16, 16) if memory != "keys_values" or s.kind == "self"}
        kept, read = (one.fetch(1, names, Chunk.whole(store.frames), torch.device("cpu")) for one in (store, back))
        for name in names:
            for part, tensor in kept[name].tensors.items():
                assert torch.equal(read[name].tensors[part], tensor)
        assert AttentionStore.load(back.save(tmp_path / "again.safetensors")).nbytes == store.nbytes
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_truncated_store_is_refused(denoiser, tmp_path):
    path = invert(denoiser, random_latents(), random_text(0), steps=2).store.save(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match="damaged"):
        AttentionStore.load(path)


def test_files_that_are_not_stores_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no store at"):
        AttentionStore.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(StoreError, match="damaged"):
        AttentionStore.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(StoreError, match="not a store"):
        AttentionStore.load(tmp_path / "lora.safetensors")


def test_a_layer_that_was_not_recorded_is_named(denoiser):
    settings = StoreSettings("queries_keys", max_tokens=64)
    store = invert(denoiser, random_latents(), random_text(0), steps=1, memory=settings).store
    with pytest.raises(StoreError, match=r"down\.0\.self.*max_tokens"):
        store.fetch(0, {"down.0.self"}, Chunk.whole(store.frames), torch.device("cpu"))


def test_an_unknown_memory_lists_the_three(denoiser):
    with pytest.raises(ValueError, match="recompute, queries_keys, maps"):
        invert(denoiser, random_latents(), random_text(0), steps=1, memory="disk")


def test_a_memory_that_does_not_fit_is_refused_with_its_bytes(denoiser):
    latents = torch.empty(1, dtype=torch.float64).expand(4096, 4, 512, 512)
    with pytest.raises(MemoryError, match=r'"maps" does not fit.*recompute [\d.]+ [GM]B'):
        invert(denoiser, latents, random_text(0), steps=500, memory="maps")


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_leaves_no_partial_store(tmp_path):
    store = AttentionStore(
        "recompute", torch.zeros(3, 2, 4, 32, 32), Condition(torch.zeros(1, 77, 8)), (2, 1), (1.0, 0.5, 0.2),
        KeyFrames(("self",)), False, ModelIdentity("x", "", "float32"),
    )  # fmt: skip

    def save():
        """Save on a disk with room for 10 kB."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(OSError, match="the store of"):
            store.save(tmp_path / "s.safetensors")

    assert forked(save) == 0
    assert list(tmp_path.iterdir()) == []
