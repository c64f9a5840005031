from random import Random

import pytest
import torch

from fatezero.demo.scenes import (
    COLOURS,
    SIZE,
    STYLES,
    VOCABULARY,
    Motion,
    Scene,
    Thing,
    Track,
    random_motion,
    random_scene,
    render,
    scenes,
)
from fatezero.metrics.temporal import warp_error

STILL = Motion((Track(32, 32, 16),))


def test_captions_are_parsed_back():
    random = Random(0)
    for _ in range(200):
        scene = random_scene(random)
        assert Scene.parse(scene.caption) == scene
        assert set(scene.caption.split()) <= set(VOCABULARY)


@pytest.mark.parametrize("caption", ["a red circle", "a red dog on sand", "circle on sand", "a red circle on the moon"])
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption"):
        Scene.parse(caption)


def test_the_stream_repeats_and_excludes_held_out_scenes():
    def first(seed, held_out):
        stream = scenes(seed, held_out)
        return [next(stream) for _ in range(50)]

    assert first(3, False) == first(3, False)
    assert not any(scene.held_out for scene, _ in first(3, False))
    assert all(scene.held_out for scene, _ in first(3, True))


def test_an_edit_changes_only_what_its_words_change():
    source, motion = Scene((Thing("red", "square"),), "water"), random_motion(Random(1))
    before, after = render(source, motion), render(source.with_thing(colour="blue"), motion)
    outside = before.mask == 0
    assert outside.any()
    assert torch.equal(before.masks, after.masks)
    assert torch.equal(before.flow, after.flow)
    difference = (before.frames - after.frames).abs().amax(1)
    assert difference[outside].max() == 0
    assert difference[before.mask == 1].min() > 0.1


@pytest.mark.parametrize("style", STYLES)
def test_flow_carries_each_frame_to_the_next(style):
    """Unoccluded pixels of an object move by the flow; watercolor's grain stays on the paper."""
    scene = Scene((Thing("red", "square", "dotted"),), "bricks", style)
    motion = Motion((Track(24, 32, 14, vx=2, vy=1),), pan=(1, 0))
    clip = render(scene, motion, 3)
    inner = clip.mask[:-1] > 0.99
    assert torch.equal(clip.flow[:, 0][inner], torch.full_like(clip.flow[:, 0][inner], 2.0).round())
    assert warp_error(clip.frames, clip.flow, inner) < (0.02 if style == "watercolor" else 0.01)


def test_sizes_and_ranges():
    random = Random(5)
    for _ in range(20):
        scene = random_scene(random)
        clip = render(scene, random_motion(random, len(scene.things)), 4)
        assert clip.frames.shape == (4, 3, SIZE, SIZE)
        assert clip.masks.shape == (len(scene.things), 4, SIZE, SIZE)
        assert clip.flow.shape == (3, 2, SIZE, SIZE)
        assert 0 <= clip.frames.min() <= clip.frames.max() <= 1
        assert clip.masks.sum(0).max() <= 1 + 1e-6
        assert (clip.masks.sum((-1, -2)) > 100).all(), "every thing is visible in every frame"


def test_objects_have_their_colour():
    for name, colour in COLOURS.items():
        clip = render(Scene((Thing(name, "circle"),), "sand"), STILL, 1)
        mean = clip.frames[0][:, clip.mask[0] == 1].mean(1)
        assert (mean - torch.tensor(colour)).abs().max() < 0.1


def test_things_and_tracks_must_match():
    with pytest.raises(ValueError, match="2 things but 1 tracks"):
        render(Scene((Thing("red", "circle"), Thing("blue", "star")), "sand"), STILL, 1)
