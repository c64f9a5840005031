"""The source's own pixels around an edit: weights, colours, planes of any format, and files written without loss."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fatezero.attention.masks import changed_latents
from fatezero.video.colour import converted, to_rgb
from fatezero.video.orientation import Display, Orientation, display_matrix
from fatezero.video.planes import box_of, planar, planes_of, with_edit
from fatezero.video.read import open_video
from fatezero.video.restore import Feather, feather, placed, reach_of, restore_unchanged
from fatezero.video.size import resize_to_fill
from fatezero.video.write import write_video

SIDE, REACH = 64, 8


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def square(size=8, at=(3, 5)):
    """A mask on a grid of latents, 1 in a square."""
    mask = torch.zeros(size, size)
    mask[at[0] : at[1], at[0] : at[1]] = 1
    return mask


def recoded(path, form, options=None, size=(70, 50), turn=0, aspect=None, codec="ffv1", full=False, hdr=0, frames=3):
    """A noisy clip of any format, rotation and aspect."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, form
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if full:
            stream.codec_context.color_range = 2
        if hdr:
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = hdr, 9, 9
        if turn:
            stream.set_display_rotation(turn)
        for i in range(frames):
            small = noise(size[1] // 5, size[0] // 5, 3, seed=i)[None].movedim(-1, 1).float()
            soft = F.interpolate(small, size=(size[1], size[0]), mode="bilinear")[0].movedim(0, -1)
            frame = av.VideoFrame.from_ndarray(soft.round().byte().numpy(), format="rgb24").reformat(format=form)
            frame.pts, frame.time_base = i, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def test_weights_are_one_inside_zero_beyond_the_reach_and_smooth():
    inside, rim = feather(square(), (SIDE, SIDE), (SIDE, SIDE), REACH)
    assert (inside[24:40, 24:40] == 1).all()
    near = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    near[24 - REACH : 40 + REACH, 24 - REACH : 40 + REACH] = True
    assert (inside[~near] == 0).all() and (inside[near] > 0).float().mean() > 0.9
    assert inside.diff(dim=0).abs().max() <= 2 / REACH
    assert (rim[inside > 0] == 0).all() and rim.max() > 0.5


@pytest.mark.parametrize("value", [0, 1])
def test_masks_of_zeros_and_ones(value):
    source, edited = noise(2, SIDE, SIDE, 3), noise(2, SIDE, SIDE, 3, seed=1)
    mask = torch.full((1, 8, 8), float(value))
    assert torch.equal(restore_unchanged(source, edited, mask, REACH), edited if value else source)


@pytest.mark.parametrize("full", [(64, 64), (96, 64), (131, 77), (301, 447), (48, 40)])
@pytest.mark.parametrize("cell", [(0, 0), (3, 4), (7, 7)])
def test_one_cell_changes_only_what_is_near_it(full, cell):
    """Sources of any size, as `resize_to_fill` fits them; cells in the middle and at the rim."""
    source, edited = noise(1, full[1], full[0], 3), noise(1, SIDE, SIDE, 3, seed=1)
    mask = torch.zeros(1, 8, 8)
    mask[0, cell[0], cell[1]] = 1
    result = restore_unchanged(source, edited, mask, REACH)
    assert result.shape == source.shape
    scale = max(SIDE / full[0], SIDE / full[1])
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in full[::-1]), indexing="ij")
    y, x = ((x_ - n / 2) * scale + SIDE / 2 for x_, n in ((y, full[1]), (x, full[0])))
    slack = REACH + 2 * max(1, scale) + 1
    far = [(p < 8 * c - slack) | (p > 8 * c + 8 + slack) for p, c in ((y, cell[0]), (x, cell[1]))]
    changed = (result != source).any(-1)[0]
    assert changed.any() and not (changed & (far[0] | far[1])).any()


def test_placing_is_the_inverse_of_fitting():
    ramp = torch.stack(torch.meshgrid(torch.linspace(0, 255, 150), torch.linspace(0, 255, 210), indexing="ij"))
    source = torch.stack([*ramp, ramp[0]]).movedim(0, -1).round().byte()[None]
    fitted = resize_to_fill(source, 96, 96)[0].movedim(-1, 0).float()
    back = placed(fitted, (210, 150)).movedim(0, -1)
    assert (back[8:-8, 38:-38] - source[0, 8:-8, 38:-38].float()).abs().max() < 2.5


def test_a_shift_of_colour_leaves_no_seam():
    """The edit has the source's picture, 9 levels brighter, with a grey square: only the square remains."""
    source = torch.full((1, 128, 128, 3), 100.0)
    source += 40 * torch.sin(torch.arange(128) / 20)[None, :, None, None]
    edited = source + 9
    edited[:, 52:76, 52:76] = 200 + 9
    mask = square(16, (6, 10))[None]
    source, edited = source / 255, edited / 255
    matched, plain = (255 * (restore_unchanged(source, edited, mask, REACH, how) - source) for how in (True, False))
    ring = torch.ones(128, 128, dtype=torch.bool)
    ring[52:76, 52:76] = False
    assert matched[0][ring].abs().max() < 0.5 and plain[0][ring].abs().max() > 8
    assert (matched[0, 53:75, 53:75] - (200 - 255 * source[0, 53:75, 53:75])).abs().max() < 0.5


def test_reach_is_measured():
    """Of decoders that blur over a known distance."""

    def decode(radius, z):
        picture = F.interpolate(z[:, :3], scale_factor=4, mode="nearest")
        return F.avg_pool2d(picture, 2 * radius + 1, 1, radius, count_include_pad=False)

    latents = torch.randn(1, 4, 40, 50, generator=torch.Generator().manual_seed(0))
    found = [reach_of(lambda z, r=r: decode(r, z), latents) for r in (0, 3, 9)]
    assert found[0] == 1 and 3 <= found[1] <= 4 and 8 <= found[2] <= 10


def test_changed_latents():
    source = torch.zeros(2, 4, 8, 8)
    edited = source.clone()
    assert not changed_latents(edited, source).any()
    edited[1, 2, 3, 4], edited[0, 0, 1, 1] = 1, 0.02
    assert changed_latents(edited, source).nonzero().tolist() == [[1, 3, 4]]
    assert changed_latents(edited, source, 0).nonzero().tolist() == [[0, 1, 1], [1, 3, 4]]


def test_a_transparent_edit_shows_its_colours_over_the_background():
    """Where alpha is a half, the stored colour is twice as far from the background."""
    frame = av.VideoFrame.from_ndarray(np.full((64, 64, 4), 128, np.uint8), format="rgba")
    edited = torch.full((3, 64, 64), 150.0)
    ones = feather(torch.ones(1, 1), (64, 64), (64, 64), REACH)
    *colours, alpha = planes_of(with_edit(frame, edited, ones, background=(100, 100, 100)))
    assert (alpha == 128).all() and all(abs(int(plane[32, 32]) - 200) <= 1 for plane in colours)


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
@pytest.mark.parametrize("cut", [(6, 4, 2, 8), (2, 2, 3, 5)])
def test_crops_of_stored_frames(tmp_path, turn, cut):
    """A crop of the shown frame is the same part of the stored one, however it is turned."""
    path = recoded(tmp_path / "s.mp4", "yuv444p", turn=turn, codec="libx264", size=(96, 64))
    source = open_video(path)
    left, top, right, bottom = cut
    frame, shown = next(source.stored()), next(source.frames())
    nothing = torch.zeros(source.size[::-1])
    box = box_of(frame, cut, source.size)
    made = with_edit(frame, torch.zeros(3, *nothing.shape), Feather(nothing, nothing), box=box)
    turned = Orientation.of(frame).applied(to_rgb(made, made.width))
    height, width = shown.shape[:2]
    np.testing.assert_array_equal(turned, shown[top : height - bottom, left : width - right].numpy())


def test_crops_that_cut_through_chroma():
    frame = av.VideoFrame(64, 48, "yuv420p")
    assert box_of(frame, (2, 4, 3, 5), (64, 48)) == (2, 4, 3, 5)
    assert box_of(frame, (1, 4, 0, 0), (64, 48)) is None and box_of(frame, (2, 4, 0, 0), (128, 48)) is None


CASES = {
    "8-bit": ("yuv420p", {}), "10-bit": ("yuv420p10le", {}), "odd": ("yuv420p", {"size": (71, 53)}),
    "4:2:2": ("yuv422p10le", {}), "4:4:4": ("yuv444p", {}), "grey": ("gray10le", {}), "RGB": ("gbrp10le", {}),
    "phone": ("yuv420p", {"turn": 90, "codec": "libx264", "size": (96, 64)}),
    "phone, 4:2:2": ("yuv422p", {"turn": -90, "codec": "libx264", "size": (96, 64)}),
    "wide pixels": ("yuv420p", {"aspect": Fraction(16, 11)}), "full range": ("yuv420p", {"full": True}),
    "HLG": ("yuv420p10le", {"hdr": 18}), "PQ": ("yuv420p10le", {"hdr": 16}), "alpha": ("yuva420p", {}),
    "packed": ("bgra", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_stored_planes_outside_an_edit_are_written_bit_for_bit(tmp_path, name):
    form, options = CASES[name]
    suffix = "mp4" if "turn" in options else "mkv"
    source = open_video(recoded(tmp_path / f"source.{suffix}", form, **options))
    (width, height), originals = source.size, list(source.stored())
    assert all(map(planar, originals))
    weights = feather(square(), (SIDE, SIDE), (width, height), REACH)
    edited = torch.zeros(3, height, width)
    edited[0] = 255
    results = [with_edit(frame, edited, weights) for frame in originals]
    display = Display(source.index.aspect, display_matrix(originals[0]))
    path = write_video(tmp_path / "o.mkv", results, source.fps, crf=None, display=display)
    again = open_video(path)
    assert again.size == source.size
    # what players show, in RGB: red in the middle, the source outside of the feather and its chroma's neighbours
    outside = F.max_pool2d(weights.inside[None, None], 9, 1, 4)[0, 0] == 0
    for before, after in zip(source.frames(), again.frames(), strict=True):
        assert torch.equal(before[outside], after[outside])
        middle = after[height // 2, width // 2].tolist()
        assert (middle[0] > 220 and max(middle[1:]) < 45) or name == "grey"
    for frame, written in zip(originals, again.stored(), strict=True):
        assert written.format.name == frame.format.name and written.color_trc == frame.color_trc
        for before, after in zip(planes_of(planar(frame)), planes_of(planar(written)), strict=True):
            step = [-(-a // b) for a, b in zip((frame.height, frame.width), before.shape, strict=True)]
            own = Orientation.of(frame).undone(weights.inside)[None, None]
            at = F.interpolate(own, size=(frame.height, frame.width), mode="area")
            kept = F.max_pool2d(at, step, ceil_mode=True)[0, 0].numpy() == 0
            assert kept.mean() > 0.2
            np.testing.assert_array_equal(before[kept], after[kept])


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv"])
@pytest.mark.parametrize("form", ["yuv420p", "yuv420p10le"])
def test_lossless_files(tmp_path, suffix, form):
    source = open_video(recoded(tmp_path / "source.mkv", form))
    made = list(source.stored())
    written = list(open_video(write_video(tmp_path / f"o{suffix}", made, Fraction(8), crf=None)).stored())
    for before, after in zip(made, written, strict=True):
        for a, b in zip(planes_of(before), planes_of(after), strict=True):
            np.testing.assert_array_equal(a, b)


def test_lossless_rgb(tmp_path):
    frames = noise(3, 33, 47, 3)
    again = open_video(write_video(tmp_path / "o.mkv", frames, Fraction(8), crf=None)).read()
    assert torch.equal(again.frames, frames)


def test_conversions_have_the_same_bits_in_every_run():
    """With several threads, one of some hundred differs at the threads' borders."""
    wide = noise(101, 150, 3).numpy().astype(np.uint16) * 257
    frame = av.VideoFrame.from_ndarray(wide, format="rgb48le")
    first = planes_of(converted(frame, "yuv420p10le"))
    for i in range(400):
        moved = [np.full(1000 * (i % 60) + 1, 7, np.uint16) for _ in range(5)]  # so that memory is used anew
        del moved
        found = planes_of(converted(frame, "yuv420p10le"))
        assert all(np.array_equal(a, b) for a, b in zip(first, found, strict=True))
