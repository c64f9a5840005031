"""Moved objects of a clip: their shifts, what is preserved, and where they arrive."""

from dataclasses import replace

import pytest
import torch

from fatezero import FusionSettings, PnPSettings, PromptEdit, TokenFlowSettings, edit, invert
from fatezero.attention.masks import GivenMask
from fatezero.demo.scenes import SIZE, Motion, Scene, Track, render
from fatezero.diffusion.edit import EditPass
from fatezero.diffusion.parts import Edit
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.methods.layout import Layout, LayoutObject, Move, Path, Shift, Swap
from fatezero.methods.layout_guidance import LayoutGuidance, energy_gradient
from fatezero.methods.move_objects import Moved, MoveObjects, MoveSettings, _way, bounds, moves_of
from fatezero.methods.own_attention import OwnLayout
from fatezero.metrics.preservation import changed_pixels, intersection_over_union, psnr
from small import random_latents, random_text, relative

PROMPT, WORDS = "a red circle on grass", "red circle"
COLUMNS = [2, 3]


def box(left, top, right, bottom, frames=2, side=16):
    mask = torch.zeros(frames, side, side, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


def shift(x, y, growth=1.0):
    return Shift((Move(0, x, y, growth),))


# --- shifts -----------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.0, 0.25, 0.5 - 1e-9, 0.5, 0.5 + 1e-9, 0.75])
def test_a_shift_is_by_whole_cells_and_without_holes(off):
    x = random_latents(2, 16, 16)
    way = _way(box(3, 3, 7, 8), shift((2 + off) / 16, -3 / 16))
    right = 2 + (off > 0.6)  # half a cell is cut off
    moved = way.applied(x)
    assert torch.equal(moved[:, :, : 16 - 3, right:], x[:, :, 3:, : 16 - right])
    assert not moved[:, :, :, :right].any() and not moved[:, :, 13:].any()


def test_an_object_grows_about_its_centre():
    source = box(4, 4, 8, 8)
    way = _way(source, shift(0.25, 0, 2.0))
    grown = way.applied(source[:, None].float())[:, 0] > 0.5
    assert torch.equal(grown, box(6, 2, 14, 10))
    assert torch.equal(_way(grown, shift(-0.25, 0, 0.5)).applied(grown[:, None].float())[:, 0] > 0.5, source)


def test_a_path_moves_an_object_at_its_size_and_ignores_jitter():
    source = box(2, 2, 6, 6, frames=3)
    source[1, 6, 2:6] = True  # attention found one row more
    way = _way(source, Path.parse("0:0.75,0.75,0.25"))
    assert torch.equal(way.growth, torch.ones(3))
    assert torch.allclose(bounds(way.applied(source[:, None].float())[:, 0] > 0.5)[0][0], torch.tensor([0.75, 0.75]))
    assert torch.allclose(_way(source, Path.parse("0:0.5,0.5,0.5")).growth[0], torch.tensor(2.0))
    mask = box(8, 8, 12, 12, frames=1)
    assert torch.equal(_way(source, mask.float()).end, torch.tensor([[0.625, 0.625]] * 3))


def test_bounds_of_an_empty_mask_are_the_picture():
    centre, extent = bounds(torch.zeros(1, 4, 8, dtype=torch.bool))
    assert centre.tolist() == [[0.5, 0.5]] and extent.tolist() == [[1, 1]]
    centre, extent = bounds(box(2, 0, 4, 3, 1, 8))
    assert centre.tolist() == [[3 / 8, 1.5 / 8]] and extent.tolist() == [[2 / 8, 3 / 8]]


# --- an edit in float64 ---------------------------------------------------------------------


@pytest.fixture
def inversion(denoiser):
    return invert(denoiser, random_latents(), random_text(1), steps=5, key_frames="self", prompt=PROMPT)


@pytest.fixture
def pair(tokenizer):
    return PromptEdit(PROMPT, PROMPT, tokenizer)


def moving(where=None, source=None, **settings):
    source = box(2, 2, 7, 7, frames=1).float() if source is None else source
    return MoveObjects(objects=[Moved(where or shift(0.4, 0.3), COLUMNS, source=source)], **settings)


def edited(denoiser, inversion, pair, layout, **more):
    more = {"prompt": pair, "fusion": FusionSettings(0.8, 0.8)} | more
    return edit(denoiser, inversion, random_text(2), random_text(3), 5.0, layout=layout, **more)


def test_the_clip_is_preserved_outside_the_area(denoiser, inversion, pair):
    """Only the object's old and new positions and a margin of one cell change; the rest is equal bit for bit."""
    moved = edited(denoiser, inversion, pair, moving())
    clip = inversion.latents[0]
    may = box(1, 1, 15, 13, frames=3)
    assert torch.equal(moved.movedim(1, -1)[~may], clip.movedim(1, -1)[~may])
    assert relative(moved, clip) > 1e-2


def test_the_object_is_copied_if_all_steps_carry_it(denoiser, inversion, pair):
    moved = edited(denoiser, inversion, pair, moving(carry=1.0, scale=0))
    clip = inversion.latents[0]
    right, down = 6, 5  # 0.4 and 0.3 of sixteen cells, rounded
    assert torch.allclose(moved[..., 2 + down : 7 + down, 2 + right : 7 + right], clip[..., 2:7, 2:7])
    kept = edited(denoiser, inversion, pair, moving(shift(0, 0), carry=1.0, scale=0))
    assert torch.allclose(kept[..., 2:7, 2:7], clip[..., 2:7, 2:7])


def test_strength_zero_computes_no_gradient_and_changes_nothing(denoiser, inversion, pair, monkeypatch):
    monkeypatch.setattr(type(denoiser), "gradient", None)
    layout = LayoutGuidance(target=box(8, 8, 12, 12, 3).float(), columns=COLUMNS, scale=0)
    assert torch.equal(edited(denoiser, inversion, pair, layout), edited(denoiser, inversion, pair, None))
    edited(denoiser, inversion, pair, moving(scale=0))


def test_guidance_lowers_the_energy_in_an_edit(denoiser, inversion, pair):
    target = box(8, 8, 12, 12, 3).float()
    layout = LayoutGuidance(target=target, columns=COLUMNS, energy="inside", scale=200.0)
    edit = Edit(random_text(2), random_text(3), 5.0, pair, FusionSettings(0.8, 0.8), layout=layout)
    with EditPass(denoiser, inversion, [edit]) as run:
        text, store = run._runs[0].target, inversion.store

        def energy(z):
            return energy_gradient(denoiser, z, store.timesteps[0], text, layout, store.calls())[0]

        (moved,) = run.guided(run.start, 0)
        assert energy(moved) < energy(run.start[0])


@pytest.mark.parametrize("memory", ["queries_keys", pytest.param("maps", marks=pytest.mark.slow)])
def test_the_memories_agree(denoiser, inversion, pair, memory):
    other = invert(denoiser, random_latents(), random_text(1), 5, "self", memory=memory, prompt=PROMPT)
    source = replace(moving(), objects=[Moved(shift(0.3, 0), COLUMNS, source_columns=COLUMNS)])
    assert relative(edited(denoiser, other, pair, source), edited(denoiser, inversion, pair, source)) < 1e-9


def test_chunks_and_several_objects_and_masks(denoiser, inversion, pair):
    two = MoveObjects(
        objects=[
            Moved(shift(0.4, 0), [2], source=box(1, 1, 5, 5, 1).float()),
            Moved(shift(-0.4, 0), [3], source=box(9, 9, 14, 14, 1).float()),
        ]
    )
    whole = edited(denoiser, inversion, pair, two)
    assert relative(edited(denoiser, inversion, pair, two, chunk_frames=2), whole) < 1e-9
    assert relative(whole, edited(denoiser, inversion, pair, replace(two, objects=two.objects[:1]))) > 1e-3
    only = edited(denoiser, inversion, pair, two, mask=GivenMask(box(0, 0, 16, 8, 1).float()))
    assert torch.equal(only[:, :, 8:], inversion.latents[0][:, :, 8:]), "a given mask limits the layout's area"


def test_other_parts_of_an_edit_combine_with_it(denoiser, inversion, pair):
    """TokenFlow, less strength, and another prompt: the clip is preserved outside the area."""
    may, clip = box(1, 1, 15, 13, frames=3), inversion.latents[0]
    plain = edited(denoiser, inversion, pair, moving())
    for more in ({"propagation": TokenFlowSettings(2)}, {"strength": 0.6}, {"chunk_frames": 1}):
        made = edited(denoiser, inversion, pair, moving(), **more)
        assert torch.equal(made.movedim(1, -1)[~may], clip.movedim(1, -1)[~may]), more
        assert relative(made, plain) > 1e-3 or "chunk_frames" in more
    free = edited(denoiser, inversion, pair, moving(), prompt=None, fusion=None)
    assert relative(free.movedim(1, -1)[~may], clip.movedim(1, -1)[~may]) > 1e-2, "nothing is injected from the source"


def test_source_words_locate_the_object_and_columns_guide_it(tokenizer):
    layout = Layout("a blue circle on grass", tokenizer, (LayoutObject("circle", shift(0.1, 0)),), MoveSettings())
    moves = moves_of(layout, "big red circle", 77, 77)
    assert moves.objects[0].columns == [3] and len(moves.objects[0].source_columns) == 1
    with pytest.raises(ValueError, match="'circle' is not in the prompt"):
        moves_of(layout, "a red square", 77, 77)
    assert isinstance(layout.guidance(2, 16, 16, 77), OwnLayout), "a shift of a new clip is relative to the plain one"
    swapped = Layout("a blue circle on grass", tokenizer, (LayoutObject("circle", Swap("grass")),), MoveSettings())
    with pytest.raises(ValueError, match="swap works in new clips"):
        moves_of(swapped, "big red circle on grass", 77, 77)


def test_refusals(denoiser, inversion, pair):
    with pytest.raises(ValueError, match="mode is forward"):
        moving(mode="forward")
    with pytest.raises(ValueError, match="objects is empty"):
        MoveObjects(objects=[])
    with pytest.raises(ValueError, match="words in the source prompt"):
        Moved(shift(0, 0), [1])
    with pytest.raises(ValueError, match="Plug-and-Play"):
        edited(denoiser, inversion, pair, moving(), fusion=PnPSettings())
    with pytest.raises(ValueError, match="mask has 2 frames, .* 3"):
        edited(denoiser, inversion, pair, moving(source=box(2, 2, 7, 7, 2).float()))
    with pytest.raises(ValueError, match="token 99"):
        edited(denoiser, inversion, pair, replace(moving(), objects=[Moved(shift(0, 0), [99], [1])]))
    with pytest.raises(ValueError, match="mode is forward"):
        forward = LayoutGuidance(target=box(8, 8, 12, 12, 3).float(), columns=COLUMNS, mode="forward")
        edited(denoiser, inversion, pair, forward)
    for text, message in (("0:0.1", "frame:right,down"), ("0:0,0,20", "growth is 20"), ("", "at least one stop")):
        with pytest.raises(ValueError, match=message):
            Shift.parse(text)


# --- the demo world ---------------------------------------------------------------------------


@pytest.mark.slow  # moving an object of a clip is tested in tests/cli
def test_an_object_of_the_demo_world_follows_its_path():
    """Much closer to the scene with the other track than by the prompt only; the ground is preserved."""
    checkpoint, scene = Checkpoint.load("demo"), Scene.parse("a red circle on water")
    track = Track(22, 24, 14)
    before, after = (render(scene, Motion((t,), (0.3, 0.1), 5), 3) for t in (track, replace(track, x=42, y=40)))
    ground = render(replace(scene, things=()), Motion((), (0.3, 0.1), 5), 3).frames
    text, empty = (checkpoint.encode_prompt(words, SIZE, SIZE) for words in (scene.caption, ""))
    inverted = invert(checkpoint.denoiser, checkpoint.encode_frames(before.frames), text, 10, prompt=scene.caption)
    pair = PromptEdit(scene.caption, scene.caption, checkpoint.tokenizer)
    layout = Layout(
        scene.caption, checkpoint.tokenizer, (LayoutObject(WORDS, shift(20 / 64, 16 / 64)),), MoveSettings()
    )
    moves = moves_of(layout, scene.caption, text.text_tokens, text.text_tokens)
    latents = edit(
        checkpoint.denoiser, inverted, text, empty, 5.0, prompt=pair, fusion=FusionSettings(0.8, 0.8), layout=moves
    )
    shown = checkpoint.decode_latents(latents)
    moved, expected = (changed_pixels(ground, frames, 0.1) for frames in (shown, after.frames))
    assert intersection_over_union(moved, expected) > 0.6
    unchanged = ((before.frames - after.frames).abs().amax(1) < 1 / 255).float()
    assert psnr(shown, after.frames, unchanged) > 30
