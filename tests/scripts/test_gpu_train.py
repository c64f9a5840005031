"""`make gpu-train` on tiny trainings: models that open, and a state only where it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.hosts.diffusers.load import demo_video_model

REPO = Path(__file__).resolve().parents[2]
MOST = 12_100_000
"""Limit of the weights of world 2 in bytes."""


@pytest.mark.slow
def test_both_models_are_trained_and_open(tmp_path):
    command = [sys.executable, "scripts/gpu_train.py", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    subprocess.run(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "wan"}
    cpu, text = torch.device("cpu"), "a red fish gliding in front of a small wheel"
    for model in (Checkpoint.load(str(tmp_path / "unet"), cpu), demo_video_model(tmp_path / "wan", cpu)):
        assert model.native_size == 128
        latents = model.encode_clip(torch.rand(2, 3, 128, 128))
        assert latents.shape[-2:] == (32, 32)
        assert model.encode_prompt(text, 128, 128).embeddings.shape[-1] == 64
    sizes = {path.parent.relative_to(tmp_path): path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert sizes[Path("unet/vae")] == sizes.pop(Path("wan/vae")), "both have one autoencoder"
    assert sum(sizes.values()) < MOST
