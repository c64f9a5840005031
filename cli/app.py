"""The command line: its commands, and its error messages."""

from __future__ import annotations

import os
import sys
import warnings

from cyclopts import App, CycloptsError, Group

from .. import __version__
from .commands import batch, benchmark, demo, edit, evaluate, generate, invert, train_demo, tune
from .errors import parsing_error
from .help import show_help
from .progress import console, in_a_line, one_line, print_error

app = App(
    name="fatezero",
    help="Edit real videos with a prompt and an image diffusion model: FateZero, Plug-and-Play, TokenFlow, "
    "Tune-A-Video.",
    help_format="plaintext",
    version=f"fatezero {__version__}",
    console=console,
    group_parameters=Group("Options", sort_key=-1),
)
for name, module in {
    "edit": edit, "invert": invert, "tune": tune, "generate": generate, "evaluate": evaluate, "demo": demo,
    "batch": batch, "benchmark": benchmark, "train-demo": train_demo,
}.items():  # fmt: skip
    app.command(module.command, name=name)


def main() -> None:
    """Run the command line. On any error, prints one line and exits with status 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        if show_help(app, sys.argv[1:], console):
            sys.exit(0)
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except CycloptsError as error:
        print_error(f"error: {in_a_line(parsing_error(app, error))}")
        sys.exit(1)
    except Exception as error:
        if os.environ.get("FATEZERO_DEBUG"):
            raise
        print_error(one_line(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
