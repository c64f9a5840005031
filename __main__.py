"""The command's way in, `fatezero` or `python -m fatezero`: ready for signals before it loads the rest."""

from __future__ import annotations

from .files.stopping import end_on_signals, leave


def main() -> None:
    """Run the command and end the process with its status."""
    end_on_signals()
    from .cli.app import main as run

    try:
        run()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    leave(0)


if __name__ == "__main__":
    main()
