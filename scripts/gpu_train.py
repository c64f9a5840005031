"""Train the models of world 2 on a GPU, three minutes each: `make gpu-train`.

Needs what `make gpu` needs, and takes the options of `fatezero.demo.world2.train`. The models are written to the
folder. What resumes a stopped training, with half a gigabyte of latents, is kept only with `--state FOLDER`.
"""

from __future__ import annotations

import os
import sys
import tempfile

from checkout import use_checkout, use_packages

use_checkout()


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        use_packages(f"{folder}/packages")
        from fatezero.demo.world2.train import main as train

        workers = str(os.cpu_count() or 1)
        train(["--state", f"{folder}/state", "--workers", workers, "--minutes", "3", *sys.argv[1:]])


if __name__ == "__main__":
    main()
