"""Facts of model families that hold in every host, one file per family."""

from .h3 import H3
from .ltx import LTX2
from .unet import UNET
from .wan import WAN

FAMILIES = (UNET, WAN, LTX2, H3)
"""Those whose attention can be controlled."""
DEMOS = tuple(family.demo for family in FAMILIES if family.demo)
"""The names of the bundled models."""
