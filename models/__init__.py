"""What is true of a family of models in every host: one file a family."""

from .unet import UNET
from .wan import WAN

FAMILIES = (UNET, WAN)
DEMOS = tuple(family.demo for family in FAMILIES)
"""The names of the bundled models."""
