"""Paths of the files bundled with the package."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
"""The demo model: a diffusers folder."""
DEMO_LAYERS = DEMO.parent / "temporal.safetensors"
"""Temporal layers of the demo model."""
FEW_STEPS = DEMO.parent / "wan" / "few_steps.safetensors"
"""A LoRA for the demo's video model in few steps without guidance."""
LORAS = {"demo-few-steps": FEW_STEPS}
"""The bundled LoRAs by name."""
WORLD2 = DEMO.parent / "world2"
"""The folder of the models of world 2."""
CLIP = DEMO.parent / "clip.mp4"
"""The demo's clip."""
