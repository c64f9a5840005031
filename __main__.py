"""The command's way in, `fatezero` or `python -m fatezero`: ready for signals before it loads the rest."""

from __future__ import annotations

from collections.abc import Callable

from .files.stopping import leave, run_to_the_end


def _load() -> Callable[[], None]:
    from .cli import main

    return main


def main() -> None:
    """Run the command and end the process with its status."""
    leave(run_to_the_end(_load))


if __name__ == "__main__":
    main()
