"""Paths of the files bundled with the package."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
"""The demo model: a diffusers folder."""
DEMO_LAYERS = DEMO.parent / "temporal.safetensors"
"""Temporal layers of the demo model."""
CLIP = DEMO.parent / "clip.mp4"
"""The demo's clip."""
