"""The benchmark's cases: held out, repeatable, with a truth."""

from dataclasses import replace

import pytest
import torch

from fatezero.benchmark.cases import KINDS, cases_of, sample_cases
from fatezero.benchmark.measure import measure, object_iou, unchanged_pixels
from fatezero.demo.judge import read_words
from fatezero.demo.scenes import Scene, render


@pytest.fixture(scope="module")
def cases():
    return sample_cases(7, 6, 3)


def test_every_kind_occurs_and_no_case_was_trained_on(cases):
    assert [case.kind for case in cases] == [kind for kind in KINDS for _ in range(6)]
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.source.held_out for case in cases)


def test_each_kind_changes_only_its_attribute(cases):
    expected = {
        "attribute": "colour",
        "texture": "texture",
        "shape": "shape",
        "style": "style",
        "background": "background",
    }
    for case in cases:
        words, two = {word for _, word in case.changed}, case.kind.endswith("objects")
        assert len(case.source.things) == 1 + two
        if case.kind == "swap":
            assert words == {"colour", "texture", "shape"}
        else:
            assert len(case.changed) == 1
            assert two or words == {expected[case.kind]}
        assert (case.changed[0][0] is None) == bool(words & {"background", "style"})
        assert case.preset == ("shape" if "shape" in words else "style" if "style" in words else "attribute")


def test_similar_objects_differ_only_in_shape(cases):
    for case in cases:
        if case.kind == "alike objects":
            first, second = case.source.things
            assert (first.colour, first.texture) == (second.colour, second.texture)
            assert first.shape != second.shape


def test_equal_seeds_give_equal_cases_and_other_seeds_other_cases(cases):
    assert sample_cases(7, 6, 3) == cases
    assert sample_cases(7, 2, 3) == [case for case in cases if int(case.name[-2:]) < 2], "more cases keep the first"
    assert {c.motion for c in sample_cases(8, 6, 3)}.isdisjoint({c.motion for c in cases})


def test_cases_of_selected_kinds_are_a_subset_of_all_cases(cases):
    some = ("shape", "two objects")
    assert sample_cases(7, 6, 3, some) == [case for case in cases if case.kind in some]
    with pytest.raises(ValueError, match="unknown kind 'motion'"):
        sample_cases(7, 1, 3, ["motion"])


def test_blend_words_name_what_changes():
    caption = "a red square and a blue star on sand"
    (thing,) = cases_of([(caption, "a red square and a blue circle on sand")], 0, 2)
    assert thing.blend_words == (("blue star",), ("blue circle",))
    (ground,) = cases_of([("a red star on sand", "a red star on grass")], 0, 2)
    assert ground.blend_words == (("sand",), ("grass",))
    (style,) = cases_of([("a red star on sand", "comic drawing of a red star on sand")], 0, 2)
    assert style.blend_words == ((), ())


def test_custom_captions():
    pairs = [("a red star on sand", "a dotted blue star on sand"), ("a red star on sand", "a red circle on sand")]
    pairs += [("a red star on sand", "a striped red circle on sand")]
    pairs += [(f"a {c} star and a red circle on sand", f"a {c} star and a red square on sand") for c in ("red", "blue")]
    both, shape, swap, alike, unlike = cases_of(pairs, 3, 2)
    assert both.kind == "attribute" and len(both.changed) == 2
    assert (shape.kind, shape.preset) == ("shape", "shape")
    assert (swap.kind, alike.kind, unlike.kind) == ("swap", "alike objects", "two objects")
    assert cases_of(pairs, 3, 2)[:2] == [both, shape] and cases_of(pairs, 4, 2)[:2] != [both, shape]
    with pytest.raises(ValueError, match="nothing changes"):
        cases_of([("a red star on sand", "a red star on sand")], 0, 2)
    with pytest.raises(ValueError, match="same number of things"):
        cases_of([("a red star on sand", "a red star and a red circle on sand")], 0, 2)
    with pytest.raises(ValueError, match="not a caption"):
        cases_of([("a jeep on a road", "a car on a road")], 0, 2)


def test_the_ground_truth_scores_perfectly_and_the_source_does_not(cases):
    for case in cases:
        right, wrong = measure(case, case.truth.frames), measure(case, case.clip.frames)
        assert right["success"] == right["changed"] == right["kept"] == 1, case
        assert right["object_iou"] == 1
        assert wrong["success"] == wrong["changed"] == 0, case
        assert wrong["kept"] == 1, case
        if case.kind != "style":
            assert right["preserved_db"] == float("inf")
            assert wrong["preserved_db"] > 55, "less than half a grey level"
            assert right["preserved_ssim"] > 0.99


def test_a_requested_change_in_the_wrong_place_is_not_preserved():
    (case,) = cases_of([("a red square and a blue star on sand", "a green square and a blue star on sand")], 0, 3)
    leaked = render(Scene.parse("a green square and a green star on sand"), case.motion, 3).frames
    figures = measure(case, leaked)
    assert (figures["changed"], figures["kept"], figures["success"]) == (1, 0, 0)


def test_reading_single_frames():
    source, target = Scene.parse("a red square on sand"), Scene.parse("a green square on sand")
    (case,) = cases_of([(source.caption, target.caption)], 0, 4)
    half = torch.cat([case.clip.frames[:2], case.truth.frames[2:]])
    assert read_words(source, target, half) == (0.5, 0.5, 1.0)


def test_outline_and_unchanged_pixels(cases):
    case = next(c for c in cases if c.kind == "shape")
    assert object_iou(case, case.clip.frames) < 0.95
    assert object_iou(case, case.ground) == 0
    unchanged = unchanged_pixels(case)
    assert 0.4 < unchanged.mean() < 0.99
    assert (unchanged * (case.truth.mask - case.clip.mask).abs()).amax() < 0.05


def test_a_broken_outline_is_wrong_even_if_its_words_are_recognised():
    (case,) = cases_of([("a red circle on water", "a red triangle on water")], 0, 2)
    turned = render(case.target, replace(case.motion, tracks=(replace(case.motion.tracks[0], angle=0.3),)), 2)
    assert measure(case, turned.frames)["success"] == 1, "a turned triangle is a triangle"
    (track,) = case.motion.tracks
    small, large = replace(track, x=track.x - 6, radius=0.6 * track.radius), replace(track, x=track.x + 6)
    left, right = (render(case.target, replace(case.motion, tracks=(own,)), 2) for own in (small, large))
    figures = measure(case, torch.where(left.mask[:, None] > 0.5, left.frames, right.frames))
    assert (figures["outline"], figures["success"]) == (0, 0)
    assert figures["changed"] == figures["kept"] == 1, "the recognised words do not show it"


def test_a_removal_succeeds_if_only_the_object_disappears():
    for case in sample_cases(7, 2, 2, ["removal"]):
        assert case.removed is not None and len(case.target.things) == 1 == len(case.source.things) - 1
        assert case.blend_words[0] and not case.blend_words[1]
        right, wrong = measure(case, case.truth.frames), measure(case, case.clip.frames)
        assert right["success"] == right["changed"] == right["kept"] == 1
        assert wrong["changed"] == wrong["success"] == 0
        emptied = measure(case, case.ground)
        assert emptied["changed"] == 1 and emptied["success"] == 0, "the other object is missing"
        left = case.truth.frames.clone()
        left[..., ::3] = case.clip.frames[..., ::3]
        assert measure(case, left)["changed"] == 0, "a third of it remains"
