"""The reference results of the authors' code, reproduced through the public names."""

import json

import pytest
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from fatezero import FusionSettings, PromptEdit, StoreSettings, edit, invert
from fatezero.hosts.diffusers import DiffusersDenoiser
from fatezero.store.records import MEMORIES
from small import FIXTURES, reference_denoiser, relative, round_as_the_reference

CASES = json.loads((FIXTURES / "cases.json").read_text())


@pytest.fixture(scope="module")
def reference() -> DiffusersDenoiser:
    return reference_denoiser()


@pytest.fixture
def roots_of_the_reference(monkeypatch):
    round_as_the_reference(monkeypatch)


OFTEN = {"style": "maps", "shape_replace": "queries_keys"}
"""What runs by default: both ways to fuse, and both inversions (that of `reconstruct` is `style`'s). test_edit shows on
small models that all memories agree. `pytest -m slow` runs the rest."""


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=[] if OFTEN.get(name) == memory else pytest.mark.slow)
        for name in CASES["cases"]
        for memory in MEMORIES
    ],
)
def test_reference(reference, roots_of_the_reference, name, memory):
    case, given = CASES["cases"][name], load_file(FIXTURES / f"{name}.safetensors")
    inversion = invert(
        reference,
        given["z0"],
        given["source"],
        steps=CASES["steps"],
        key_frames=tuple("middle" if entry == "mid" else entry for entry in case["kv"]),
        clip_norm=True,
        memory=StoreSettings(memory, max_tokens=1024),
    )
    prompt = PromptEdit(
        CASES["source"],
        case["target"],
        CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer"),
        mode="replace" if case["replace"] else "refine",
        blend_words=tuple(case["blend"]) if "blend" in case else None,
        reweight=dict(zip(*case.get("eq", ([], [])), strict=True)),
    )
    fusion = FusionSettings(
        cross_replace_steps=case["cross"],
        self_replace_steps=case["self"],
        blend_self_attention="blend" in case,
        blend_threshold=case.get("th", [0.3])[0],
        max_tokens=1024,
    )
    edited = edit(
        reference,
        inversion,
        given["target"],
        given["uncond"],
        guidance_scale=case["cfg"],
        prompt=prompt,
        fusion=fusion,
    )
    assert relative(inversion.latents[-1], given["noise"].double()) < 1e-6
    assert relative(edited, given["edited"].double()) < 1e-6
