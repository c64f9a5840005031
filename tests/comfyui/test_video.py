"""Video input and output: selected part, size, sound; latents in chunks; noise for other samplers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from comfyui.graph import DemoGraph, Graph
from comfyui.host import REPO, NodeError
from PIL import Image

from clips import beep_times, flash_times, flashes
from fatezero.video.read import Sound, read_video
from fatezero.video.write import write_video
from small import relative

CHOICE = {
    "file": "", "start": 0, "stride": 1, "count": 0, "width": 0, "height": 0,
    "crop_left": 0, "crop_top": 0, "crop_right": 0, "crop_bottom": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(host) -> str:
    """One second of 100x70 video at 8 fps, with a tone that rises half way."""
    time = np.arange(48000) / 48000
    wave = np.where(time < 0.5, 0.1, 0.4) * np.sin(2 * np.pi * 440 * time)
    frames = torch.randint(0, 255, (8, 70, 100, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(host.base / "input" / "sounding.mp4", frames, Fraction(8), Sound(wave[None].astype(np.float32), 48000))
    return "sounding.mp4"


def loaded(host, **choice):
    """(video file of the VIDEO output, number of pictures, their size)."""
    graph = Graph()
    node = graph.add("FateZeroLoadVideo", **{**CHOICE, **choice})
    return saved(host, graph, node)


def saved(host, graph, node):
    video = graph.add("SaveVideo", video=node[1], filename_prefix="part", format="auto", codec="auto")
    images = graph.add("SaveImage", images=node[0], filename_prefix="part")
    run = host.run(graph.prompt)
    pictures = run.outputs[images.id]["images"]
    return read_video(host.file(run, video.id)), len(pictures), Image.open(host.file(run, images.id)).size


@pytest.mark.every_host
def test_the_selected_part_keeps_its_rate_and_sound(host, clip):
    video, count, size = loaded(host, file=clip, start=4, stride=2, count=2, width=64, height=64)
    assert (count, size) == (2, (64, 64))
    assert video.fps == 4
    assert video.sound is not None
    assert abs(video.sound.samples.shape[1] / video.sound.rate - 0.5) < 0.05
    loud = np.abs(video.sound.samples).mean()
    whole = loaded(host, file=clip)[0].sound
    assert loud > 1.3 * np.abs(whole.samples).mean(), "the sound of the second half, which is louder"


def test_sizes_are_multiples_of_eight(host, clip):
    assert loaded(host, file=clip)[2] == (96, 72) or loaded(host, file=clip)[2] == (104, 72)
    assert loaded(host, file=clip, width=61, height=45)[2] == (64, 48)
    assert loaded(host, file=clip, height=48)[2][1] == 48
    assert loaded(host, file=clip, crop_left=30, crop_right=30, width=64, height=64)[2] == (64, 64)


def test_a_video_of_another_node_is_cut_equally(host, clip):
    """The same part of a file and of a VIDEO that is only in memory."""
    graph = Graph()
    whole = graph.add("FateZeroLoadVideo", **CHOICE | {"file": clip})
    parts = graph.add("GetVideoComponents", video=whole[1])
    made = graph.add("CreateVideo", images=parts[0], audio=parts[1], fps=parts[2])
    choice = {"start": 4, "stride": 2, "count": 2, "width": 64, "height": 64}
    node = graph.add("FateZeroLoadVideo", **CHOICE | choice, video=made[0])
    video, count, size = saved(host, graph, node)
    direct = loaded(host, file=clip, **choice)[0]
    assert (count, size, video.fps) == (2, (64, 64), direct.fps)
    assert abs(video.sound.samples.shape[1] - direct.sound.samples.shape[1]) <= 2048


@pytest.mark.parametrize("file", ["nowhere.mp4", "../host.log", "/etc/passwd"])
def test_files_outside_the_hosts_folders_are_refused(host, file):
    with pytest.raises(NodeError, match="file: no video"):
        loaded(host, file=file)


def test_files_that_are_not_videos_are_refused(host):
    (host.base / "input" / "text.mp4").write_text("hello " * 50)
    (host.base / "input" / "empty.mp4").touch()
    with pytest.raises(NodeError, match=r"text\.mp4 is not a readable video"):
        loaded(host, file="text.mp4")
    with pytest.raises(NodeError, match=r"empty\.mp4 is empty"):
        loaded(host, file="empty.mp4")


def test_a_missing_file_is_reported_once(host):
    with pytest.raises(NodeError) as refused:
        loaded(host, file="gone.mp4")
    (node,) = refused.value.report["node_errors"].values()
    (error,) = node["errors"]
    assert "no video 'gone.mp4'" in str(error)


def test_latents_in_chunks_equal_the_core_nodes(host):
    graph = DemoGraph()
    graph.set(graph.latent, chunk_size=2)
    core = graph.add("VAEEncode", pixels=graph.video[0], vae=graph.demo[2])
    assert relative(host.latents(graph.prompt, graph.latent[0]), host.latents(graph.prompt, core[0])) < 1e-5


def test_a_ksampler_returns_the_clip_from_the_noise(host):
    """With the source prompt, guidance 1 and the same key frames the core sampler replays the inversion."""
    graph = DemoGraph(steps=50)
    model = graph.add(
        "FateZeroSpatioTemporalAttention", model=graph.demo[0], key_frames="self, middle", clip_norm=False
    )

    def replayed(latent):
        sampler = graph.add(
            "KSamplerAdvanced", model=model[0], add_noise="disable", noise_seed=0, steps=50, cfg=1.0,
            sampler_name="euler", scheduler="ddim_uniform", positive=graph.words[0], negative=graph.negative[0],
            latent_image=latent, start_at_step=0, end_at_step=1000, return_with_leftover_noise="disable",
        )  # fmt: skip
        return host.latents(graph.prompt, sampler[0])

    clip = host.latents(graph.prompt, graph.latent[0])
    error = (replayed(graph.invert[0]) - clip).pow(2).mean().sqrt() / clip.std()
    assert error < 0.15, error


def test_a_single_picture_is_a_clip_of_one_frame(host):
    (host.base / "input" / "one.mp4").write_bytes((REPO / "demo" / "clip.mp4").read_bytes())
    graph = DemoGraph(frames=1)
    assert host.latents(graph.prompt, graph.edit[0]).shape == (1, 4, 8, 8)


@pytest.mark.every_host
def test_varying_frame_times_and_late_starts_stay_in_sync_in_the_host(host):
    """A VIDEO has one rate; flashes and beeps must still coincide."""
    times = [*(Fraction(i, 25) for i in range(26)), *(1 + Fraction(i, 10) for i in range(1, 11))]
    times += [2 + Fraction(i, 30) for i in range(1, 31)]
    flashes(host.base / "input" / "phone.mkv", times=times, clock=Fraction(1, 90000), late=1.0)
    video, _, size = loaded(host, file="phone.mkv")
    assert size == (64, 48)
    assert flash_times(video) == pytest.approx([0, 1, 2, 3], abs=0.06)
    assert beep_times(video.sound) == pytest.approx([0, 1, 2, 3], abs=0.06)


def test_a_background_is_put_behind_transparent_pixels(host):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(host.base / "input" / "clear.png")

    def brightness(**choice):
        graph = Graph()
        node = graph.add("FateZeroLoadVideo", **{**CHOICE, "file": "clear.png", **choice})
        images = graph.add("SaveImage", images=node[0], filename_prefix="clear")
        return np.asarray(Image.open(host.file(host.run(graph.prompt), images.id)).convert("L")).mean()

    assert (brightness(), brightness(background="white")) == (0, 255)
    with pytest.raises(NodeError, match="background"):
        brightness(background="nocolour")
