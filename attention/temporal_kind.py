"""Facts about temporal layers that need no torch: their two published layouts, and how they are trained."""

from __future__ import annotations

from typing import Literal

Kind = Literal["official", "fatezero"]
TRAINED_KEYS = ("first", "previous")
"""The key frames of the spatio-temporal attention, which is trained with clip norm."""
