"""Bytes and backends for full-size models, computed from shapes."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from fatezero import StoreSettings
from fatezero.attention.key_frames import KeyFrames
from fatezero.demo.model import build_scheduler
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.store import budget
from fatezero.store.budget import Demand, plan_store

GB = 10**9
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def demand():
    """8 frames of 512x512, 50 steps, SD 1.5 in fp16."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).half()
    sites = DiffusersDenoiser(unet, build_scheduler()).sites(64, 64)
    return Demand(sites, (8, 4, 64, 64), 4, 50, KeyFrames(("self", "middle")), torch.float16, 77, 77 * 768 * 2)


def sized(memory, **settings):
    return StoreSettings(memory, max_tokens=1024, **settings)


def test_stores_at_full_size_are_as_small_as_documented(demand):
    assert demand.nbytes("recompute", sized("recompute")) < 0.1 * GB
    whole = demand.nbytes("queries_keys", sized("queries_keys"))
    assert whole < 12 * GB
    latents = demand.nbytes("recompute", sized("recompute"))
    part = demand.nbytes("queries_keys", sized("queries_keys", keep_steps=0.5))
    assert (part - latents) / (whole - latents) == pytest.approx(25 / 50)
    assert demand.nbytes("queries_keys", sized("queries_keys", precision="float8")) < 0.65 * whole
    keys = replace(demand, key_frames=KeyFrames(("middle",))).nbytes("queries_keys", sized("queries_keys"))
    assert keys < 0.75 * whole, "only keys of the key frames"


@pytest.mark.parametrize(
    ("settings", "free", "chosen"),
    [
        ({}, (24, 60, 500), ("queries_keys", "device")),
        ({}, (8, 60, 500), ("queries_keys", "ram")),
        ({}, (8, 13, 500), ("queries_keys", "disk")),
        ({}, (8, 13, 3), ("recompute", "device")),
        ({"budget_gb": 1}, (24, 60, 500), ("recompute", "device")),
        ({"budget_gb": 1.5, "precision": "float8", "keep_steps": 0.2}, (24, 60, 500), ("queries_keys", "device")),
        ({"place": "disk"}, (24, 60, 500), ("queries_keys", "disk")),
        ({"memory": "maps"}, (24, 90, 500), ("maps", "disk")),
        ({"memory": "recompute"}, (0.02, 60, 500), ("recompute", "ram")),
        ({"fastest": "keys_values"}, (24, 60, 500), ("keys_values", "device")),
        ({"fastest": "keys_values"}, (4, 6, 500), ("recompute", "device")),
        ({"fastest": "keys_values", "place": "disk"}, (4, 6, 500), ("keys_values", "disk")),
    ],
)
def test_the_fastest_memory_and_place_that_fit_are_taken(demand, monkeypatch, settings, free, chosen):
    rooms = dict(zip(budget.PLACES, free, strict=True))
    monkeypatch.setattr(budget, "_free_bytes", lambda place, *_: round(rooms[place] * GB))
    plan = plan_store(sized(settings.pop("memory", "auto"), **settings), demand, CUDA)
    assert (plan.memory, plan.place) == chosen


def test_the_choice_gives_its_reason(demand, monkeypatch):
    monkeypatch.setattr(budget, "_free_bytes", lambda place, *_: {"device": 8, "ram": 9, "disk": 3}[place] * GB)
    why = str(plan_store(sized("auto"), demand, CUDA))
    assert why.startswith("recompute on the device, 2")
    assert "queries_keys takes 11.2" in why
    assert "of 8.00 GB free on the device" in why
    assert "of 3.00 GB free on disk" in why


def test_nothing_fits(demand, monkeypatch):
    monkeypatch.setattr(budget, "_free_bytes", lambda *_: 10**6)
    with pytest.raises(MemoryError, match=r"recompute takes 26.* MB of 1.00 MB free.*maps [\d.]+ GB"):
        plan_store(sized("auto"), demand, CUDA)
    with pytest.raises(MemoryError, match=r"queries_keys takes [\d.]+ GB of budget_gb 0.1"):
        plan_store(sized("queries_keys", budget_gb=0.1), demand, CUDA)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"memory": "disk"}, "recompute, queries_keys, maps"),
        ({"place": "cloud"}, "device, ram, disk"),
        ({"precision": "int8"}, "float16, bfloat16, float8"),
        ({"budget_gb": -1}, "budget_gb"),
        ({"keep_steps": 1.5}, "keep_steps is 1.5; it must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"memory": "maps", "precision": "float16"}, "precision"),
    ],
)
def test_settings_out_of_range_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        StoreSettings(**wrong)
