"""The two published layouts of temporal layers, known without torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["official", "fatezero"]
