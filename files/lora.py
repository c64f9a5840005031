"""LoRA files as users give them: "style.safetensors", or with a strength "style.safetensors=0.8"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from .bundled import LORAS

PICKLED = (".bin", ".pt", ".pth")
"""Suffixes of files that torch reads (weights only); all others are safetensors."""
Timesteps = Literal["auto", "leading", "trailing", "lcm"]
_FEW_STEPS: dict[Timesteps, str] = {
    "lcm": r"(?<![a-z])(lcm|tcd)(?![a-z])",
    "trailing": r"lightning|(?<![a-z])hyper[-_ ]?sd",
    "auto": r"lightx2v|distill|causvid|few[-_ ]?steps|(?<!\d)[1-8][-_ ]?steps?(?![a-z])",
}
"""Names of weights for few steps without guidance, by the timesteps of UNets with them."""


def few_steps_of(path: str) -> Timesteps | None:
    """The timesteps of weights that are for few steps without guidance, by the names of their file and its folder:
    lcm (LCM and TCD), trailing (Lightning, Hyper), or auto for the model's own; None for other weights.
    """
    name = "/".join(Path(path).parts[-2:]).lower()
    return next((spacing for spacing, names in _FEW_STEPS.items() if re.search(names, name)), None)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, a folder with one, or the name of a bundled one, and its strength."""

    path: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """`FILE` or `FILE=STRENGTH`; the whole text is the path if such a file exists.

        Raises ValueError for a strength that is not finite.
        """
        path, _, number = text.rpartition("=")
        if not path or Path(text).exists():
            return cls(text)
        try:
            strength = float(number)
        except ValueError:
            return cls(text)
        if not isfinite(strength):
            raise ValueError(f"lora {text!r} has strength {number}: give a finite number")
        return cls(path, strength)

    def __str__(self) -> str:
        """The text that `parse` accepts."""
        plain = self.strength == 1 and self.parse(self.path) == LoraFile(self.path)
        return self.path if plain else f"{self.path}={self.strength:g}"

    @property
    def name(self) -> str:
        return Path(self.path).name

    def file(self) -> Path:
        """The file, or a folder's only LoRA. Raises ValueError for none or several."""
        path = LORAS.get(self.path) or Path(self.path)
        if path.is_file():
            return path
        if not path.is_dir():
            raise ValueError(f"no LoRA at {self.path}: give a file, or a file and its strength, FILE=0.8")
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix in (".safetensors", *PICKLED) and not file.name.startswith(".")
        )
        safe = {file.stem for file in found if file.suffix == ".safetensors"}
        found = [file for file in found if file.suffix == ".safetensors" or file.stem not in safe]
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
            which = f"contains {len(found)} possible LoRAs ({names})" if found else "contains no LoRA"
            raise ValueError(f"the folder {self.path} {which}: give the file")
        return found[0]
