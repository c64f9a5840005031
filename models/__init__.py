"""Facts of model families that hold in every host, one file per family."""

from .unet import UNET
from .wan import WAN

FAMILIES = (UNET, WAN)
DEMOS = tuple(family.demo for family in FAMILIES)
"""The names of the bundled models."""
